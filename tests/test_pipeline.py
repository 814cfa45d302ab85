"""Photo to mask in memory: what goes in, what comes out, what is refused, and that the steps' files say the same."""
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from script_runs import ROOT, environment, files, picture
from torch.nn import functional as F

import run_inference
import test_deeplab
from data.make_toy import make_toy
from models.affinitynet import affinity_stencil
from models.weights import build_network, pack, unpack
from src import inference, pipeline, segment, split_map
from src.inference import Places
from src.masks import MaskConfig, decide, full_size
from src.pipeline import Cam, DeepLabPipeline, Pipeline
from src.seeds import attach
from utils.checkpoint import save_checkpoint, save_tensors
from utils.config import DataConfig, MapConfig, WalkConfig
from utils.crf import CRF, PRESETS
from utils.datasets import DATASETS, open_dataset
from utils.errors import UserError
from utils.files import load_cam, load_scores, save_cam, save_scores
from utils.grids import resize_maps
from utils.images import read_image
from utils.labels import read_mask
from utils.maps import with_background
from utils.options import Parser, resolve
from utils.random_walk import half_disc, transition
from utils.recipes import DEEPLAB_TEST

NAMES = ["bullseye_hound", "Crossmark_cat", "dotted_terrier"]
MADE_WITH = {"dataset": "pet", "scales": [0.5, 1.0], "flip": True, "max_size": 96, "radius": 4}
WEAK = {"bg_alpha": 0.3, "walk_steps": 16}  # random networks then find both object and background


def classifier_record(seed="cam"):
    how = {"kind": "classifier", "backbone": "resnet18", "classes": 3}
    network = build_network(**how)
    attach(network, {"name": seed})
    torch.nn.init.normal_(network.head.weight)
    for buffer in network.seed.buffers():
        torch.nn.init.normal_(buffer, std=0.1)
    return pack(network, **how, seed={"name": seed})


def deeplab_record(head="seamv1"):
    how = {"kind": "deeplab", "backbone": "resnet18", "classes": 3, "head": head}
    network = build_network(**how)
    for parameter in network.head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return pack(network, **how)


def save(path, step, options=MADE_WITH, **networks):
    save_checkpoint(path, {"step": step, "options": options, "epoch": 1, "classes": NAMES, "networks": networks})
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Checkpoints of random weights, a toy dataset and a photo."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(4)  # predicts some of the classes, and masks of several
    how = {"kind": "affinity", "backbone": "resnet18"}
    classifier, affinity = classifier_record(), pack(build_network(**how), **how)
    make_toy(folder / "data", train=4, test=1, classes=3, size=64)
    return SimpleNamespace(
        folder=folder, photo=picture(folder / "photo.jpg"),
        data=open_dataset(DataConfig("pet", str(folder / "data"), "trainval")),
        stage1=save(folder / "stage1.pth.tar", "stage1", classifier=classifier),
        stage2=save(folder / "stage2.pth.tar", "stage2", affinity=affinity, classifier=classifier),
        common=save(folder / "common.pth.tar", "stage2", affinity=affinity, classifier=classifier_record("common")),
        deeplab=save(folder / "deeplab.pth.tar", "deeplab", {"dataset": "pet", "max_size": 96},
                     deeplab=deeplab_record()))


@pytest.fixture(scope="module")
def loaded(home):
    return Pipeline.load(home.stage2, "cpu", **WEAK)


PHOTO_TO_MASK = """
from PIL import Image
from src.pipeline import Pipeline

pipeline = Pipeline.load(checkpoint)
mask = pipeline.mask(Image.open(photo))
"""


def test_a_few_lines_lead_from_a_photo_to_a_mask(home):
    names = {"checkpoint": home.stage2, "photo": home.photo}
    exec(PHOTO_TO_MASK, names)
    mask = names["mask"]
    assert len(PHOTO_TO_MASK.strip().splitlines()) <= 10
    assert mask.shape == (50, 61) and mask.dtype == np.uint8 and mask.max() <= 3, (mask.shape, mask.dtype, mask.max())


