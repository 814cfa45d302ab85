"""The arithmetic of the networks: bf16 where the processor has units for it, else fp32."""
from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:
    import torch

CPU_UNITS = {"amx_bf16", "avx512_bf16", "bf16"}  # as /proc/cpuinfo names them; the last is Arm's


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware, and oneDNN may use that (ONEDNN_MAX_CPU_ISA).

    Where the system does not tell (Windows, macOS), the answer is no: fp32 is right everywhere.
    """
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "DEFAULT")).upper()
    if platform.system() != "Linux" or not any(word in allowed for word in ("DEFAULT", "ALL", "BF16", "AMX", "FP16")):
        return False
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "")
    return not CPU_UNITS.isdisjoint(flags.split())


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 matrices in hardware."""
    if device.type != "cuda":
        return cpu_has_bf16()
    import torch
    return torch.cuda.get_device_capability(device) >= (8, 0)


def settle_precision(asked: str, device: torch.device) -> str:
    """fp32 or bf16 for --precision {auto,fp32,bf16}.

    Raises UserError for bf16 on a CPU without units for it: PyTorch would convert every product, and on an AVX2 core
    the first training step of ResNet-50 (crop 320, batch 16) took 318 s, in fp32 under 30 s.
    """
    if asked == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    if asked == "bf16" and not has_bf16(device):
        if device.type == "cuda":
            raise UserError(f"--precision bf16: {device} has no bf16 units; pass --precision fp32, or leave it out")
        raise UserError("--precision bf16: this CPU has no bf16 units (AMX or AVX512-BF16) and would take about ten "
                        "times as long as in fp32 (a training step of ResNet-50: 318 s instead of 30 s); pass "
                        "--precision fp32, or leave it out")
    return asked


def told(precision: str, device: torch.device) -> str:
    """A precision and the reason for it, for a run's header."""
    where = str(device) if device.type == "cuda" else "this CPU"
    if not has_bf16(device):
        return f"{precision} ({where} has no bf16 units)"
    return f"{precision} ({where} has bf16 units{'' if precision == 'bf16' else ', which fp32 leaves idle'})"
