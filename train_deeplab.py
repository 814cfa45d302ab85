"""Step 5: train DeepLabV1 on pseudo-masks (--mask_dir FOLDER), or on ground truth for comparison (--mask_dir gt).

Reads images and the masks of step 3 (default output/inference), whose record tells the dataset; writes
output/deeplab_<backbone>/.
"""
from utils import options as flags
from utils import recipes
from utils.runtime import run_main

NAMES = (*flags.DATA, "mask_dir", "head", *flags.TRUNK, *flags.TRAINING, "output_dir", *flags.MACHINE)
DEFAULTS = {"backbone": "resnet38", "mask_dir": "output/inference", "output_stride": 8}
INHERITED = (*flags.DATA, "max_size", "crop_size", "precision", "seed")


def main(argv=None):
    parser = flags.Parser(__doc__, NAMES, recipes.DEEPLAB, recipes.DEEPLAB_TRAINING, **DEFAULTS)
    args = parser.parse_args(argv)
    parser.settle_head(args.head or parser.flags["head"])
    from models.weights import check_pretrained
    from src import segment
    from src.records import check_classes
    from src.start import begin, open_split
    from utils.artifacts import made_of, read_manifest, run_dir
    args.mask_dir = args.mask_dir or DEFAULTS["mask_dir"]
    if args.mask_dir == "gt":
        flags.resolve(parser, args)
        manifest = None
    else:
        manifest = read_manifest(args.mask_dir, "mask")
        flags.resolve(parser, args, manifest["options"], args.mask_dir, INHERITED)
    check_pretrained(args.pretrained, args.backbone, args.width)
    args.output_dir = args.output_dir or str(run_dir("deeplab", args.backbone))
    dataset = open_split(args)
    if manifest is not None:
        check_classes(dataset, manifest["classes"], args.mask_dir)
        dataset = made_of(dataset, args.mask_dir)
    read = segment.mask_reader(dataset, args.mask_dir)
    device = begin("Step 5", args, dataset)
    if args.dry_run:
        return 0
    best = segment.run_training(dataset, read, vars(args), device)
    print(f"Wrote {best}")
    return 0


if __name__ == "__main__":
    run_main(main)