# --- what goes in --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA"])
def test_an_image_in_memory_gives_what_its_file_gives(loaded, tmp_path, mode):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (12, 15, 3), dtype=np.uint8)).resize((61, 50)).convert(mode)
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(rng.integers(0, 256, (50, 61), dtype=np.uint8)))
    image.save(tmp_path / "image.png")
    pixels = read_image(tmp_path / "image.png")
    expected = loaded.mask(pixels, crf=None)
    for name, one in (("the PIL image", image), ("the file's", Image.open(tmp_path / "image.png"))):
        found = loaded.mask(one, crf=None)
        assert (found == expected).all(), f"{name}: {(found != expected).sum()} pixels differ"
        assert (loaded.cam(one).maps == loaded.cam(pixels).maps).all(), name
    if mode == "L":
        assert (loaded.mask(np.asarray(image), crf=None) == expected).all(), "a grey array"
    assert len(np.unique(expected)) > 1, "the example is flat"


@pytest.mark.parametrize("turn", [3, 6])
def test_a_pil_image_is_masked_as_it_is_displayed_and_an_array_as_it_is(loaded, home, tmp_path, turn):
    stored = Image.open(home.photo)
    exif = stored.getexif()
    exif[ExifTags.Base.Orientation] = turn
    stored.save(tmp_path / "turned.png", exif=exif)
    pixels = read_image(tmp_path / "turned.png", displayed=True)
    expected, cam = loaded.mask(pixels, crf=None), loaded.cam(pixels)
    with Image.open(tmp_path / "turned.png") as opened:
        upright = ImageOps.exif_transpose(opened)
        for name, image in (("the file's", opened), ("one that was turned before", upright)):
            assert (loaded.mask(image, crf=None) == expected).all(), name
            found = loaded.cam(image)
            assert found.size == pixels.shape[:2] and (found.maps == cam.maps).all(), name
            assert (loaded.walk(image, found) == loaded.walk(pixels, cam)).all(), name
        assert loaded.mask(np.asarray(opened), crf=None).shape == (50, 61)
    assert len(np.unique(expected)) > 1, "the example is flat"


@pytest.mark.parametrize("array", [np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3), np.float32),
                                   np.zeros(9, np.uint8)])
def test_arrays_that_are_no_images_are_refused(loaded, array):
    refused(lambda: loaded.mask(array), f"{array.dtype} {array.shape}", "convert it first")


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_labels_are_names_or_numbers_in_any_order(loaded, home):
    image = home.data.image(0)
    for labels in (["dotted_terrier", "bullseye_hound"], [2, 0], (0, "dotted_terrier", 0), np.array([0, 2]),
                   iter(["bullseye_hound", 2])):
        cam = loaded.cam(image, labels)
        assert cam.keys.tolist() == [0, 2] and cam.maps.shape == (2, 18, 19), f"{labels}: {cam.keys}, {cam.maps.shape}"
    mask = loaded.mask(image, ["dotted_terrier", 0], crf=None)
    assert set(np.unique(mask)) == {0, 1, 3}, np.unique(mask)
    assert (loaded.mask(image, "Crossmark_cat", crf=None) == loaded.mask(image, [1], crf=None)).all()


def test_labels_left_out_are_predicted_and_none_at_all_is_background(loaded, home):
    image = home.data.image(0)
    network = unpack(loaded.records["classifier"], attach)
    with torch.no_grad():
        logits = torch.stack([network(one[None])[0] for view in loaded.cam_views()(image)
                              for one in (view, view.flip(-1))]).mean(dim=0)
    keys = loaded.cam(image).keys
    assert keys.tolist() == np.flatnonzero(logits > 0).tolist() and 0 < len(keys) < 3, f"{keys} of {logits}"
    assert (loaded.mask(image, crf=None) == loaded.mask(image, keys, crf=None)).all()
    for crf in (None, "psa"):
        assert not loaded.mask(image, [], crf).any(), "an image of no class has foreground"


