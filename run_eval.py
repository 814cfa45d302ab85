"""Step 4: score masks against ground truth: seed (CAM), + walk, + CRF of a checkpoint, or any folder of masks.

Reads a stage-2 checkpoint (--model_path; of a stage-1 one the seed is scored) or a folder of PNG masks (--mask_dir),
and a split with ground truth; writes scores.json, thresholds.png, classes.png, panel.png and panel_worst.png to
--output_dir (default output/eval).
"""
from pathlib import Path

from utils import options as flags
from utils import recipes
from utils.runtime import run_main

NAMES = ("model_path", "mask_dir", *flags.DATA, *flags.MAPS, *flags.WALK, "crf", *flags.CRF, "max_size", "cam_dir",
         "output_dir", *flags.MACHINE)
INHERITED = (*flags.DATA, "scales", "flip", "max_size", "radius", "precision", "cam_dir")
OF_MASKS = ("labels", "bg_alpha", "beta", "walk_steps", "walk_eps")  # inherited from masks, whose scores are asked for


def main(argv=None):
    parser = flags.Parser(__doc__, NAMES, recipes.MASKS, output_dir="output/eval", crf_preset="mctformer",
                          model_path="output/stage2_resnet50/model_best.pth.tar")
    flags.add_show_affinity(parser)
    args = parser.parse_args(argv)
    if args.mask_dir and args.show_affinity:
        parser.error("--show_affinity needs networks, and --mask_dir has none; pass --model_path instead of --mask_dir")
    if args.mask_dir and args.model_path:
        parser.error("--mask_dir scores masks as they are and --model_path makes them; pass one of them")
    from src import eval as evaluation
    from src.affinity_maps import show_affinity, shown_images
    from src.records import open_checkpoint, settle_classes
    from src.start import begin, open_split, settle_crf, settle_labels
    if args.mask_dir:
        payload, stages = None, [evaluation.Stage("masks", "mask", Path(args.mask_dir))]
        flags.resolve(parser, args, *evaluation.mask_record(args.mask_dir), (*INHERITED, *OF_MASKS))
        args.model_path = None
    else:
        payload, args.model_path = open_checkpoint(args.model_path, parser.flags["model_path"],
                                                   args.cam_dir or parser.flags["cam_dir"], ("stage1", "stage2"))
        flags.resolve(parser, args, payload["options"], args.model_path, INHERITED)
        settle_crf(args)
    dataset = open_split(args)
    if payload is not None:
        settle_classes(payload, dataset, args.model_path)
    settle_labels(args, dataset)
    shown = shown_images(args.show_affinity, dataset)
    device = begin("Step 4", args, dataset)
    if args.dry_run:
        return 0
    if payload is not None:
        stages = evaluation.checkpoint_stages(payload, dataset, vars(args), device)
    evaluation.evaluate(dataset, stages, vars(args))
    if shown:
        show_affinity(payload, shown, args.show_affinity, vars(args), device)
    return 0


if __name__ == "__main__":
    run_main(main)
