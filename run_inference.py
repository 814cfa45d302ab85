"""Step 3: make pseudo-masks. CAM -> random walk -> dense CRF -> palette PNG, for a split or for any image.

Reads images and a checkpoint of stage 2, or of stage 1, and then there is no walk; writes <image_id>.png and
manifest.json to --output_dir (default output/inference). CAMs and walked scores are kept beside the checkpoint and used
again. With --images PATH (an image or a folder) no dataset is needed: labels are predicted, and a mask and an overlay
of every image are written to --output_dir (then by default output/images).
"""
from pathlib import Path

from utils import options as flags
from utils.config import DataConfig, MapConfig, WalkConfig
from utils.datasets import open_split
from utils.errors import UserError
from utils.runtime import run_main
from utils.store import chosen_checkpoint

NAMES = ("model_path", *flags.DATA, "images", *flags.MAPS, *flags.WALK, "crf", *flags.CRF, "max_size", "cam_dir",
         "output_dir", "overwrite", "save_overlays", "save_walk", "show_affinity", "export", *flags.MACHINE)
INHERITED = (*flags.DATA, "scales", "flip", "alternate", "max_size", "radius", "precision", "cam_dir")


def build_parser() -> flags.Parser:
    """The parser of this step."""
    return flags.Parser(__doc__, NAMES, "masks", output_dir=None, crf_preset="mctformer",
                        model_path="output/stage2_resnet50/model_best.pth.tar")


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.images is not None and args.labels == "gt":
        parser.error("--images has no labels to go by; leave --labels out")
    if args.images is not None:
        flags.refuse_unused(parser, args, flags.CHOICE, flags.NO_CHOICE)
    args.model_path = chosen_checkpoint(args.model_path, "stage2", parser.flags["model_path"])
    from src import inference, start
    from src.affinity_maps import show_affinity, shown_images
    from src.export import check_exports, export_images, export_split
    from src.masks import MaskConfig
    from src.pipeline import Pipeline
    from src.records import open_checkpoint, with_classes
    payload = open_checkpoint(args.model_path, args.cam_dir or parser.flags["cam_dir"], ("stage2", "stage1"))
    walked = "affinity" in payload["networks"]
    if args.save_walk and not walked:
        raise UserError(f"{args.model_path} has no AffinityNet to walk with; leave --save_walk out, or pass a "
                        "checkpoint of stage 2")
    flags.resolve(parser, args, payload["options"], args.model_path, INHERITED)
    args.output_dir = args.output_dir or ("output/inference" if args.images is None else "output/images")
    args.crop_size = payload["options"].get("crop_size")  # no flag of this step, but of its record: step 5 inherits it
    crf = start.settled_crf(args)
    args.crf_backend = args.crf_backend if crf is None else crf.backend
    dataset, paths, out = None, None, Path(args.output_dir)
    if args.images is not None:
        args.labels = "predicted"
        paths = inference.list_images(Path(args.images))
        inference.check_results(paths, out)
    else:
        dataset = open_split(DataConfig.of(vars(args)))
        args.split = dataset.split
        payload = with_classes(payload, dataset, args.model_path)
        args.labels = start.settled_labels(args.labels, dataset)
    shown = shown_images(args.show_affinity, dataset, paths, args.on_bad_image == "skip")
    machine = start.machine_of(args)
    pipeline = Pipeline(payload, MapConfig.of(vars(args)), WalkConfig.of(vars(args)), machine)
    how = MaskConfig(crf, args.max_size, args.bg_threshold, None if walked else args.bg_alpha)
    if dataset is not None:
        scores = inference.SplitScores(pipeline, dataset, start.places_of(args, payload))
        folder = inference.mask_folder(out, scores.last, how, args.overwrite)
        scores.check()
        folder.check(dataset)
    check_exports(args.export, out, pipeline.classes, paths or ())
    if not start.begin("Step 3", args, machine, dataset):
        return 0
    if shown:
        show_affinity(pipeline, shown, args.show_affinity, out / "affinity")
    if dataset is None:
        made = inference.run_images(pipeline, paths, out, how, args.save_walk)
        export_images(args.export, out, pipeline.classes, made)
    else:
        extras = [name for name, wanted in (("overlays", args.save_overlays), ("walks", args.save_walk)) if wanted]
        inference.run(scores, folder, how, start.record_of(args, machine), extras)
        export_split(args.export, out, folder.path, dataset)
    return 0


if __name__ == "__main__":
    run_main(main)
