"""Step 6: test a DeepLab checkpoint with several scales, flip and dense CRF.

Reads output/deeplab_<backbone>/model_best.pth.tar (the newest, or --model_path) and a split (default: the test split);
writes masks/, scores.json, plots and panels to --output_dir (default output/deeplab_test).
"""
from utils import options as flags
from utils import recipes
from utils.runtime import run_main

NAMES = ("model_path", *flags.DATA, *flags.MAPS, "merge", "bg_threshold", "crf", *flags.CRF, "max_size", "output_dir",
         *flags.MACHINE)
INHERITED = ("dataset", "data_root", "difficult", "max_size", "precision")


def main(argv=None):
    parser = flags.Parser(__doc__, NAMES, recipes.DEEPLAB, recipes.DEEPLAB_TEST, output_dir="output/deeplab_test")
    parser.add_argument("--save_overlays", action="store_true", help="also write the masks laid over the images")
    parser.add_argument("--submission", metavar="FILE.tgz", help="also pack the masks of --dataset voc --split test (or "
                        "val) for the VOC evaluation server")
    args = parser.parse_args(argv)
    from models.weights import load_model
    from src import segment
    from src.records import settle_classes
    from src.start import begin, open_split, settle_crf, settle_labels
    from src.submission import check_submission, write_submission
    args.model_path = args.model_path or segment.newest_checkpoint()
    payload = load_model(args.model_path, steps=("deeplab",))
    parser.settle_head(payload["networks"]["deeplab"].get("head", "seamv1"))
    flags.resolve(parser, args, payload["options"], args.model_path, INHERITED)
    settle_crf(args)
    args.split = args.split or recipes.TEST_SPLITS.get(args.dataset)
    if args.submission is not None:
        check_submission(args.submission, args)
    dataset = open_split(args)
    settle_classes(payload, dataset, args.model_path)
    settle_labels(args, dataset, default="predicted")
    device = begin("Step 6", args, dataset)
    if args.dry_run:
        return 0
    mask_dir = segment.run_test(payload, dataset, vars(args), device)
    if args.submission is not None:
        write_submission(args.submission, mask_dir, dataset)
    return 0


if __name__ == "__main__":
    run_main(main)
