"""Steps 1 and 2: train the CAM classifier (--stage 1), then AffinityNet (--stage 2).

Step 1 reads images and image labels; it writes output/stage1_<backbone>/ and the split's CAMs to --cam_dir. With
--model_path it trains nothing: it takes that classifier, ours or a published one, and writes the CAMs.
Step 2 reads the CAMs; it writes affinity labels and a checkpoint with both networks to output/stage2_<backbone>/.
"""
import argparse
import sys
from pathlib import Path

from src.seeds import SEED_FLAGS
from utils import options as flags
from utils.config import BackboneConfig, DataConfig, MapConfig, TrainConfig, WalkConfig
from utils.datasets import open_split
from utils.errors import UserError
from utils.runtime import run_main
from utils.store import BEST, NEWEST, check_data, check_free, chosen_checkpoint, made_of, read_manifest, run_dir

COMMON = ("download", *flags.DATA, *flags.BACKBONE, *flags.TRAINING, "model_path", "cam_dir", "output_dir", "overwrite",
          *flags.MACHINE)
NAMES = {1: (*COMMON, "method", "cutmix", "head_only", "long_side", *flags.MAPS),
         2: (*COMMON, "radius", "alpha_low", "alpha_high", *flags.CRF)}
DEFAULTS = {1: {"epochs": 8, "freeze": None, "head_lr": 1.0}, 2: {"epochs": 6, "batch_size": 8}}
INHERITED = (*flags.DATA, *flags.NETWORK, "crop_size", "max_size", "precision", "seed", "model_path")


def parser_for(argv: list[str]) -> flags.Parser:
    """The parser of the stage that --stage names; `--help` alone shows stage 1's flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--stage", nargs="?")
    stage = 2 if first.parse_known_args(argv)[0].stage == "2" else 1
    parser = flags.Parser(__doc__, NAMES[stage], f"stage{stage}", methods=SEED_FLAGS if stage == 1 else None,
                          **DEFAULTS[stage])
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True,
                        help="1: classifier and CAMs; 2: affinity labels and AffinityNet (--stage 2 --help: its flags)")
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = parser_for(argv)
    args = parser.parse_args(argv)
    if args.stage == 2:
        return stage2(parser, args)
    return stage1(parser, args) if args.model_path is None else adopt(parser, args)


def stage1(parser: flags.Parser, args: argparse.Namespace) -> int:
    """Train the classifier, then write the CAMs."""
    if args.long_side and args.long_side[0] > args.long_side[1]:
        parser.error(f"argument --long_side: its minimum {args.long_side[0]} is above its maximum {args.long_side[1]}")
    flags.resolve(parser, args, names=flags.OPENING)
    dataset = open_split(DataConfig.of(vars(args)))
    args.split = dataset.split
    from src import start, train
    from src.seeds import seed_class
    from src.training.resume import check_run_dir, resumed
    args.pretrained = start.settled_pretrained(args.pretrained, args.backbone or parser.flags["backbone"])
    args.method = args.method or flags.default_method(args.pretrained)
    args.head_only = args.method == "mixture" if args.head_only is None else args.head_only
    if args.head_only:
        unused = ("cutmix", "long_side", *("bn",) * (args.bn == "train"))
        flags.refuse_unused(parser, args, unused, "the classifier's head is fitted and nothing is trained, by "
                            f"--head_only or --method {args.method}; leave it out, or pass --method cam to train")
    _refuse_other_methods(parser, args)
    flags.resolve(parser, args)
    start.check_network(args)
    seed, backbone = seed_class(args.method), BackboneConfig.of(vars(args))
    settings = seed.Settings.of(vars(args))
    args.freeze = train.settled_freeze(seed, settings, backbone, args.pretrained, args.freeze, args.accumulate,
                                       args.head_only)
    args.output_dir = args.output_dir or str(run_dir("stage1", args.backbone))
    state = BEST if args.head_only else NEWEST
    check_run_dir(args.output_dir, args.resume, args.overwrite, state)
    if not args.resume:
        check_free(args.cam_dir, "cam", args.overwrite)
    args.labels = start.settled_labels(args.labels, dataset, default="gt")
    train.check_labelled(dataset)
    machine = start.machine_of(args)
    if args.resume:
        resumed(Path(args.output_dir) / state, "stage1", vars(args))
    if start.begin("Step 1", args, machine, dataset):
        plan = train.ClassifierPlan(backbone, args.pretrained, TrainConfig.of(vars(args)), seed, settings,
                                    MapConfig.of(vars(args)), args.long_side, args.head_only)
        train.run_stage1(dataset, plan, machine, Path(args.output_dir), Path(args.cam_dir), vars(args))
    return 0


def _refuse_other_methods(parser: flags.Parser, args: argparse.Namespace) -> None:
    """A parser's error for flags of a seed method other than --method."""
    own = SEED_FLAGS.get(args.method, {})
    for method, other in SEED_FLAGS.items():
        flags.refuse_unused(parser, args, (name for name in other if name not in own),
                            f"of --method {method}, and this is --method {args.method}; leave it out, or pass --method "
                            f"{method}")


