"""What benchmarks share: flags, seconds and extra memory of a call, our training step, the table of the results."""
import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from utils.config import Machine, TrainConfig
from utils.errors import UserError
from utils.options import FLAGS
from utils.precision import has_bf16
from utils.runtime import keep_memory, release_memory, set_memory

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]


class Parser(argparse.ArgumentParser):
    """The flags of `python -m <module>`."""

    def __init__(self, module: str, description: str):
        super().__init__(prog=f"python -m {module}", description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def flag(self, name: str, default: object, text: str, like: str | None = None) -> None:
        """Declare --name, of the type of the scripts' flag of that name, or of the one that it is `like`."""
        known = FLAGS[like or name]
        self.add_argument(f"--{name}", type=known.type, choices=known.choices, default=default,
                          help=f"{text} (default: %(default)s)")


def timed(call: Callable, repeats: int = 3, clock: Callable[[], float] = time.perf_counter) -> tuple[float, object]:
    """(least seconds of so many calls by a clock, the last result)."""
    seconds = []
    for _ in range(repeats):
        started = clock()
        result = call()
        seconds.append(clock() - started)
    return min(seconds), result


def waited(call: Callable, device: "torch.device") -> Callable:
    """A call that waits for the device, for a clock."""
    def run() -> object:
        result = call()
        if device.type == "cuda":
            import torch
            torch.cuda.synchronize(device)
        return result
    return run


def precisions(device: "torch.device") -> tuple[str, ...]:
    """Those that are worth measuring on a device: emulated, bf16 takes ten times as long as fp32."""
    return ("fp32", "bf16") if has_bf16(device) else ("fp32",)


def extra_mb(call: Callable) -> float | None:
    """MB by which a call raises this process's peak of resident memory; None where Linux's /proc is not to be had."""
    # What glibc keeps of freed memory would be taken again without any rise to be seen.
    release_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    except OSError:
        return None
    before = _resident("VmRSS")
    call()
    return round((_resident("VmHWM") - before) / 1024, 1)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


@contextlib.contextmanager
def usual_memory() -> Iterator[None]:
    """Undo `utils.runtime.keep_memory` in the block: glibc's allocator has the thresholds that it settles at itself."""
    set_memory(32 << 20, 64 << 20, 128 << 10)
    try:
        yield
    finally:
        keep_memory()


def in_process(module: str, *flags: object) -> dict:
    """The JSON that `python -m <module>` prints last: a measurement in a process of its own; UserError if it fails."""
    done = subprocess.run([sys.executable, "-m", module, *map(str, flags)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def training_step(network, loss: Callable, batch: dict, machine: Machine, totals: Callable | None = None,
                  compiled: bool = False) -> Callable[[], None]:
    """Our training step on a batch, as a function without arguments.

    network: in training mode.  loss, totals: as in `src.training.loop.Task`.
    """
    from src.training.loop import Run, Task, no_totals
    images = len(batch["image"])
    config = TrainConfig(images, epochs=1, lr=1e-3, head_lr=10.0, momentum=0.9, weight_decay=5e-4, crop_size=0,
                         max_size=0, seed=0, compile=compiled)
    run = Run(Task("", network, loss, range(images), None, dict, totals or no_totals), config, machine, Path(), {})

    def step() -> None:
        run.step = 0  # each repeat is the first step, with its rates and its random numbers
        run.train_step(batch, (0, images, images))
    return waited(step, machine.device)


class Table:
    """The cases of a benchmark: a line for each as soon as it is measured, and all as JSON lines at the end."""

    def __init__(self):
        self.rows = []
        print(f"{'case':<36}{'seconds':>12}{'reference':>12}{'ratio':>9}{'extra MB':>10}{'error':>9}")

    def add(self, case: str, seconds: float, reference_seconds: float, memory: float | None = None,
            error: float | None = None, **more: object) -> None:
        """seconds, reference_seconds: ours and those of the plain reference.  memory: MB.  error: the largest
        difference of the results.  more: what else belongs into the JSON line."""
        row = {"case": case, "seconds": round(seconds, 5), "reference_seconds": round(reference_seconds, 4),
               "ratio": round(reference_seconds / seconds, 2), "extra_mb": memory,
               "max_error": None if error is None else float(f"{error:.1e}"), **more}
        self.rows.append(row)
        shown = ["-" if row[name] is None else f"{row[name]:g}" for name in ("extra_mb", "max_error")]
        print(f"{case:<36}{row['seconds']:>12.4f}{row['reference_seconds']:>12.3f}{row['ratio']:>9.2f}"
              f"{shown[0]:>10}{shown[1]:>9}", flush=True)

    def finish(self) -> None:
        """Print the JSON lines."""
        for row in self.rows:
            print(json.dumps(row))