@pytest.mark.parametrize("label", ["poodle", 3, -1, 1.5])
def test_unknown_labels_are_refused_with_the_choices(loaded, home, label):
    for pipe in (loaded, DeepLabPipeline.load(home.deeplab, "cpu")):
        refused(lambda: pipe.mask(home.data.image(0), [0, label]), f"no class {label!r}", "Crossmark_cat")


@pytest.mark.parametrize("labels, words", [
    (np.array([False, True, False]), "numpy.flatnonzero(labels)"), ([True, 0], "numpy.flatnonzero(labels)"),
    (torch.tensor([True]), "numpy.flatnonzero(labels)"), (1, "labels is 1; pass a list of names or zero-based numbers"),
    (np.int64(1), "pass a list of names"), (np.array([[0, 1]]), "no class [0, 1]"), ([[0]], "no class [0]")])
def test_labels_that_are_no_list_of_names_and_numbers_are_refused(loaded, home, labels, words):
    for pipe in (loaded, DeepLabPipeline.load(home.deeplab, "cpu")):
        refused(lambda: pipe.mask(home.data.image(0), labels), words)


def test_labels_may_be_a_tensor_of_numbers(loaded):
    assert loaded.keys_of(torch.tensor([2, 0])).tolist() == [0, 2]


def test_what_is_no_image_crf_or_threshold_is_refused_with_what_is(loaded, home):
    image = home.data.image(0)
    for wrong in ("photo.jpg", home.photo, 3, None, torch.zeros(9, 9, 3)):
        for call in (loaded.mask, loaded.cam):
            refused(lambda: call(wrong), f"not a {type(wrong).__name__}; open a file by PIL.Image.open")
    for crf in (False, True, 3):
        refused(lambda: loaded.mask(image, crf=crf), f"crf is {crf}; pass one of psa", "or None to do without")
    for threshold in (2, -0.1, float("nan"), "0.5", None, True):
        refused(lambda: loaded.mask(image, crf=None, threshold=threshold), f"threshold is {threshold!r}; pass a number",
                "at least 0 and at most 1")
    assert not loaded.mask(image, crf=None, threshold=np.float32(1)).all()


# --- loading -------------------------------------------------------------------------------------------------------

def test_unknown_options_and_choices_are_refused_with_those_there_are(home):
    refused(lambda: Pipeline.load(home.stage2, "cpu", scale=2), "no option 'scale' here",
            "scales, flip, alternate, max_size")
    refused(lambda: Pipeline.load(home.stage2, "cpu", merge="max"), "no option 'merge' here")
    refused(lambda: DeepLabPipeline.load(home.deeplab, "cpu", beta=2.0), "no option 'beta' here", "merge")
    refused(lambda: DeepLabPipeline.load(home.deeplab, "cpu", merge="least"), "merge is 'least'", "mean, max")
    refused(lambda: Pipeline.load(home.stage2, "cpu", precision="fp16"), "precision is 'fp16'", "fp32, bf16")
    refused(lambda: Pipeline.load(home.stage2, "tpu"), "no device 'tpu' here", "--device cpu")


@pytest.mark.parametrize("name, value, words", [
    ("scales", 1.0, "pass a list of numbers"), ("scales", (), "pass a list of numbers"), ("scales", "1", "a list"),
    ("scales", (1.0, -1), "pass a number above 0 and at most 8"), ("scales", [float("inf")], "at most 8"),
    ("max_size", -5, "pass a whole number at least 32"), ("max_size", 96.5, "pass a whole number at least 32"),
    ("max_size", None, "at least 32"), ("flip", "no", "pass True or False"), ("alternate", 1, "pass True or False"),
    ("crf_preset", None, "pass one of psa")])
def test_options_that_their_flags_would_refuse_are_refused_here_too(home, name, value, words):
    for kind, path in ((Pipeline, home.stage2), (DeepLabPipeline, home.deeplab)):
        refused(lambda: kind.load(path, "cpu", **{name: value}), f"{name} is {value!r}; ", words)
    refused(lambda: Pipeline.load(home.stage2, "cpu", beta=0), "beta is 0; pass a number above 0")


