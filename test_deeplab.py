"""Step 6: test a DeepLab checkpoint with several scales, flip and dense CRF.

Reads output/deeplab_<backbone>/model_best.pth.tar (the newest, or --model_path) and a split (default: the test split);
writes masks/, scores.json, plots, panels and report.html to --output_dir (default output/deeplab_test). With --images
PATH (an image or a folder) no dataset is needed: a mask and an overlay of every image are written (by default to
output/images).
"""
from pathlib import Path

from utils import options as flags
from utils import recipes
from utils.config import DataConfig, MapConfig
from utils.datasets import DATASETS, open_split
from utils.errors import UserError
from utils.runtime import run_main
from utils.store import chosen_checkpoint

NAMES = ("model_path", *flags.DATA, "images", *flags.MAPS, "merge", "bg_threshold", "crf", *flags.CRF, "max_size",
         "output_dir", "overwrite", "save_overlays", "report", "submission", "export", *flags.MACHINE)
INHERITED = ("dataset", "data_root", "difficult", "max_size", "precision")


def build_parser() -> flags.Parser:
    """The parser of this step."""
    return flags.Parser(__doc__, NAMES, "deeplab", recipes.DEEPLAB_TEST, output_dir=None)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.images is not None and (args.labels == "gt" or args.submission is not None):
        parser.error("--images has no labels to go by, and is no split; leave --labels and --submission out")
    if args.images is not None and args.report:
        parser.error("--report is of a split, and --images is none; leave --report out")
    if args.images is not None:
        flags.refuse_unused(parser, args, flags.CHOICE, flags.NO_CHOICE)
    args.model_path = chosen_checkpoint(args.model_path, "deeplab")
    from models.weights import load_model
    from src import inference, segment, start
    from src.export import check_exports, export_images, export_split
    from src.masks import MaskConfig
    from src.pipeline import DeepLabPipeline
    from src.records import with_classes
    from src.submission import check_submission, write_submission
    payload = load_model(args.model_path, steps=("deeplab",))
    parser.settle_head(payload["networks"]["deeplab"].get("head", "seamv1"))
    flags.resolve(parser, args, payload["options"], args.model_path, INHERITED)
    args.output_dir = args.output_dir or ("output/deeplab_test" if args.images is None else "output/images")
    args.split = args.split or DATASETS[args.dataset].tested(args.data_root)
    if args.submission is not None:
        check_submission(args.submission, DataConfig.of(vars(args)))
    crf = start.settled_crf(args)
    args.crf_backend = args.crf_backend if crf is None else crf.backend
    machine, how = start.machine_of(args), MaskConfig(crf, args.max_size, args.bg_threshold)
    if args.images is not None:
        paths, args.labels = inference.list_images(Path(args.images)), "predicted"
        inference.check_results(paths, Path(args.output_dir))
        if payload["classes"] is None:
            raise UserError(f"{args.model_path} does not name its classes; test it on a dataset's split")
        pipeline = DeepLabPipeline(payload, MapConfig.of(vars(args)), args.merge, machine)
        check_exports(args.export, Path(args.output_dir), pipeline.classes, paths)
        if start.begin("Step 6", args, machine):
            made = inference.run_images(pipeline, paths, Path(args.output_dir), how)
            export_images(args.export, Path(args.output_dir), pipeline.classes, made)
        return 0
    dataset = open_split(DataConfig.of(vars(args)))
    args.split = dataset.split
    if dataset.truth is not None:
        dataset.check_truth()
    payload = with_classes(payload, dataset, args.model_path)
    args.labels = start.settled_labels(args.labels, dataset, default="predicted")
    pipeline = DeepLabPipeline(payload, MapConfig.of(vars(args)), args.merge, machine)
    folders = segment.deeplab_folders(pipeline, Path(args.output_dir), how, args.overwrite)
    for folder in folders:
        folder.check(dataset)
    check_exports(args.export, Path(args.output_dir), dataset.classes)
    if not start.begin("Step 6", args, machine, dataset):
        return 0
    segment.run_test(pipeline, dataset, folders, how, start.record_of(args, machine), args.save_overlays,
                     args.report)
    if args.submission is not None:
        write_submission(args.submission, folders[1].path, dataset)
    export_split(args.export, Path(args.output_dir), folders[1].path, dataset)
    return 0


if __name__ == "__main__":
    run_main(main)
