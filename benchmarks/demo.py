"""`make demo`: the six steps on toy data, through the scripts as a user would run them, and a table of what came out.

Everything is measured in this run: seed, walk and mask on the toy training split (image labels known), DeepLab on the
toy test split (nothing known).  Writes output/demo/results.json; the pictures lie beside it.
"""
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import Parser
from utils.runtime import run_main
from workflow.plan import make_plan
from workflow.whole_run import ROOT, SCORES, run_plan, run_script, score_rows

DEMO = Path("output/demo")
TOY = ("-m", "data.make_toy", "--root", "data/toy", "--size", "128", "--train", "120", "--test", "40")
# Small images on a small grid: a short walk, and few and large steps of training.
WALK = "--bg_alpha 8 --walk_steps 16 --crf_preset psa"
# On two cores, processes that read images take more from the network than they give: images this small take 3 ms.
FLAGS = f"""--data_root data/toy --backbone efficientnet_lite0 --crop_size 112 --max_size 160 --overwrite
    --step 1 --scales 1.0 --workers 0
    --step 2 --pretrained imagenet --epochs 2 --batch_size 8 --lr 0.1 --alpha_low 6 --alpha_high 32
    --step 3 {WALK} --save_overlays --save_walk
    --step 4 {WALK}
    --step 5 --epochs 5 --batch_size 8 --lr 0.008 --weight_decay 0.0001 --output_stride 16 --workers 0
    --step 6 --scales 1.0 --crf_preset psa"""
NAMES = {1: "stage 1", 2: "stage 2", 3: "inference", 4: "evaluation", 5: "deeplab training", 6: "deeplab test"}


def run(argv: Sequence[str]) -> float:
    """Run one command; its output goes to the screen.  Returns the seconds it took."""
    started = time.time()
    code = run_script(argv)
    if code:
        sys.exit(f"Error: the step above ended with status {code}; mend what it says, then run make demo again")
    return round(time.time() - started, 1)


def scores(folder: str, stage: str) -> dict[str, float]:
    """The scores of one stage at the fixed threshold."""
    values = next(values for name, _, _, values in score_rows(DEMO / folder) if name == stage)
    return {name: round(value, 4) for name, value in zip(SCORES, values)}


def main() -> None:
    Parser("benchmarks.demo", __doc__).parse_args()
    os.chdir(ROOT)
    seconds = {"toy data": run(TOY)}
    plan = make_plan(FLAGS.split(), str(DEMO), walk=True)
    spent = run_plan(plan)
    seconds.update({NAMES[step]: spent[step] for step in spent})
    # The ceiling: the same DeepLab on ground truth. Of a flag that is given twice, the later counts.
    train, test = (command.argv for command in plan.commands[-2:])
    seconds["deeplab_full training"] = run([*train, "--mask_dir", "gt", "--output_dir", f"{DEMO}/deeplab_full"])
    seconds["deeplab_full test"] = run([*test, "--model_path", f"{DEMO}/deeplab_full/model_best.pth.tar",
                                        "--output_dir", f"{DEMO}/deeplab_full_test"])
    results = {stage: scores("eval", stage) for stage in ("seed", "walk", "mask")}
    results["deeplab"] = scores("deeplab_test", "+ CRF")
    results["deeplab_full"] = scores("deeplab_full_test", "+ CRF")
    results["weak_over_full"] = round(results["deeplab"]["miou"] / results["deeplab_full"]["miou"], 4)
    results["seconds"] = {**seconds, "total": round(sum(seconds.values()), 1)}
    (DEMO / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print_table(results)


def print_table(results: dict) -> None:
    split = {"seed": "train", "walk": "train", "mask": "train", "deeplab": "test", "deeplab_full": "test"}
    print(f"\n{'stage':<14}{'split':<7}{'mIoU':>7}{'fg IoU':>8}")
    for stage, name in split.items():
        print(f"{stage:<14}{name:<7}{results[stage]['miou']:>7.3f}{results[stage]['fg_iou']:>8.3f}")
    print(f"weak / full {results['weak_over_full']:.3f}   {results['seconds']['total']:.0f} s   "
          f"panel: {DEMO}/eval/panel.png   figures: {DEMO}/results.json")


if __name__ == "__main__":
    run_main(main)