def test_options_may_be_numbers_of_numpy(home):
    changes = {"scales": np.array([1, 2]), "max_size": np.int64(64), "flip": np.bool_(False), "beta": 3}
    pipe = Pipeline.load(home.stage2, "cpu", **changes)
    assert pipe.maps == MapConfig((1.0, 2.0), False, "predicted", 64) and pipe.walk_config.beta == 3.0, pipe.maps


def test_an_unknown_preset_is_refused_with_the_choices(loaded, home):
    refused(lambda: loaded.mask(home.data.image(0), crf="psaa"), "crf_preset is 'psaa'", ", ".join(PRESETS))


def test_foreign_files_are_refused(home, tmp_path):
    (tmp_path / "damaged").write_bytes(b"no checkpoint")
    save_tensors(tmp_path / "foreign", {"some.weight": torch.zeros(3)})
    refused(lambda: Pipeline.load(tmp_path / "missing"), "no checkpoint", "missing")
    refused(lambda: Pipeline.load(tmp_path / "damaged"), "damaged")
    refused(lambda: Pipeline.load(tmp_path / "foreign"), "foreign", "some.weight")
    refused(lambda: Pipeline.load(home.deeplab), "comes from deeplab", "stage2 or stage1")
    refused(lambda: DeepLabPipeline.load(home.stage2), "comes from stage2", "of deeplab is needed")


def test_a_checkpoint_of_stage_1_gives_masks_of_the_cam_itself_and_no_walk(home):
    pipe, image = Pipeline.load(home.stage1, "cpu", bg_alpha=0.3), home.data.image(0)
    cam = pipe.cam(image)
    expected = decide(image, cam.keys, with_background(cam.maps, 0.3), None, 96, 0.5)
    assert (pipe.mask(image, crf=None) == expected).all() and len(np.unique(expected)) > 1, np.unique(expected)
    refused(lambda: pipe.walk(image, cam), "no affinity network, but classifier", "pass one of stage 2")


@pytest.mark.parametrize("options", [*({"dataset": name} for name in DATASETS), MADE_WITH,
                                     {**MADE_WITH, "dataset": "voc", "crf_preset": "irn", "lr": 3.0}])
def test_options_are_those_of_step_3_without_flags(home, tmp_path, options):
    networks = torch.load(home.stage1, weights_only=True)["networks"]
    pipe = Pipeline.load(save(tmp_path / "c.pth.tar", "stage1", options, **networks), "cpu")
    parser = Parser("", run_inference.NAMES, "masks", crf_preset="mctformer")
    args = resolve(parser, parser.parse_args([]), options, "checkpoint", run_inference.INHERITED)
    maps, walk = MapConfig.of({**vars(args), "labels": "predicted"}), WalkConfig.of(vars(args))
    assert pipe.maps == maps and pipe.walk_config == walk, f"{pipe.maps} {pipe.walk_config}, not {maps} {walk}"
    assert pipe.crf_preset == args.crf_preset, f"{pipe.crf_preset}, not {args.crf_preset}"
    image = read_image(home.photo)
    assert (pipe.mask(image) == pipe.mask(image, crf=args.crf_preset)).all()


@pytest.mark.parametrize("head", DEEPLAB_TEST)
@pytest.mark.parametrize("options", [{"dataset": "coco"}, {"dataset": "pet", "max_size": 96, "scales": [3.0]}])
def test_options_are_those_of_step_6_without_flags(tmp_path, head, options):
    pipe = DeepLabPipeline.load(save(tmp_path / "c.pth.tar", "deeplab", options, deeplab=deeplab_record(head)), "cpu")
    parser = Parser("", test_deeplab.NAMES, "deeplab", DEEPLAB_TEST)
    parser.settle_head(head)
    args = resolve(parser, parser.parse_args([]), options, "checkpoint", test_deeplab.INHERITED)
    maps = MapConfig.of({**vars(args), "labels": "predicted"})
    assert pipe.maps == maps and pipe.merge == args.merge, f"{pipe.maps} {pipe.merge}, not {maps} {args.merge}"
    assert pipe.crf_preset == args.crf_preset, f"{pipe.crf_preset}, not {args.crf_preset}"


