"""Steps 1 and 2: train the CAM classifier (--stage 1), then AffinityNet (--stage 2).

Step 1 reads images and image labels; it writes output/stage1_<backbone>/ and the split's CAMs to --cam_dir. With
--model_path it trains nothing: it takes that classifier, ours or a published one, and writes the CAMs.
Step 2 reads the CAMs; it writes affinity labels and a checkpoint with both networks to output/stage2_<backbone>/.
"""
import argparse
import sys

from utils import options as flags
from utils import recipes
from utils.runtime import run_main

COMMON = ("download", *flags.DATA, *flags.TRUNK, *flags.TRAINING, "model_path", "cam_dir", "output_dir", *flags.MACHINE)
NAMES = {1: (*COMMON, "method", *flags.AVC, "cutmix", "long_side", *flags.MAPS),
         2: (*COMMON, "radius", "alpha_low", "alpha_high", *flags.CRF)}
DEFAULTS = {1: {"epochs": 8, "freeze": None, "head_lr": 1.0}, 2: {"epochs": 6, "batch_size": 8}}
RECIPES = {1: recipes.STAGE1, 2: recipes.STAGE2}
INHERITED = (*flags.DATA, *flags.NETWORK, "crop_size", "max_size", "precision", "seed", "model_path")


def parser_for(argv):
    """The parser of the stage that --stage names; `--help` alone shows stage 1's flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--stage", nargs="?")
    stage = 2 if first.parse_known_args(argv)[0].stage == "2" else 1
    parser = flags.Parser(__doc__, NAMES[stage], RECIPES[stage], **DEFAULTS[stage])
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True,
                        help="1: classifier and CAMs; 2: affinity labels and AffinityNet (--stage 2 --help: its flags)")
    return parser


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_for(argv)
    args = parser.parse_args(argv)
    from models.weights import check_pretrained, load_model
    from src import train
    from src.records import check_same_classifier, settle_classes
    from src.start import begin, open_split, settle_crf, settle_labels
    from utils.artifacts import read_manifest, run_dir
    classifier = None
    if args.stage == 2:
        args.cam_dir = args.cam_dir or flags.FLAGS["cam_dir"].default
        manifest = read_manifest(args.cam_dir, "cam")
        flags.resolve(parser, args, manifest["options"], args.cam_dir, INHERITED)
        settle_crf(args)
        classifier = load_model(args.model_path, steps=("stage1",))
        args.pretrained = args.pretrained or args.model_path
        check_same_classifier(classifier, manifest, args.model_path, args.cam_dir)
        # Not flags of this stage, but of its record: step 3 inherits them, so that these CAMs fit its options.
        args.scales, args.flip = manifest["options"]["scales"], manifest["options"]["flip"]
    elif args.model_path:
        classifier = load_model(args.model_path, steps=("stage1",))
        flags.resolve(parser, args, {**classifier["options"], **train.network_of(classifier, args)},
                      args.model_path, INHERITED)
    else:
        flags.resolve(parser, args)
    check_pretrained(args.pretrained, args.backbone, args.width)
    args.output_dir = args.output_dir or str(run_dir(f"stage{args.stage}", args.backbone))
    dataset = open_split(args)
    if args.stage == 1:
        settle_labels(args, dataset, default="gt" if classifier is None else None)
    if classifier is not None:
        settle_classes(classifier, dataset, args.model_path)
    device = begin(f"Step {args.stage}", args, dataset)
    if args.dry_run:
        return 0
    if args.stage == 2:
        train.run_stage2(dataset, classifier, vars(args), device)
    elif classifier is not None:
        train.adopt_classifier(classifier, dataset, vars(args), device)
    else:
        train.run_stage1(dataset, vars(args), device)
    return 0


if __name__ == "__main__":
    run_main(main)
