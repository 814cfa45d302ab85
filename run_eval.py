"""Step 4: score masks against ground truth: seed (CAM), + walk, + CRF of a checkpoint, or any folder of masks.

Reads a stage-2 checkpoint (--model_path; of a stage-1 one the seed is scored) or a folder of PNG masks (--mask_dir),
and a split with ground truth; writes scores.json, thresholds.png, classes.png, panel.png, panel_worst.png and
report.html to --output_dir (default output/eval).
"""
from pathlib import Path

from utils import options as flags
from utils.config import DataConfig, MapConfig, WalkConfig
from utils.datasets import open_split
from utils.runtime import run_main
from utils.store import check_data, chosen_checkpoint, made_of, mask_record

NAMES = ("model_path", "mask_dir", *flags.DATA, *flags.MAPS, *flags.WALK, "crf", *flags.CRF, "max_size", "cam_dir",
         "output_dir", "overwrite", "report", "show_affinity", *flags.MACHINE)
INHERITED = (*flags.DATA, "scales", "flip", "alternate", "max_size", "radius", "precision", "cam_dir")
OF_NETWORKS = ("scales", "flip", "alternate", *flags.WALK, "crf", *flags.CRF, "cam_dir")  # which make the masks
OF_MASKS = ("labels", "bg_alpha", "beta", "walk_steps", "walk_eps")  # inherited from masks, whose scores are asked for


def build_parser() -> flags.Parser:
    """The parser of this step."""
    return flags.Parser(__doc__, NAMES, "masks", output_dir="output/eval", crf_preset="mctformer",
                        model_path="output/stage2_resnet50/model_best.pth.tar")


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.mask_dir and args.show_affinity:
        parser.error("--show_affinity needs networks, and --mask_dir has none; pass --model_path instead of --mask_dir")
    if args.mask_dir and args.model_path:
        parser.error("--mask_dir scores masks as they are and --model_path makes them; pass one of them")
    payload, manifest, crf = None, None, None
    if args.mask_dir:
        flags.refuse_unused(parser, args, OF_NETWORKS, "--mask_dir scores masks as they are; leave one of them out")
        manifest = mask_record(args.mask_dir)
        made_by = (manifest["options"], args.mask_dir) if manifest else (None, None)
        flags.resolve(parser, args, *made_by, (*INHERITED, *OF_MASKS))
    else:
        args.model_path = chosen_checkpoint(args.model_path, "stage2", parser.flags["model_path"])
        from src.records import open_checkpoint
        payload = open_checkpoint(args.model_path, args.cam_dir or parser.flags["cam_dir"], ("stage1", "stage2"))
        flags.resolve(parser, args, payload["options"], args.model_path, INHERITED)
    dataset = open_split(DataConfig.of(vars(args)))
    args.split = dataset.split
    from src import eval as evaluation
    from src import start
    from src.affinity_maps import show_affinity, shown_images
    from src.inference import SplitScores
    from src.masks import MaskConfig, check_complete, decodable
    from src.pipeline import Pipeline
    from src.records import check_classes, with_classes
    if manifest:
        check_classes(dataset, manifest.get("classes", dataset.classes), args.mask_dir)
        check_data(dataset, manifest, args.mask_dir)
    if args.mask_dir:
        dataset = made_of(dataset, args.mask_dir)
        dataset = decodable(dataset) if args.on_bad_image == "skip" else dataset
        check_complete(args.mask_dir, dataset.ids)
        args.model_path = None
    else:
        payload = with_classes(payload, dataset, args.model_path)
        crf = start.settled_crf(args)
        args.crf_backend = args.crf_backend if crf is None else crf.backend
    args.labels = start.settled_labels(args.labels, dataset)
    dataset.check_truth()
    shown = shown_images(args.show_affinity, dataset, skip_bad=args.on_bad_image == "skip")
    machine = start.machine_of(args)
    if payload:
        pipeline = Pipeline(payload, MapConfig.of(vars(args)), WalkConfig.of(vars(args)), machine)
        scores = SplitScores(pipeline, dataset, start.places_of(args, payload))
        scores.check()
    if not start.begin("Step 4", args, machine, dataset):
        return 0
    record = start.record_of(args, machine)
    if payload:
        scores.make(record)
        stages = evaluation.stages_of(scores, crf is not None)
    else:
        stages = [evaluation.Stage("masks", "mask", Path(args.mask_dir))]
    evaluation.evaluate(dataset, stages, MaskConfig(crf, args.max_size, args.bg_threshold), machine.workers,
                        Path(args.output_dir), vars(args), record if args.report else None)
    if shown:
        show_affinity(pipeline, shown, args.show_affinity, Path(args.output_dir) / "affinity")
    return 0


if __name__ == "__main__":
    run_main(main)