def test_changes_are_taken_and_the_rest_stays(home, monkeypatch):
    monkeypatch.setattr("utils.precision.cpu_has_bf16", lambda: True)
    pipe = Pipeline.load(home.stage2, "cpu", "bf16", scales=[1.0], flip=False, beta=3.0, crf_preset="irn")
    assert pipe.maps == MapConfig((1.0,), False, "predicted", 96) and pipe.machine.precision == "bf16", pipe.maps
    assert pipe.walk_config == WalkConfig(beta=3.0, radius=4) and pipe.crf_preset == "irn", pipe.walk_config
    assert pipe.cam(read_image(home.photo)).maps.dtype == np.float32


# --- the parts agree -----------------------------------------------------------------------------------------------

def test_masks_are_decided_from_the_walk_which_starts_from_the_cam(loaded, home):
    image = home.data.image(0)
    cam = loaded.cam(image, [0, 2])
    walked = loaded.walk(image, cam)
    assert walked.shape[0] == 3 and abs(walked.sum(axis=0) - 1).max() < 1e-5, walked.shape
    assert abs(cam.maps.max(axis=(1, 2)) - 1).max() < 1e-6 and cam.maps.min() >= 0 and cam.size == image.shape[:2], cam
    for name, crf in (("no CRF", None), ("a CRF", CRF(PRESETS["irn"], "pydensecrf", "cpu"))):
        expected = decide(image, cam.keys, walked, crf, 96, 0.4)
        found = loaded.mask(image, [0, 2], crf, threshold=0.4)
        assert (found == expected).all(), f"with {name}: {(found != expected).sum()} pixels differ"


@torch.no_grad()
def test_the_walk_is_a_power_of_the_transition_matrix_times_the_cam_and_its_background(loaded, home):
    image, offsets = home.data.image(0), half_disc(4)
    cam = loaded.cam(image, [0, 2])
    features = unpack(loaded.records["affinity"])(loaded.walk_views()(image)[0][None])[0]
    matrix = transition(affinity_stencil(features, offsets), offsets, beta=8.0).to_dense()
    scores = with_background(resize_maps(cam.maps, features.shape[-2:]), WEAK["bg_alpha"])
    walked = torch.linalg.matrix_power(matrix, WEAK["walk_steps"]) @ torch.from_numpy(scores).flatten(1).T
    expected, found = walked.T.reshape(scores.shape).numpy(), loaded.walk(image, cam)
    error = abs(found - expected).max() / expected.max()
    assert error < 5e-3, f"off by {error} of the largest, more than the polynomial's 1e-3 a pixel on average"
    assert abs(found - scores).max() > 0.05, "the walk changes nothing"


def test_a_preset_is_its_crf_and_none_is_none(loaded, home):
    image, masks = home.data.image(0), {}
    for preset, params in PRESETS.items():
        masks[preset] = loaded.mask(image, [0, 1], crf=preset)
        for backend in ("pydensecrf", "torch"):
            found = loaded.mask(image, [0, 1], CRF(params, backend, "cpu"))
            different = (found != masks[preset]).mean()
            assert different < 0.02, f"{different:.2%} of the pixels differ between {preset} and its CRF by {backend}"
    masks[None] = loaded.mask(image, [0, 1], crf=None)
    assert len({mask.tobytes() for mask in masks.values()}) >= 4, "the presets hardly differ"
    assert (loaded.mask(image, [0, 1]) == masks["mctformer"]).all(), "the default is another"


def test_the_threshold_moves_pixels_one_way(loaded, home):
    image = home.data.image(0)
    for crf in (None, "irn"):
        counts = [(loaded.mask(image, [0], crf, threshold) > 0).sum() for threshold in (0.2, 0.5, 0.8)]
        assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1], f"{counts} foreground pixels"


