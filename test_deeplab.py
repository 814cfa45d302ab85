"""Step 6: test a DeepLab checkpoint with several scales, flip and dense CRF.

Reads output/deeplab_<backbone>/model_best.pth.tar (the newest, or --model_path) and a split (default: the test split);
writes masks/, scores.json, plots and panels to --output_dir (default output/deeplab_test).
"""
from utils import options as flags
from utils.runtime import run_main

NAMES = ("model_path", *flags.DATA, *flags.MAPS, "bg_threshold", "crf", "crf_preset", "max_size", "output_dir",
         *flags.MACHINE)
DEFAULTS = {"scales": (0.5, 0.75, 1.0, 1.25, 1.5), "output_dir": "output/deeplab_test", "crf_preset": "seamv1"}
INHERITED = ("dataset", "data_root", "max_size", "precision")


def main(argv=None):
    parser = flags.Parser(__doc__, NAMES, **DEFAULTS)
    parser.add_argument("--save_overlays", action="store_true", help="also write the masks laid over the images")
    args = parser.parse_args(argv)
    from src import segment
    from src.inference import check_classes
    from src.start import begin, open_split
    from utils.checkpoint import load_checkpoint
    args.model_path = args.model_path or segment.newest_checkpoint()
    payload = load_checkpoint(args.model_path, steps=("deeplab",))
    flags.resolve(parser, args, payload["options"], args.model_path, INHERITED)
    args.split = args.split or {"pet": "test"}.get(args.dataset)
    dataset = open_split(args)
    check_classes(dataset, payload["classes"], args.model_path)
    args.labels = args.labels or "predicted"
    device = begin("Step 6", args, dataset)
    if args.dry_run:
        return 0
    segment.run_test(payload, dataset, vars(args), device)
    return 0


if __name__ == "__main__":
    run_main(main)
