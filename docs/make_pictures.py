"""Draw the pictures of docs/method.md: toy images, and what each stage of the pipeline makes of them.

    python -m docs.make_pictures output/demo/stage2/model_best.pth.tar

Reads a stage-2 checkpoint of `make demo`; writes method-*.png to --output_dir. The images are drawn anew by
data/toy_pet.py, from random numbers that no image of the toy dataset was drawn from.

    python -m docs.make_pictures output/stage1_efficientnet_lite2/model_best.pth.tar --photo chelsea.png --label Bengal

makes the front page's picture, photo.jpg, of a photo with a known class and any checkpoint of step 1 or 2.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.make_toy import BREEDS
from data.toy_pet import BACKGROUND, BORDER, draw_pet
from utils.errors import UserError
from utils.files import atomic_path
from utils.images import read_image
from utils.labels import IGNORE
from utils.runtime import run_main
from utils.visualize import heatmap, overlay, overlay_mask, panel

if TYPE_CHECKING:
    from src.pipeline import Cam, Pipeline

SIZE, HEIGHT = 128, 128  # mean side of an image as in `make demo`; height of a picture in a panel, in pixels
PHOTO_HEIGHT = 280
DARK, TINT = (20, 22, 30), (255, 0, 170)  # of the front page's mask
OWN_DRAW = 2  # the toy dataset draws from (seed, 0 or 1, index)
COLOURS = 255  # of a PNG: a palette takes a third of the bytes of full colour
WALK = {"bg_alpha": 8.0, "walk_steps": 16, "crf_preset": "psa"}  # as in benchmarks/demo.py, as are the next
ALPHAS, LABEL_PRESET = (6.0, 32.0), "irn"
BLEND = 0.6  # weight of a heat map over its photo
Picture = np.ndarray  # uint8 (H, W, 3)


class Drawing(NamedTuple):
    """image: uint8 (H, W, 3).  truth: uint8 (H, W), 0 background, class + 1, 255 border.  breed: its class name."""
    image: np.ndarray
    truth: np.ndarray
    breed: str

    def pixel(self) -> tuple[int, int]:
        """(x, y) of the pixel of the pet that is nearest to the middle of the pet."""
        pet = np.argwhere((self.truth > 0) & (self.truth != IGNORE))
        y, x = pet[((pet - pet.mean(axis=0)) ** 2).sum(axis=1).argmin()]
        return int(x), int(y)


def draw(classes: Sequence[str], indices: Sequence[int]) -> list[Drawing]:
    """A drawing for each index.  classes: of the checkpoint, names of `data.make_toy.BREEDS`; they take turns."""
    patterns = {breed.name: breed.pattern for breed in BREEDS}
    if not set(classes) <= set(patterns):
        raise UserError(f"the checkpoint's classes are {', '.join(classes[:4])} ..., not toy breeds; pass a checkpoint "
                        "of make demo: output/demo/stage2/model_best.pth.tar")
    drawn = []
    for index in indices:
        number = index % len(classes)
        image, trimap = draw_pet(np.random.default_rng([0, OWN_DRAW, index]), patterns[classes[number]], SIZE)
        truth = np.where(trimap == BACKGROUND, 0, np.where(trimap == BORDER, IGNORE, number + 1)).astype(np.uint8)
        drawn.append(Drawing(image, truth, classes[number]))
    return drawn


def heat(image: np.ndarray, values: np.ndarray) -> Picture:
    """A map (h, w) in [0, 1] as a heat map over its image."""
    from utils.grids import resize_maps
    return overlay(image, heatmap(resize_maps(values[None], image.shape[:2])[0]), BLEND)


def plain_cam(pipeline: Pipeline, image: np.ndarray, cam: Cam) -> np.ndarray:
    """The plain CAMs (K, h, w) of the checkpoint's classifier, on the grid of `cam`: what --method cam would give."""
    import torch

    from src.seeds.cam import Seed
    plain, classifier, views = Seed(), pipeline.classifier, []
    with torch.no_grad():
        for view in pipeline.cam_views()(image):
            features = classifier.backbone(view[None].to(pipeline.machine.device))
            views.append(plain.maps(classifier, features, classifier.cam(features), view[None]))
    return plain.merge(views, cam.keys, cam.maps.shape[1:])


def seed_row(pipeline: Pipeline, one: Drawing) -> dict[str, Picture]:
    """Photo, CAM, the seed's class map."""
    cam = pipeline.cam(one.image, [one.breed])
    return {"photo": one.image, "CAM": heat(one.image, plain_cam(pipeline, one.image, cam)[0]),
            "mixture's class map": heat(one.image, cam.maps[0])}


