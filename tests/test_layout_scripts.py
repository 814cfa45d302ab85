"""VOC and COCO through the six scripts with --dataset alone, images of several classes, and the server's archive."""
import json
import math
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from report_page import read_report
from script_runs import MACHINE, SMALL, STAGE2, chain, copy, files, finish, fork, read_json, run, start
from test_refusals import check_one_line
from trees import CATEGORIES, VOC_SHOWN, coco_stem, make_coco, make_voc, opened

from src.masks import decide
from src.pipeline import Pipeline
from src.seeds.avc.seed import TERMS
from src.submission import write_submission
from utils.config import Machine, MapConfig, WalkConfig
from utils.crf import CRF, PRESETS
from utils.datasets.voc import CLASSES
from utils.errors import UserError
from utils.files import load_cam
from utils.labels import voc_palette

ROOTS = {"voc": "data/VOCdevkit/VOC2012", "coco": "data/coco"}  # the scripts' defaults


def six_steps(folder, name):
    """Every step with --dataset alone to say where the data is; .runs by step."""
    first = (*SMALL, "--crop_size", 65, "--batch_size", 4, "--scales", 1)
    runs = {1: run(folder, "run_train.py", "--stage", 1, "--dataset", name, *first),
            2: run(folder, "run_train.py", "--stage", 2, *SMALL, "--batch_size", 4),
            3: run(folder, "run_inference.py", "--model_path", STAGE2, *MACHINE),
            4: run(folder, "run_eval.py", *MACHINE),
            5: run(folder, "train_deeplab.py", *SMALL, "--batch_size", 4),
            6: run(folder, "test_deeplab.py", "--scales", 1, *MACHINE)}
    return SimpleNamespace(folder=folder, runs=runs, root=folder / ROOTS[name], name=name)


@chain
def voc_run(folder, get):
    make_voc(folder / ROOTS["voc"])
    return six_steps(folder, "voc")


@chain
def coco_run(folder, get):
    make_coco(folder / ROOTS["coco"])
    return six_steps(folder, "coco")


@pytest.fixture(params=["voc", "coco"])
def done(request):
    return request.getfixturevalue(f"{request.param}_run")


def labels_of(done):
    """{image id: its zero-based classes} of the training split."""
    made = opened(done.name, done.root)
    return {image_id: np.flatnonzero(row).tolist() for image_id, row in zip(made.ids, made.labels)}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for output/cache


COUNTS = {"voc": (10, 3, 20), "coco": (8, 4, 4)}  # training images, images tested on, classes


def test_the_six_steps_end_with_finite_scores_of_every_image(done):
    train, test, classes = COUNTS[done.name]
    for home, count, split in (("eval", train, None), ("deeplab_test", test, "val")):
        record = read_json(done.folder / "output" / home / "scores.json")
        assert record["images"] == count and len(record["classes"]) == classes, f"{home}: {record['images']} images"
        assert split in (None, record["split"]) and record["dataset"] == done.name, record["split"]
        for stage, row in record["scores"].items():
            assert math.isfinite(row["fixed"]["miou"]), f"{home}, {stage}: {row['fixed']}"


def test_masks_decode_to_classes_of_their_images(done):
    for image_id, keys in labels_of(done).items():
        with Image.open(done.folder / "output" / "inference" / f"{image_id}.png") as mask:
            values = set(np.unique(mask).tolist())
            palette = np.reshape(mask.getpalette(), (-1, 3))
        assert values <= {0, *(key + 1 for key in keys)}, f"{image_id} of classes {keys} has the values {values}"
        assert np.array_equal(palette, voc_palette()[:len(palette)]), f"{image_id}: {palette[:3]}"