def test_large_images_are_seen_small_and_masked_at_their_size(loaded):
    image = np.random.default_rng(0).integers(0, 256, (70, 190, 3), dtype=np.uint8)
    cam = loaded.cam(image)
    assert cam.maps.shape[1:] == (9, 24), f"a CAM of {cam.maps.shape[1:]}, not a quarter of (35, 96) rounded up"
    assert loaded.mask(image).shape == (70, 190)


# --- the steps' files ----------------------------------------------------------------------------------------------

def step_3(pipe, home, out, labels, crf):
    """Run step 3 in a folder.  Returns (folder of CAMs, of walked scores, of masks)."""
    pipe.maps = replace(pipe.maps, labels=labels)
    scores, how = inference.SplitScores(pipe, home.data, Places(None, out)), MaskConfig(crf, pipe.maps.max_size, 0.5)
    inference.run(scores, inference.mask_folder(out / "masks", scores.last, how, False), how, {"options": {}})
    return out / f"cam_trainval_{labels}", out / f"walk_trainval_{labels}", out / "masks"


@pytest.mark.parametrize("labels", ["gt", "predicted"])
@pytest.mark.parametrize("crf", [None, CRF(PRESETS["irn"], "pydensecrf", "cpu")])
def test_step_3_writes_what_the_pipeline_gives(home, tmp_path, labels, crf):
    pipe = Pipeline.load(home.stage2, "cpu", **WEAK)
    cams, walks, masks = step_3(pipe, home, tmp_path, labels, crf)
    for index, image_id in enumerate(home.data.ids):
        image, found = home.data.image(index), read_mask(masks / f"{image_id}.png")
        known = np.flatnonzero(home.data.label(index)) if labels == "gt" else None
        cam = pipe.cam(image, known)
        save_cam(tmp_path / "own", image_id, cam.keys, cam.maps, cam.size)  # as a file rounds it
        keys, stored = load_cam(tmp_path / "own", image_id)
        for one, other in zip((keys, stored), load_cam(cams, image_id)):
            assert (one == other).all(), f"{image_id}: the CAM differs"
        save_scores(tmp_path / "own", image_id, keys, pipe.walk(image, Cam(keys, stored, cam.size)), cam.size)
        keys, scores = load_scores(tmp_path / "own", image_id)
        for one, other in zip((keys, scores), load_scores(walks, image_id)):
            assert (one == other).all(), f"{image_id}: the walked scores differ"
        assert (decide(image, keys, scores, crf, 96, 0.5) == found).all(), f"{image_id}: the mask differs"
        # In memory nothing is rounded: pixels whose two best classes the files' steps cannot tell apart may differ.
        different = pipe.mask(image, known, crf) != found
        assert different.mean() < 0.005, f"{image_id}: {different.mean():.2%} of the pixels differ"
        if crf is None:
            best = np.sort(full_size(pipe.scores(image, known)[1], found.shape), axis=0)
            margin = best[-1] - best[-2]
            assert margin[different].max(initial=0) < 1e-3 < np.median(margin), f"{image_id}: {margin[different]}"
            assert 0.05 < (found == 0).mean() < 0.95 or labels == "predicted", f"{image_id}: {np.unique(found)}"


def test_images_of_any_folder_get_the_pipelines_mask_byte_for_byte(loaded, home, tmp_path):
    crf = CRF(PRESETS["mctformer"], "pydensecrf", "cpu")
    inference.run_images(loaded, [home.photo], tmp_path, MaskConfig(crf, 96, 0.5), walks=False)
    expected = loaded.mask(Image.open(home.photo))
    assert (read_mask(tmp_path / "photo.png") == expected).all() and len(np.unique(expected)) > 1, np.unique(expected)