def adopt(parser: flags.Parser, args: argparse.Namespace) -> int:
    """Take the classifier at --model_path as it is, and write the CAMs."""
    unused = ("cutmix", "long_side", *(name for own in SEED_FLAGS.values() for name in own))
    flags.refuse_unused(parser, args, unused, "--model_path takes a classifier as it is and trains nothing; leave one "
                        "of them out")
    args.model_path = chosen_checkpoint(args.model_path, "stage1")
    from models.weights import load_model
    from src import start, train
    from src.inference import cam_folder
    from src.pipeline import Pipeline
    from src.records import built_with, with_classes
    payload = load_model(args.model_path, steps=("stage1",))
    built = built_with(payload["networks"]["classifier"], vars(args), args.model_path)
    made_by = payload["options"].get("method")
    if made_by is not None and args.method not in (None, made_by):
        raise UserError(f"{args.model_path} was made by --method {made_by}, not {args.method}; leave --method out")
    flags.resolve(parser, args, {**payload["options"], **built}, args.model_path, (*INHERITED, "method"))
    args.output_dir = args.output_dir or str(run_dir("stage1", args.backbone))
    dataset = open_split(DataConfig.of(vars(args)))
    args.split = dataset.split
    args.labels = start.settled_labels(args.labels, dataset)
    payload = with_classes(payload, dataset, args.model_path)
    machine, path = start.machine_of(args), Path(args.output_dir) / BEST
    train.check_adopted(payload, path)
    pipeline = Pipeline(payload, MapConfig.of(vars(args)), WalkConfig(), machine)
    folder = cam_folder(args.cam_dir, pipeline, args.overwrite)
    folder.check(dataset)
    if start.begin("Step 1", args, machine, dataset):
        train.adopt_classifier(payload, pipeline, path, dataset, folder, vars(args))
    return 0


def stage2(parser: flags.Parser, args: argparse.Namespace) -> int:
    """Make affinity labels and train AffinityNet."""
    args.cam_dir = args.cam_dir or parser.flags["cam_dir"]
    manifest = read_manifest(args.cam_dir, "cam")
    flags.resolve(parser, args, manifest["options"], args.cam_dir, INHERITED)
    if args.alpha_low > args.alpha_high:
        parser.error(f"argument --alpha_low: {args.alpha_low:g} is above --alpha_high, {args.alpha_high:g}")
    dataset = open_split(DataConfig.of(vars(args)))
    args.split = dataset.split
    from models.weights import load_model
    from src import start, train
    from src.masks import LabelConfig, check_cams, missing
    from src.records import check_same_classifier, with_classes
    from src.training.resume import check_run_dir, resumed
    classifier = load_model(args.model_path, steps=("stage1",))
    args.pretrained = args.pretrained or args.model_path
    check_same_classifier(classifier, manifest, args.model_path, args.cam_dir)
    # Not flags of this stage, but of its record: step 3 inherits them, so that these CAMs fit its options.
    made_with = manifest["options"]
    args.scales, args.flip, args.alternate = (made_with.get(name) for name in ("scales", "flip", "alternate"))
    args.method = made_with.get("method")  # whose defaults hold for the masks too
    start.check_network(args)
    args.output_dir = args.output_dir or str(run_dir("stage2", args.backbone))
    check_run_dir(args.output_dir, args.resume, args.overwrite)
    crf = start.settled_crf(args, always=True)
    args.crf_backend = crf.backend
    classifier = with_classes(classifier, dataset, args.model_path)
    dataset = made_of(dataset, args.cam_dir)
    check_data(dataset, manifest, args.cam_dir)
    machine = start.machine_of(args)
    plan = train.AffinityPlan(BackboneConfig.of(vars(args)), args.pretrained, TrainConfig.of(vars(args)),
                              LabelConfig(args.alpha_low, args.alpha_high, crf, args.max_size), args.radius,
                              Path(args.cam_dir))
    if args.resume:
        resumed(Path(args.output_dir) / NEWEST, "stage2", vars(args))
    labels = train.label_folder(plan, Path(args.output_dir), args.overwrite)
    labels.check(dataset)
    check_cams(args.cam_dir, dataset.ids if args.overwrite else missing(labels.path, dataset.ids))
    if start.begin("Step 2", args, machine, dataset):
        train.run_stage2(dataset, classifier["networks"]["classifier"], plan, machine, Path(args.output_dir),
                         vars(args))
    return 0


if __name__ == "__main__":
    run_main(main)