def test_every_image_has_a_map_for_each_of_its_classes_and_all_are_propagated(done):
    for image_id, keys in labels_of(done).items():
        with np.load(done.folder / "data" / "cams" / f"{image_id}.npz", allow_pickle=False) as file:
            assert file["keys"].tolist() == keys and len(file["cam"]) == len(keys) >= 2, f"{image_id}: {file['keys']}"
        walks = next((done.folder / "output" / "stage2_resnet18" / "scores").glob("walk_*"))
        with np.load(walks / f"{image_id}.npz", allow_pickle=False) as file:
            shape, total = file["probabilities"].shape, file["probabilities"].astype(np.float32).sum(axis=0)
        assert shape[0] == len(keys) + 1 and abs(total - 1).max() < 0.01, f"{image_id}: {shape}, {total.max()}"


def test_what_the_dataset_settles_is_printed_and_later_steps_inherit_the_rest(done):
    said = done.runs[1].stderr
    where, how = (line for line in said.splitlines() if line.startswith(f"Defaults of --dataset {done.name}: "))
    assert where.endswith(f": data_root={ROOTS[done.name]}"), where
    assert ": max_size=1024 lr=0.01" in how and "batch_size" not in how, how
    assert "bg_alpha=16.0" in done.runs[3].stderr and "crf_preset=psa" in done.runs[3].stderr, done.runs[3].stderr
    assert f"Inherited dataset={done.name} data_root={ROOTS[done.name]}" in done.runs[2].stderr, done.runs[2].stderr


def test_avc_trains_on_images_of_several_classes_and_makes_a_map_for_each(done, tmp_path):
    run(done.folder, "run_train.py", "--stage", 1, "--dataset", done.name, "--method", "avc", "--avc_consistency", 1,
        *SMALL, "--crop_size", 65, "--batch_size", 4, "--scales", 1, "--cam_dir", tmp_path / "cams",
        "--output_dir", tmp_path / "avc")
    log = [json.loads(line) for line in (tmp_path / "avc" / "log.jsonl").read_text().splitlines()]
    means = [line["mean"] for line in log if "mean" in line][-1]
    assert all(0 <= means[name] < math.inf for name in TERMS) and means["equivariance"] > 0, means
    for image_id, keys in labels_of(done).items():
        found, cam = load_cam(tmp_path / "cams", image_id)
        assert found.tolist() == keys and cam.shape[0] == len(keys), f"{image_id}: maps of {found}, labels {keys}"
        assert np.isfinite(cam).all() and (not keys or 0 <= cam.min() <= cam.max() <= 1), image_id


def test_vocs_training_split_is_trainaug_with_known_labels(voc_run):
    options = read_json(voc_run.folder / "data" / "cams" / "manifest.json")["options"]
    assert (options["split"], options["labels"], options["difficult"]) == ("trainaug", "gt", True), options


def test_an_image_without_an_object_is_scored_as_background(coco_run):
    record = read_json(coco_run.folder / "output" / "deeplab_test" / "scores.json")
    assert coco_stem("val2014", 4) in record["image_fg_iou"], list(record["image_fg_iou"])
    assert record["image_fg_iou"][coco_stem("val2014", 4)]["central box"] is None  # foreground in neither


def test_the_json_is_parsed_in_the_first_step_alone(coco_run):
    assert [step for step, done in coco_run.runs.items() if "Parsing data/coco" in done.stderr] == [1, 6]
    assert "instances_val2014" in coco_run.runs[6].stderr


# --- two objects side by side ---------------------------------------------------------------------------------------