def test_batches_of_images_give_the_files_of_one_at_a_time(home, monkeypatch, tmp_path, capsys):
    made = {}
    for together in (1, 4):
        monkeypatch.setitem(split_map.TOGETHER, "cpu", together)
        pipe = Pipeline.load(home.stage2, "cpu", scales=(1.0,), max_size=33, **WEAK)  # several images have one size
        sizes = []
        monkeypatch.setattr(pipe, "walks", lambda views, cams, walks=pipe.walks: sizes.append(len(views))
                            or walks(views, cams))
        cams, walks, _ = step_3(pipe, home, tmp_path / str(together), "gt", None)
        made[together] = [(load_cam(cams, image_id)[1], load_scores(walks, image_id)[1]) for image_id in home.data.ids]
        assert (max(sizes) > 1) == (together > 1), f"{sizes} images at once"
    for one, four in zip(*made.values()):
        gaps = [abs(a - b).max() for a, b in zip(one, four)]
        assert max(gaps) < 2e-3, f"CAM and walk differ by {gaps}, more than their files' steps"


# --- DeepLab -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("merge", ["mean", "max"])
@pytest.mark.parametrize("flip, alternate", [(True, False), (False, False), (True, True)])
def test_deeplabs_scores_equal_those_of_one_view_at_a_time(home, merge, flip, alternate):
    pipe = DeepLabPipeline.load(home.deeplab, "cpu", merge=merge, flip=flip, alternate=alternate, scales=(0.5, 1.0))
    network, maps, image = unpack(pipe.records["deeplab"]), [], home.data.image(0)
    grid = tuple(round((side - 1) / 8) + 1 for side in image.shape[:2])
    with torch.no_grad():
        for number, view in enumerate(pipe.views()(image)):
            for flipped in [number == 1] if alternate else (False, True)[:1 + flip]:
                logits = network(view.flip(-1)[None] if flipped else view[None])
                logits = logits.flip(-1) if flipped else logits
                maps.append(F.interpolate(logits, grid, mode="bilinear", align_corners=True)[0])
    logits = torch.stack(maps)
    expected = logits.mean(dim=0).softmax(dim=0) if merge == "mean" else logits.softmax(dim=1).amax(dim=0)
    expected = (expected / expected.sum(dim=0)).numpy()
    found = pipe.merged(pipe.views()(image), grid)
    assert found.shape == (4, *grid) and abs(found - expected).max() < 1e-4, f"off by {abs(found - expected).max()}"
    assert expected.max() - expected.min() > 0.5, "the example is flat"
    keys, kept = pipe.scores(image, ["dotted_terrier", 0])
    own = expected[[0, 1, 3]] / expected[[0, 1, 3]].sum(axis=0)
    assert keys.tolist() == [0, 2] and abs(kept - own).max() < 1e-3, f"{keys}, off by {abs(kept - own).max()}"


def test_deeplabs_predicted_classes_are_those_that_somewhere_are_likely(home, monkeypatch):
    pipe, image = DeepLabPipeline.load(home.deeplab, "cpu"), home.data.image(0)
    for highest, keys in (((0.04, 0.6, 0.3), [1, 2]), ((0.01, 0.02, 0.01), [1])):
        maps = np.zeros((4, 3, 3), np.float32)
        maps[1:, 0, 0] = highest
        maps[0] = 1 - maps[1:].sum(axis=0)
        monkeypatch.setattr(pipe, "merged", lambda views, grid, maps=maps: maps)
        found, kept = pipe.scores(image)
        assert found.tolist() == keys and abs(kept.sum(axis=0) - 1).max() < 1e-6, f"{found}, not {keys}"


