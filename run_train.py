"""Steps 1 and 2: train the CAM classifier (--stage 1), then AffinityNet (--stage 2).

Step 1 reads images and image labels; it writes output/stage1_<backbone>/ and the split's CAMs to --cam_dir.
Step 2 reads the CAMs; it writes affinity labels and a checkpoint with both networks to output/stage2_<backbone>/.
"""
import argparse
import sys

from utils import options as flags
from utils.runtime import run_main

COMMON = ("download", *flags.DATA, *flags.TRUNK, *flags.TRAINING, "cam_dir", "output_dir", *flags.MACHINE)
NAMES = {1: (*COMMON, "method", "cutmix", *flags.MAPS),
         2: (*COMMON, "model_path", "radius", "alpha_low", "alpha_high", "crf_preset")}
DEFAULTS = {1: {"epochs": 8, "freeze": None, "head_lr": 1.0}, 2: {"epochs": 6, "batch_size": 8}}
INHERITED = (*flags.DATA, "backbone", "width", "output_stride", "crop_size", "max_size", "precision", "seed",
             "model_path")


def parser_for(argv):
    """The parser of the stage that --stage names; `--help` alone shows stage 1's flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--stage", nargs="?")
    stage = 2 if first.parse_known_args(argv)[0].stage == "2" else 1
    parser = flags.Parser(__doc__, NAMES[stage], **DEFAULTS[stage])
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True,
                        help="1: classifier and CAMs; 2: affinity labels and AffinityNet (--stage 2 --help: its flags)")
    return parser


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_for(argv)
    args = parser.parse_args(argv)
    from src import train
    from src.inference import check_classes
    from src.start import begin, open_split
    from utils.artifacts import read_manifest, run_dir
    from utils.checkpoint import load_checkpoint
    if args.stage == 2:
        args.cam_dir = args.cam_dir or flags.FLAGS["cam_dir"].default
        manifest = read_manifest(args.cam_dir, "cam")
        flags.resolve(parser, args, manifest["options"], args.cam_dir, INHERITED)
        classifier = load_checkpoint(args.model_path, steps=("stage1",))
        args.pretrained = args.pretrained or args.model_path
        train.check_same_classifier(classifier, manifest, args.model_path, args.cam_dir)
        # Not flags of this stage, but of its record: step 3 inherits them, so that these CAMs fit its options.
        args.scales, args.flip = manifest["options"]["scales"], manifest["options"]["flip"]
    else:
        flags.resolve(parser, args)
        args.labels = args.labels or "gt"
    args.output_dir = args.output_dir or str(run_dir(f"stage{args.stage}", args.backbone))
    dataset = open_split(args)
    if args.stage == 2:
        check_classes(dataset, classifier["classes"], args.model_path)
    device = begin(f"Step {args.stage}", args, dataset)
    if args.dry_run:
        return 0
    if args.stage == 1:
        train.run_stage1(dataset, vars(args), device)
    else:
        train.run_stage2(dataset, classifier, vars(args), device)
    return 0


if __name__ == "__main__":
    run_main(main)
