"""Step 5: train DeepLabV1 on pseudo-masks (--mask_dir FOLDER), or on ground truth for comparison (--mask_dir gt).

Reads images and the masks of step 3 (default output/inference), whose record tells the dataset, or masks made
elsewhere (<image_id>.png of class indices), with --dataset and --data_root; writes output/deeplab_<backbone>/.
"""
from pathlib import Path

from utils import options as flags
from utils import recipes
from utils.config import BackboneConfig, DataConfig, TrainConfig
from utils.datasets import open_split
from utils.runtime import run_main
from utils.store import NEWEST, check_data, made_of, mask_record, run_dir

NAMES = (*flags.DATA, "mask_dir", "head", *flags.BACKBONE, *flags.TRAINING, "output_dir", "overwrite", *flags.MACHINE)
DEFAULTS = {"backbone": "resnet38", "mask_dir": "output/inference", "output_stride": 8}
INHERITED = (*flags.DATA, "max_size", "crop_size", "precision", "seed")


def build_parser() -> flags.Parser:
    """The parser of this step."""
    return flags.Parser(__doc__, NAMES, "deeplab", recipes.DEEPLAB_TRAINING, **DEFAULTS)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    parser.settle_head(args.head or parser.flags["head"])
    args.mask_dir = args.mask_dir or DEFAULTS["mask_dir"]
    manifest = None if args.mask_dir == "gt" else mask_record(args.mask_dir)
    flags.resolve(parser, args, manifest and manifest["options"], args.mask_dir, INHERITED)
    dataset = open_split(DataConfig.of(vars(args)))
    args.split = dataset.split
    from src import segment, start
    from src.records import check_classes
    from src.training.resume import check_run_dir, resumed
    args.pretrained = start.settled_pretrained(args.pretrained, args.backbone)
    start.check_network(args)
    args.output_dir = args.output_dir or str(run_dir("deeplab", args.backbone))
    check_run_dir(args.output_dir, args.resume, args.overwrite)
    if manifest is not None:
        check_classes(dataset, manifest["classes"], args.mask_dir)
        check_data(dataset, manifest, args.mask_dir)
        dataset = made_of(dataset, args.mask_dir)
    read = segment.mask_reader(dataset, args.mask_dir)
    machine, masks = start.machine_of(args), segment.mask_hash(dataset, args.mask_dir)
    if args.resume:
        resumed(Path(args.output_dir) / NEWEST, "deeplab", vars(args), masks)
    if start.begin("Step 5", args, machine, dataset):
        plan = segment.DeepLabPlan(BackboneConfig.of(vars(args)), args.pretrained, TrainConfig.of(vars(args)),
                                   args.head, read, masks)
        best = segment.run_training(dataset, plan, machine, Path(args.output_dir), vars(args))
        print(f"Wrote {best}")
    return 0


if __name__ == "__main__":
    run_main(main)
