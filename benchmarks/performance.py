"""Every speed measurement, one after the other, and docs/performance.md written from what they print.

    python -m benchmarks.performance [--only random_walk crf] [--data_root data/oxford-iiit-pet]

Each benchmark runs as its own process and prints its table; its JSON lines become rows of the document. --only replaces
nothing: it prints, and leaves the document as it is. --data_root gives the benchmarks that take photos real ones.
"""
import json
import os
import platform
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import ROOT, Parser
from utils.files import atomic_path
from utils.log import environment
from utils.runtime import run_main

DOCUMENT = ROOT / "docs" / "performance.md"


@dataclass(frozen=True)
class Benchmark:
    """title: what is measured, against what.  target: the project's own.  flags: of the run.  photos: whether it takes
    --data_root.  gpu: whether it runs only where there is a GPU.  module: of `benchmarks`, where it is not the name."""
    title: str
    target: str
    flags: tuple[str, ...] = ()
    photos: bool = False
    gpu: bool = False
    module: str | None = None


BENCHMARKS = {
    "random_walk": Benchmark(
        "Random walk, T^256, radius 5, three maps, against squaring the dense matrix",
        "47x63: 200 times at an error under 1e-3, and under 1e-5 on request; 94x125: 3,000 times, under 80 MB"),
    "affinity_loss": Benchmark("Affinity loss, forward and backward, crop 448, batch 8, against gathered pairs",
                               "3 times, a third of the memory"),
    "crf": Benchmark("Dense CRF of 100 photos: several processes, few classes, the torch backend",
                     "1.8 times one process, with its pixels; 6 times 21 classes in one process",
                     ("--presets", "psa"), photos=True),
    "cam": Benchmark("CAMs, four scales and horizontal flips, ResNet-50, against one image and scale at a time",
                     "1.5 times, under 3 GB for any image", photos=True),
    "scoring": Benchmark("Scoring masks, and 100 thresholds, against a numpy pass for each class (and threshold)",
                         "20 times for the sweep of 1,449 masks"),
    "deeplab": Benchmark("DeepLabV1-ResNet38, one step and one inference at 448, against a plain network", "1.3 times"),
    "train_throughput": Benchmark(
        "A training step of DeepLabV1-ResNet38 at its published size, against a plain float32 loop",
        "on two CPU cores 1.5 times in bf16", ("--stages", "deeplab", "--variants", "plain", "fp32", "bf16")),
    "depthwise": Benchmark(
        "A training step of DeepLabV1 on EfficientNet-Lite2, against PyTorch's gradients of depthwise convolutions",
        "1.5 times in bf16"),
    "loader": Benchmark("Reading and varying training images, and the memory of 82,081 items in a worker",
                        "not the limit of a training"),
    "device": Benchmark("Inference on a GPU, against its rates of matrix products and of copying",
                        "networks 0.3 of the rate of products, walk and CRF 0.3 of that of copying", gpu=True),
    "gpu_training": Benchmark("Training steps on a GPU, published sizes and batches, against a plain float32 loop",
                              "3 times in bf16", gpu=True, module="train_throughput"),
}


def command_of(name: str, data_root: str | None = None) -> list[str]:
    """The command line of a benchmark, as a user types it."""
    photos = ["--data_root", data_root] if data_root and BENCHMARKS[name].photos else []
    return ["python", "-m", f"benchmarks.{BENCHMARKS[name].module or name}", *BENCHMARKS[name].flags, *photos]


def run(name: str, data_root: str | None) -> list[dict]:
    """Run one benchmark, its output to the screen; returns its rows."""
    command = command_of(name, data_root)
    print(f"\n$ {' '.join(command)}", flush=True)
    lines = []
    with subprocess.Popen([sys.executable, *command[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        sys.exit(f"Error: benchmarks.{name} ended with status {process.returncode}; see above")
    return [json.loads(line) for line in lines if line.startswith("{")]


def processor() -> str:
    """The processor's name and the cores this process may use."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor() or 'unknown processor'}, {cores} cores"


def document(rows: dict[str, list[dict]], photos: bool) -> str:
    """The text of docs/performance.md.  rows: {benchmark: [row]}.  photos: whether they were real ones."""
    facts = environment()
    parts = [
        "# Performance", "", *wrapped(
            f"Written by `python -m benchmarks.performance{' --data_root DATA' if photos else ''}`, which `make bench` "
            "runs with toy images: ours beside a plain reference, in the same run. Ratio: the reference's seconds over "
            "ours. Extra MB: by which ours raised the peak of resident memory. Error: the largest difference "
            "of the results, as each benchmark's docstring says."), "",
        f"{processor()}; torch {facts['torch']}; commit {(facts['git_commit'] or 'none')[:10]}. "
        f"Photos: {'of DATA' if photos else 'toy images'}.", ""]
    for name, found in rows.items():
        command = " ".join(command_of(name, "DATA" if photos else None))
        parts += [f"## {BENCHMARKS[name].title}", "", *wrapped(f"`{command}`; target: {BENCHMARKS[name].target}."), "",
                  "| case | seconds | reference | ratio | extra MB | error | |", "|---|---|---|---|---|---|---|"]
        parts += [_line(row) for row in found] + [""]
    return "\n".join(parts)


def wrapped(text: str) -> list[str]:
    """A paragraph in lines of at most 120 characters."""
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def _line(row: dict) -> str:
    known = ("case", "seconds", "reference_seconds", "ratio", "extra_mb", "max_error")
    more = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in row.items() if name not in known)
    shown = ["" if row.get(name) is None else f"{row[name]:,.4g}" for name in known[1:]]
    return f"| {row['case']} | " + " | ".join(shown) + f" | {more} |"


def there() -> list[str]:
    """The benchmarks that can run on this machine."""
    import torch
    return [name for name, one in BENCHMARKS.items() if torch.cuda.is_available() or not one.gpu]


def main() -> None:
    parser = Parser("benchmarks.performance", __doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(BENCHMARKS), help="just these, and no document")
    parser.add_argument("--data_root", help="a folder of photos in Pet's layout (default: toy sets)")
    args = parser.parse_args()
    data_root = str(Path(args.data_root).resolve()) if args.data_root else None
    rows = {name: run(name, data_root) for name in args.only or there()}
    if not args.only:
        with atomic_path(DOCUMENT) as temporary:
            temporary.write_text(document(rows, bool(data_root)), encoding="utf-8")
        print(f"\nWrote {DOCUMENT.relative_to(ROOT)}")


if __name__ == "__main__":
    run_main(main)
