"""Step 3: make pseudo-masks. CAM -> random walk -> dense CRF -> palette PNG, for a split or for any image.

Reads a stage-2 checkpoint and images; writes <image_id>.png and manifest.json to --output_dir (default
output/inference). CAMs and walked scores are kept beside the checkpoint and used again. With --images PATH (an image
or a folder) no dataset is needed: labels are predicted, and an overlay is written beside every mask.
"""
from pathlib import Path

from utils import options as flags
from utils import recipes
from utils.runtime import run_main

NAMES = ("model_path", *flags.DATA, *flags.MAPS, *flags.WALK, "crf", *flags.CRF, "max_size", "cam_dir", "output_dir",
         *flags.MACHINE)
INHERITED = (*flags.DATA, "scales", "flip", "max_size", "radius", "precision", "cam_dir")


def build_parser():
    parser = flags.Parser(__doc__, NAMES, recipes.MASKS, output_dir="output/inference", crf_preset="mctformer",
                          model_path="output/stage2_resnet50/model_best.pth.tar")
    parser.add_argument("--images", metavar="PATH", help="an image or a folder of images, instead of a dataset's split")
    parser.add_argument("--save_overlays", action="store_true", help="also write the masks laid over the images")
    parser.add_argument("--save_walk", action="store_true",
                        help="also write the propagation of up to 8 images as animated GIFs to <output_dir>/walks")
    flags.add_show_affinity(parser)
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    from src import inference
    from src.affinity_maps import show_affinity, shown_images
    from src.records import open_checkpoint, settle_classes
    from src.start import begin, open_split, settle_crf, settle_labels
    payload, args.model_path = open_checkpoint(args.model_path, parser.flags["model_path"],
                                               args.cam_dir or parser.flags["cam_dir"])
    flags.resolve(parser, args, payload["options"], args.model_path, INHERITED)
    settle_crf(args)
    args.crop_size = payload["options"].get("crop_size")  # no flag of this step, but of its record: step 5 inherits it
    if args.images is not None:
        if args.labels == "gt":
            parser.error("--images has no labels to go by; leave --labels out")
        args.labels = "predicted"
        dataset, paths = None, inference.list_images(Path(args.images))
    else:
        dataset, paths = open_split(args), None
        settle_classes(payload, dataset, args.model_path)
        settle_labels(args, dataset)
    shown = shown_images(args.show_affinity, dataset, paths)
    device = begin("Step 3", args, dataset)
    if args.dry_run:
        return 0
    if dataset is None:
        inference.run_images(payload, paths, vars(args), device)
    else:
        inference.run(payload, dataset, vars(args), device)
    if shown:
        show_affinity(payload, shown, args.show_affinity, vars(args), device)
    return 0


if __name__ == "__main__":
    run_main(main)