def two_halves():
    """An image of two flat halves on a dark ground, the kind of each cell, its two peaked CAMs, and a pipeline whose
    affinities are 1 within a kind and 0 between two."""
    image = np.full((65, 97, 3), 20, np.uint8)
    image[12:53, 8:46], image[12:53, 51:89] = (210, 40, 40), (40, 60, 210)
    kind = (image[::8, ::8, 0] > 100) + 2 * (image[::8, ::8, 2] > 100)  # (9, 13)
    cam = np.zeros((2, 9, 13), np.float32)
    cam[0, 4, 3] = cam[1, 4, 9] = 1
    walk = WalkConfig(bg_alpha=40.0, beta=8.0, walk_steps=256, walk_eps=1e-4, radius=3)
    pipeline = Pipeline({"networks": {}, "classes": []}, MapConfig(), walk, Machine(torch.device("cpu")))
    stencil = torch.zeros(len(pipeline.offsets), 9, 13)
    for p, (dy, dx) in enumerate(pipeline.offsets):
        for y in range(9 - dy):
            for x in range(max(0, -dx), 13 - max(0, dx)):
                stencil[p, y, x] = float(kind[y, x] == kind[y + dy, x + dx])
    pipeline.stencils = lambda views: [stencil for _ in views]
    return image, kind, cam, pipeline


@pytest.mark.parametrize("crf", [None, CRF(PRESETS["psa"], "torch", "cpu")])
def test_two_objects_side_by_side_are_both_propagated_and_both_in_the_mask(crf):
    image, kind, cam, pipeline = two_halves()
    (probabilities,) = pipeline.walks([None], [cam])
    assert probabilities.shape == (3, 9, 13)
    for row in (1, 2):
        inside, outside = probabilities[row][kind == row].min(), probabilities[row][kind != row].max()
        assert inside > 1e-3 > outside, f"class {row}: at least {inside:.4f} inside, up to {outside:.4f} outside"
    probabilities[0] *= 0.01  # one peaked cell of 24 leaves little; what matters here is which class goes where
    mask = decide(image, np.array([3, 7]), probabilities / probabilities.sum(axis=0), crf, 512, 0.5)
    left, right = mask[16:49, 12:42], mask[16:49, 55:85]
    assert (left == 4).mean() > 0.99 and (right == 8).mean() > 0.99, f"{np.unique(left)}, {np.unique(right)}"


# --- VOC's evaluation server ----------------------------------------------------------------------------------------

@chain
def server(folder, get):
    """Step 6 on the test split, which has neither labels nor truth, and what of it is refused."""
    home = copy(get("voc_run").folder, folder / "home", without=("deeplab_test",))
    made = run(home, "test_deeplab.py", "--split", "test", "--submission", "out.tgz", "--scales", 1, *MACHINE)
    command = ("test_deeplab.py", "--scales", 1, *MACHINE, "--submission")
    asked = {"again": ("out.tgz", "--split", "test"), "limit": ("new.tgz", "--split", "test", "--limit", 1),
             "train": ("new.tgz", "--split", "train"), "zip": ("new.zip", "--split", "test"),
             "labels": ("new.tgz", "--split", "test", "--labels", "gt")}
    before = files(home)
    refused = dict(zip(asked, fork(folder, [(home, (*command, *flags)) for flags in asked.values()])))
    return SimpleNamespace(folder=home, made=made, refused=refused, new=set(files(home)) - set(before))


def test_the_archive_holds_every_mask_of_the_test_split_as_the_server_wants_it(server):
    place = "results/VOC2012/Segmentation/comp6_test_cls"
    assert "masks only, no scores" in server.made.stdout and "2 masks in" in server.made.stdout, server.made.stdout
    page = read_report(server.folder / "output/deeplab_test/report.html")
    assert page.data["rows"] == [] and list(page.cards) == ["2007_000012", "2007_000013"], list(page.cards)
    with tarfile.open(server.folder / "out.tgz") as archive:
        assert sorted(archive.getnames()) == [f"{place}/2007_{number:06d}.png" for number in (12, 13)]
        for member in archive:
            assert (member.uid, member.uname, member.mtime) == (0, "", 0), f"{member.name} tells about the machine"
            with Image.open(archive.extractfile(member)) as mask:
                assert (mask.mode, mask.size) == ("P", (74, 50)) and np.asarray(mask).max() <= 20, mask.mode