@pytest.mark.parametrize("crf", [None, CRF(PRESETS["seamv1"], "pydensecrf", "cpu")])
def test_step_6_writes_what_the_pipeline_gives(home, tmp_path, crf):
    pipe, data = DeepLabPipeline.load(home.deeplab, "cpu"), replace(home.data, truth=None)
    how = MaskConfig(crf, 96, 0.5)
    folders = segment.deeplab_folders(pipe, tmp_path, how, False)
    segment.run_test(pipe, data, folders, how, {"options": {}}, False)
    folder = folders[1].path
    for index, image_id in enumerate(data.ids):
        image, found = data.image(index), read_mask(folder / f"{image_id}.png")
        keys, scores = pipe.scores(image)
        save_scores(tmp_path / "own", image_id, keys, scores, image.shape[:2])  # as a file rounds them
        for one, other in zip(load_scores(tmp_path / "own", image_id), load_scores(tmp_path / "scores", image_id)):
            assert (one == other).all(), f"{image_id}: the scores differ"
        expected = decide(image, *load_scores(tmp_path / "own", image_id), crf, 96, 0.5)
        assert (found == expected).all(), f"{image_id}: the mask differs"
        different = (pipe.mask(image, crf=crf) != found).mean()
        assert different < 0.005 and len(np.unique(found)) > 1, f"{image_id}: {different:.2%} of the pixels differ"


# --- nothing besides -----------------------------------------------------------------------------------------------

def test_nothing_is_written_and_nothing_printed(home, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    image = Image.open(home.photo)
    before = files(home.folder)
    for path in (home.stage1, home.stage2, home.common):
        pipe = Pipeline.load(path, "cpu", **WEAK)
        pipe.cam(image)
        for crf in ("default", None, "psa", CRF(PRESETS["avc"], "torch", "cpu")):
            pipe.mask(image, ["Crossmark_cat"], crf)
    pipe.walk(image, pipe.cam(image))
    DeepLabPipeline.load(home.deeplab, "cpu").mask(image)
    assert files(home.folder) == before and not list(tmp_path.iterdir()), "files were written"
    said = capfd.readouterr()
    assert not said.out and not said.err, said


def python(folder, code):
    """Run code in a process of its own, in another folder than the repository."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120,
                          env=environment(folder))
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]
    return done.stdout


def test_torch_hub_loads_both_pipelines_from_another_folder(home, tmp_path):
    python(tmp_path, f"""
import numpy, torch
from PIL import Image
torch.set_num_threads(1)
photo = Image.open({str(home.photo)!r})
pipeline = torch.hub.load({str(ROOT)!r}, "wsss", {str(home.common)!r}, source="local", bg_alpha=0.3,
                          walk_steps=16, precision="fp32")
numpy.save("wsss.npy", pipeline.mask(photo, crf="irn"))
network = torch.hub.load({str(ROOT)!r}, "deeplab", {str(home.deeplab)!r}, source="local", device="cpu",
                         precision="fp32")
numpy.save("deeplab.npy", network.mask(photo))
""")
    photo = Image.open(home.photo)
    for name, pipe, crf in (("wsss", Pipeline.load(home.common, "cpu", **WEAK), "irn"),
                            ("deeplab", DeepLabPipeline.load(home.deeplab, "cpu"), "default")):
        found, expected = np.load(tmp_path / f"{name}.npy"), pipe.mask(photo, crf=crf)
        assert (found == expected).all(), f"{name}: {(found != expected).sum()} pixels differ"
        assert len(np.unique(expected)) > 1, f"{name}: the example is flat"
    assert sorted(files(tmp_path)) == ["deeplab.npy", "wsss.npy"], files(tmp_path)


def test_inference_imports_no_training_code(tmp_path):
    said = python(tmp_path, f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import src.pipeline, src.inference
from src.seeds import SEEDS, seed_class
for name in SEEDS:
    seed_class(name)
print(*(name for name in sys.modules if name == "src.train" or name.startswith(("src.training", "src.segment"))))
print("src.seeds.avc.seed" in sys.modules)
""")
    assert said.split() == ["True"], f"imported: {said}"


def test_networks_are_built_once_and_not_before_they_are_needed(home, monkeypatch):
    built = []
    monkeypatch.setattr(pipeline, "unpack", lambda record, attach: built.append(record["kind"])
                        or unpack(record, attach))
    pipe = Pipeline.load(home.stage2, "cpu", **WEAK)
    assert not built, built
    image = read_image(home.photo)
    cam = pipe.cam(image)
    assert built == ["classifier"], built
    pipe.walk(image, cam)
    pipe.mask(image)
    assert built == ["classifier", "affinity"], built
