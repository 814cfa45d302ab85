"""`make demo`: the six steps on toy data, through the scripts as a user would run them, and a table of what came out.

Everything is measured in this run: seed, walk and mask on the toy training split (image labels known), DeepLab on the
toy test split (nothing known).  Writes output/demo/results.json; the pictures lie beside it.
"""
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measure import ROOT

DEMO = Path("output/demo")
TOY = ["--data_root", "data/toy"]
# On two cores, processes that read images take more from the network than they give: images this small take 3 ms.
SMALL = ["--backbone", "efficientnet_lite0", "--crop_size", "112", "--max_size", "160", "--workers", "0"]
# Small images on a small grid: a short walk, and few and large steps of training.
WALK = ["--model_path", f"{DEMO}/stage2/model_best.pth.tar", "--bg_alpha", "8", "--walk_steps", "16",
        "--crf_preset", "psa"]
STEPS = [
    ("toy data", ["-m", "data.make_toy", "--root", "data/toy", "--size", "128", "--train", "120", "--test", "40"]),
    ("stage 1", ["run_train.py", "--stage", "1", *TOY, *SMALL, "--scales", "1.0",
                 "--cam_dir", f"{DEMO}/cams", "--output_dir", f"{DEMO}/stage1"]),
    ("stage 2", ["run_train.py", "--stage", "2", "--cam_dir", f"{DEMO}/cams", "--pretrained", "imagenet",
                 "--epochs", "2", "--batch_size", "8", "--lr", "0.1", "--alpha_low", "6", "--alpha_high", "32",
                 "--output_dir", f"{DEMO}/stage2"]),
    ("inference", ["run_inference.py", *WALK, "--output_dir", f"{DEMO}/inference", "--save_overlays", "--save_walk"]),
    ("evaluation", ["run_eval.py", *WALK, "--output_dir", f"{DEMO}/eval"]),
]


def deeplab_steps(name: str, mask_dir: str) -> list[tuple[str, list[str]]]:
    """Train and test DeepLab on the masks of a folder, or on ground truth ("gt"), with the same settings."""
    train = ["train_deeplab.py", *TOY, *SMALL, "--mask_dir", mask_dir, "--epochs", "5", "--batch_size", "8",
             "--lr", "0.008", "--weight_decay", "0.0001", "--output_stride", "16",
             "--pretrained", f"{DEMO}/stage1/model_best.pth.tar", "--output_dir", f"{DEMO}/{name}"]
    test = ["test_deeplab.py", "--model_path", f"{DEMO}/{name}/model_best.pth.tar", "--scales", "1.0",
            "--crf_preset", "psa", "--output_dir", f"{DEMO}/{name}_test"]
    return [(f"{name} training", train), (f"{name} test", test)]


def run(command: list[str]) -> float:
    """Run one step in the project's folder; its output goes to the screen.  Returns the seconds it took."""
    if command[0].endswith(".py"):
        command = [*command, "--overwrite"]  # of an earlier demo
    print(f"\n$ python {' '.join(command)}", flush=True)
    started = time.time()
    code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if code:
        sys.exit(f"Error: the step above ended with status {code}; mend what it says, then run make demo again")
    return time.time() - started


def scores(folder: str, stage: str) -> dict[str, float]:
    """The scores of one stage at the fixed threshold."""
    table = json.loads((ROOT / DEMO / folder / "scores.json").read_text())["scores"]
    return {name: round(table[stage]["fixed"][name], 4) for name in ("miou", "fg_iou", "image_fg_iou")}


def main() -> None:
    seconds = {name: round(run(command), 1) for name, command in
               [*STEPS, *deeplab_steps("deeplab", f"{DEMO}/inference"), *deeplab_steps("deeplab_full", "gt")]}
    results = {stage: scores("eval", stage) for stage in ("seed", "walk", "mask")}
    results["deeplab"] = scores("deeplab_test", "+ CRF")
    results["deeplab_full"] = scores("deeplab_full_test", "+ CRF")
    results["weak_over_full"] = round(results["deeplab"]["miou"] / results["deeplab_full"]["miou"], 4)
    results["seconds"] = {**seconds, "total": round(sum(seconds.values()), 1)}
    (ROOT / DEMO / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print_table(results)


def print_table(results: dict) -> None:
    split = {"seed": "train", "walk": "train", "mask": "train", "deeplab": "test", "deeplab_full": "test"}
    print(f"\n{'stage':<14}{'split':<7}{'mIoU':>7}{'fg IoU':>8}")
    for stage, name in split.items():
        print(f"{stage:<14}{name:<7}{results[stage]['miou']:>7.3f}{results[stage]['fg_iou']:>8.3f}")
    print(f"weak / full {results['weak_over_full']:.3f}   {results['seconds']['total']:.0f} s   "
          f"panel: {DEMO}/eval/panel.png   figures: {DEMO}/results.json")


if __name__ == "__main__":
    main()