REFUSED = {"again": ("out.tgz is there already", "delete it"), "limit": ("every image", "leave --limit and --ids out"),
           "train": ("--split test or val", "--split train"), "zip": ("name it .tgz",),
           "labels": ("has no image labels", "--labels predicted")}


@pytest.mark.parametrize("case", REFUSED)
def test_an_archive_is_refused_before_any_work(case, server):
    check_one_line(server.refused[case], REFUSED[case])
    assert not server.new, f"written: {server.new}"


@pytest.mark.parametrize("fault", ["missing", "ignored pixels", "another size"])
def test_an_archive_of_incomplete_masks_is_refused_and_not_written(voc_run, server, tmp_path, fault):
    masks = copy(server.folder / "output/deeplab_test/masks", tmp_path / "masks")
    path = masks / "2007_000013.png"
    path.unlink()
    if fault != "missing":
        Image.fromarray(np.full((50, 74) if fault == "ignored pixels" else (9, 9), 255, np.uint8)).save(path)
    words = {"missing": "lacks 1 of the 2 masks of split test, such as 2007_000013",
             "ignored pixels": r"holds pixels of no class \(255\)",
             "another size": "is 9x9 but its image is 74x50"}[fault]
    with pytest.raises(UserError, match=words):
        write_submission(str(tmp_path / "out.tgz"), masks, opened("voc", voc_run.root, "test"))
    assert not [name for name in tmp_path.iterdir() if "out.tgz" in name.name]


# --- what is refused --------------------------------------------------------------------------------------------------

@chain
def mistakes(folder, get):
    """Faults of the data, each met by the first step."""
    jobs, first = {}, ("run_train.py", "--stage", 1, *SMALL, "--dataset")
    for case in MISTAKES:
        home = folder / case
        home.mkdir()
        jobs[case] = home, (*first, "voc" if "voc" in case else "coco")
        (make_voc if "voc" in case else make_coco)(home / ROOTS[jobs[case][1][-1]])
    (folder / "voc_root" / ROOTS["voc"]).rename(folder / "voc_root" / "data" / "VOC2012")
    (folder / "voc_root" / ROOTS["voc"]).mkdir()
    (folder / "voc_xml" / ROOTS["voc"] / "Annotations" / "2007_000002.xml").write_text(
        "<annotation><object><name>zebra</name></object></annotation>")
    (folder / "voc_image" / ROOTS["voc"] / "JPEGImages" / "2007_000002.jpg").unlink()
    truncated = folder / "coco_truncated" / ROOTS["coco"] / "annotations" / "instances_train2014.json"
    truncated.write_bytes(truncated.read_bytes()[:-40])
    other = folder / "coco_other" / ROOTS["coco"] / "annotations"
    (other / "instances_val2014.json").replace(other / "instances_train2014.json")
    return dict(zip(jobs, fork(folder, list(jobs.values()))))


MISTAKES = {
    "voc_root": ("is not a folder of PASCAL VOC 2012", "found nothing", "--data_root"),
    "voc_xml": ("2007_000002.xml names the class 'zebra'", "VOC does not have"),
    "voc_image": ("names 2007_000002 (and 0 more)", "complete the images"),
    "coco_truncated": ("instances_train2014.json is truncated", "fetch it again"),
    "coco_other": ("COCO_val2014_", "other split"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_fault_of_the_data_is_refused_in_one_line(case, mistakes):
    check_one_line(mistakes[case], MISTAKES[case])


def test_another_dataset_than_the_records_takes_nothing_of_where_its_data_is(voc_run, tmp_path):
    done = finish(start(tmp_path, "run_inference.py", "--dataset", "coco", "--model_path",
                        voc_run.folder / STAGE2, *MACHINE))
    check_one_line(done, ("no data folder data/coco", "--data_root"))


def test_the_trees_show_what_they_say():
    assert [CLASSES.index(name) for name in VOC_SHOWN] == [0, 11, 19] and list(CATEGORIES) == [1, 17, 18, 90]