def affinity_row(pipeline: Pipeline, one: Drawing) -> dict[str, Picture]:
    """Confident pseudo-labels, the affinity of a pixel, and its power beta."""
    from src.affinity_maps import picture, place, walk_vector
    from src.masks import LabelConfig, affinity_label
    from utils.crf import CRF, PRESETS, settle_backend
    cam = pipeline.cam(one.image, [one.breed])
    crf = CRF(PRESETS[LABEL_PRESET], settle_backend("auto"), "cpu")
    how = LabelConfig(*ALPHAS, crf, pipeline.maps.max_size)
    label = affinity_label(one.image, cam.keys, cam.maps, how)
    vector = walk_vector(pipeline, one.image, place(one.pixel(), one.image.shape[:2]))
    beta = pipeline.walk_config.beta
    return {"affinity labels": overlay_mask(one.image, label),
            "affinity of +": picture(one.image, vector, one.pixel()),
            f"affinity ^ {beta:g}": picture(one.image, vector ** beta, one.pixel())}


def mask_row(pipeline: Pipeline, one: Drawing) -> dict[str, Picture]:
    """Foreground probability before and after the walk, masks without and with the CRF, ground truth."""
    from utils.maps import with_background
    cam = pipeline.cam(one.image, [one.breed])
    before = with_background(cam.maps, pipeline.walk_config.bg_alpha)
    return {"before the walk": heat(one.image, before[1]),
            "after the walk": heat(one.image, pipeline.walk(one.image, cam)[1]),
            "mask without CRF": overlay_mask(one.image, pipeline.mask(one.image, [one.breed], crf=None)),
            "mask with CRF": overlay_mask(one.image, pipeline.mask(one.image, [one.breed])),
            "ground truth": overlay_mask(one.image, one.truth)}


def photo_row(pipeline: Pipeline, image: np.ndarray, label: str) -> dict[str, Picture]:
    """Photo, CAM, the seed's class map, and the mask after the CRF."""
    cam = pipeline.cam(image, [label])
    return {f'photo + label "{label}"': image, "CAM (baseline)": heat(image, plain_cam(pipeline, image, cam)[0]),
            "class map of the mixture": heat(image, cam.maps[0]),
            "mask": spotlight(image, pipeline.mask(image, [label]))}


def spotlight(image: np.ndarray, mask: np.ndarray) -> Picture:
    """An image whose background is dimmed, its objects tinted and outlined: seen on fur of any colour."""
    dimmed = overlay(image, DARK, 0.8 * (mask == 0))
    return overlay_mask(overlay(dimmed, TINT, 0.35 * (mask > 0)), mask, alpha=0.0)


PANELS = {"method-seed": seed_row, "method-affinity": affinity_row, "method-mask": mask_row}


def save(path: Path, rows: Sequence[dict[str, Picture]]) -> None:
    """Write rows of pictures by title as one PNG of at most COLOURS colours."""
    drawn = panel([list(row.values()) for row in rows], list(rows[0]), height=HEIGHT)
    with atomic_path(path) as temporary:
        drawn.quantize(COLOURS, dither=0).save(temporary, format="PNG", optimize=True)


def save_photo(path: Path, row: dict[str, Picture]) -> None:
    """Write a row of pictures by title as a JPEG."""
    with atomic_path(path) as temporary:
        panel([list(row.values())], list(row), height=PHOTO_HEIGHT).save(temporary, format="JPEG", quality=88)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.make_pictures", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="model_best.pth.tar of stage 2 on toy data")
    parser.add_argument("--output_dir", type=Path, default=Path("docs/images"), help="folder of the pictures "
                                                                                     "(default: docs/images)")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 7, 4], metavar="N",
                        help="numbers of the drawings, from 0, one a row (default: 1 7 4)")
    parser.add_argument("--photo", type=Path, help="make photo.jpg of this photo instead (default: none)")
    parser.add_argument("--label", help="class of the photo, a name that the checkpoint knows")
    args = parser.parse_args(argv)
    if (args.photo is None) != (args.label is None):
        parser.error("--photo and --label belong together; pass both or neither")
    if min(args.images) < 0:
        parser.error(f"--images {min(args.images)}: pass numbers from 0")
    from src.pipeline import Pipeline
    if args.photo is not None:
        row = photo_row(Pipeline.load(args.checkpoint, precision="fp32"), read_image(args.photo), args.label)
        save_photo(args.output_dir / "photo.jpg", row)
        print(f"Wrote {args.output_dir / 'photo.jpg'}")
        return
    pipeline = Pipeline.load(args.checkpoint, precision="fp32", **WALK)
    drawings = draw(pipeline.classes, args.images)
    for name, row in PANELS.items():
        path = args.output_dir / f"{name}.png"
        save(path, [row(pipeline, one) for one in drawings])
        print(f"Wrote {path} ({path.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    run_main(main)
