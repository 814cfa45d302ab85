"""The whole pipeline through the real scripts: what they write and inherit, their help, the commands of the readme."""
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from script_runs import (
    DATA,
    MACHINE,
    ROOT,
    SMALL,
    STAGE2,
    chain,
    checkpoint,
    copy,
    files,
    finish,
    fork,
    imagenet_weights,
    picture,
    random_weights,
    read_json,
    run,
    start,
)

import run_eval
import run_inference
import run_train
import test_deeplab
import train_deeplab
from data.make_toy import make_toy
from src.seeds import SEED_FLAGS
from utils.files import file_hash, load_cam, save_cam
from utils.labels import voc_palette
from utils.options import GROUPS

SCRIPTS = {"run_train.py": ("Steps 1 and 2:", "stage1_", "stage2_"),
           "run_inference.py": ("Step 3:", "output/inference"), "run_eval.py": ("Step 4:", "output/eval"),
           "train_deeplab.py": ("Step 5:", "output/deeplab_"),
           "test_deeplab.py": ("Step 6:", "output/deeplab_test")}


# --- the six steps --------------------------------------------------------------------------------------------------

def _numbers(value):
    """Every number in nested JSON."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize("step, scores", [(4, "output/eval/scores.json"), (6, "output/deeplab_test/scores.json")])
def test_the_six_steps_end_with_finite_scores(pipeline, step, scores):
    table = read_json(pipeline.folder / scores)["scores"]
    values = _numbers(table)
    assert len(values) >= 12 and all(math.isfinite(value) and 0 <= value <= 1 for value in values), f"{scores}: {table}"
    for row in table:
        printed = pipeline.runs[step].stdout
        assert row in printed, f"row {row!r} is not in the printed table:\n{printed}"


def test_the_score_table_tells_fixed_from_oracle_for_seed_walk_and_mask(pipeline):
    record = read_json(pipeline.folder / "output/eval/scores.json")
    for row in ("seed", "walk", "mask"):
        fixed, oracle = record["scores"][row]["fixed"], record["scores"][row]["oracle"]
        for name in ("miou", "fg_iou", "image_fg_iou"):
            assert name in fixed and name in oracle, f"{row} lacks {name}: {fixed} {oracle}"
        # The sweep has the fixed threshold 0.5 among its own, so the oracle cannot be worse.
        assert oracle["miou"] >= fixed["miou"] - 1e-9, f"{row}: oracle {oracle['miou']}, fixed {fixed['miou']}"
        assert 0 <= oracle["threshold"] <= 1
    assert "central box" in record["scores"], f"{list(record['scores'])}"
    assert (record["labels"], record["split"]) == ("gt", "trainval"), f"{record['labels']}, {record['split']}"
    assert "labels: gt" in pipeline.runs[4].stdout


def test_plots_and_panels_are_pictures(pipeline):
    for folder in ("output/eval", "output/deeplab_test"):
        for name in ("thresholds.png", "classes.png", "panel.png", "panel_worst.png"):
            with Image.open(pipeline.folder / folder / name) as image:
                assert min(image.size) > 50, f"{folder}/{name} is {image.size}"


# --- what lies on disk ----------------------------------------------------------------------------------------------

def _train_ids(folder):
    return [line.split()[0] for line in (folder / DATA / "annotations/trainval.txt").read_text().splitlines()]


def _image_size(folder, image_id):
    with Image.open(folder / DATA / "images" / f"{image_id}.jpg") as image:
        return image.size[1], image.size[0]


def test_cam_files_meet_the_contract(pipeline):
    ids, peaks = _train_ids(pipeline.folder), []
    for image_id in ids:
        with np.load(pipeline.folder / "data/cams" / f"{image_id}.npz", allow_pickle=False) as file:
            keys, cam, size = file["keys"], file["cam"], file["size"]
        height, width = _image_size(pipeline.folder, image_id)
        in_order = keys.tolist() == sorted(set(keys.tolist()))
        assert keys.dtype == np.int64 and in_order, f"{image_id}: {keys.dtype} {keys}"
        assert size.dtype == np.int64 and size.tolist() == [height, width], f"{image_id}: {size}, image {height, width}"
        shape = (len(keys), *cam.shape[1:])
        assert cam.dtype == np.float16 and cam.shape == shape and cam.ndim == 3, f"{image_id}: {cam.dtype} {cam.shape}"
        assert cam.shape[1] <= -(-height // 4) and cam.shape[2] <= -(-width // 4), f"{image_id}: {cam.shape} of {size}"
        assert cam.min() >= 0, f"{image_id}: minimum {cam.min()}"
        peaks += cam.max(axis=(1, 2)).tolist()
    # A class that the classifier sees nowhere has an empty map, which no division can bring to 1.
    assert set(peaks) <= {0.0, 1.0} and peaks.count(1.0) >= len(peaks) // 4, f"maxima of the maps: {peaks}"


@pytest.mark.parametrize("folder", ["output/inference", "output/stage2_resnet18/affinity_labels",
                                    "output/deeplab_test/masks"])
def test_masks_are_palette_pngs_of_the_image_size_in_voc_colours(pipeline, folder):
    ids = [path.stem for path in (pipeline.folder / folder).glob("*.png")]
    assert len(ids) == (6 if "deeplab" in folder else 12), f"{len(ids)} masks"
    for image_id in ids:
        with Image.open(pipeline.folder / folder / f"{image_id}.png") as mask:
            values, palette = np.asarray(mask), np.reshape(mask.getpalette(), (-1, 3))
            assert mask.format == "PNG" and mask.mode == "P", f"{image_id}: {mask.format} {mask.mode}"
        assert values.shape == _image_size(pipeline.folder, image_id), f"{image_id}: {values.shape}"
        assert np.array_equal(palette, voc_palette()[:len(palette)]) and len(palette) > 3, f"{image_id}: {palette[:4]}"
        allowed = {0, 1, 2, 3, 255} if "affinity" in folder else {0, 1, 2, 3}
        assert set(np.unique(values).tolist()) <= allowed, f"{image_id}: {np.unique(values)}"


@pytest.mark.parametrize("folder, step, count", [
    ("data/cams", "cam", 12), ("output/stage2_resnet18/affinity_labels", "affinity_labels", 12),
    ("output/inference", "mask", 12), ("output/deeplab_test/masks", "mask", 6)])
def test_manifests_say_what_was_made_how_and_where(pipeline, folder, step, count):
    record = read_json(pipeline.folder / folder / "manifest.json")
    assert record["step"] == step and record["complete"] is True, record["step"]
    assert record["count"] == len(record["images"]) == count, f"{record['count']}, {len(record['images'])} images"
    assert record["options"]["seed"] == 0 and record["options"]["data_root"] == DATA, record["options"]
    assert record["git_commit"] is None or re.fullmatch("[0-9a-f]{40}", record["git_commit"]), record["git_commit"]
    assert isinstance(record["git_dirty"], bool) and record["torch"][0].isdigit(), record["torch"]
    assert record["device_name"] == "cpu", record["device_name"]
    assert record["seconds"] >= 0 and record["failures"] == []
    assert (record["made_from"] is None) == (step == "cam"), f"made_from {record['made_from']}"
    written = {path.stem for path in (pipeline.folder / folder).glob("*.npz" if step == "cam" else "*.png")}
    assert written == set(record["images"]), f"files {sorted(written)}, listed {record['images']}"


def test_checkpoints_load_with_weights_only_and_stage_2_holds_both_networks(pipeline):
    expected = {"stage1": {"classifier"}, "stage2": {"affinity", "classifier"}, "deeplab": {"deeplab"}}
    for step, networks in expected.items():
        home = pipeline.folder / f"output/{step}_resnet18"
        for name in ("model_best.pth.tar", "checkpoint.pth.tar"):
            payload = checkpoint(home / name)  # with weights_only=True
            assert payload["step"] == step and set(payload["networks"]) == networks, f"{home / name}: {payload.keys()}"
        assert read_json(home / "options.json")["options"]["backbone"] == "resnet18"
        assert len((home / "log.jsonl").read_text().splitlines()) >= 2
    payloads = [checkpoint(pipeline.folder / f"output/{step}_resnet18/model_best.pth.tar")
                for step in ("stage1", "stage2")]
    one, two = (payload["networks"]["classifier"]["state"] for payload in payloads)
    assert all((one[name] == two[name]).all() for name in one), "stage 2 carries another classifier than stage 1's"


def test_overlays_and_walks_are_written_on_request(pipeline):
    for folder, count in (("output/inference/overlays", 12), ("output/deeplab_test/masks/overlays", 6)):
        overlays = list((pipeline.folder / folder).glob("*.png"))
        assert len(overlays) == count, f"{folder}: {len(overlays)}"
    walks = sorted((pipeline.folder / "output/inference/walks").glob("*.gif"))
    assert len(walks) == 8, f"{len(walks)} animations"
    frames = []
    for path in walks:
        with Image.open(path) as animation:
            frames.append(animation.n_frames)
    assert max(frames) >= 5, f"frames: {frames}"  # equal ones, as of an empty map, are stored as one


def test_a_manifest_names_the_one_it_was_made_from_by_its_hash(pipeline):
    """Also after step 4, which reads the same walked scores again."""
    parents = {"output/inference": "output/stage2_resnet18/scores/walk_trainval_gt",
               "output/stage2_resnet18/affinity_labels": "data/cams",
               "output/deeplab_test/masks": "output/deeplab_test/scores"}
    for folder, parent in parents.items():
        told = read_json(pipeline.folder / folder / "manifest.json")["made_from"]
        found = file_hash(pipeline.folder / parent / "manifest.json")
        assert told == found, f"{folder} was made from {told}, but {parent} is {found}"


def test_no_temporary_file_is_left(pipeline):
    left = [name for name in files(pipeline.folder) if name.endswith(".tmp")]
    assert not left, f"{left}"


def test_what_a_later_step_needs_is_inherited_and_printed(pipeline):
    expected = {2: ("crop_size=65", f"data_root={DATA}", "from data/cams"),
                3: ("scales=1.0", f"data_root={DATA}", f"from {STAGE2}"),
                5: ("crop_size=65", "split=trainval", "from output/inference"),
                6: (f"data_root={DATA}", "from output/deeplab_resnet18/model_best.pth.tar")}
    for step, words in expected.items():
        told = [line for line in pipeline.runs[step].stderr.splitlines() if line.startswith("Inherited ")]
        missing = [word for word in words if word not in "".join(told)]
        assert len(told) == 1 and not missing, f"step {step}: {missing} not in {told}"


def test_the_cams_of_step_1_serve_steps_3_and_4(pipeline):
    for step in (3, 4):
        said = pipeline.runs[step].stdout + pipeline.runs[step].stderr
        assert "Using the CAMs in data/cams" in said, f"step {step} made its own:\n{said}"


# --- the commands of the readme, at their default backbone ----------------------------------------------------------

README = (  # as they stand there; later flags, which override, keep it small
    ("run_train.py --data_root data/oxford-iiit-pet --stage 1 --batch_size 8 --lr 0.001 --epochs 50", True),
    ("run_train.py --data_root data/oxford-iiit-pet --stage 2 --cam_dir data/cams --batch_size 8 "
     "--lr 0.001 --epochs 50", True),
    ("run_inference.py --data_root data/oxford-iiit-pet --model_path output/stage2_resnet50/model_best.pth.tar "
     "--output_dir output/inference --crf", False),
    ("run_eval.py --data_root data/oxford-iiit-pet --model_path output/stage2_resnet50/model_best.pth.tar "
     "--output_dir output/eval --crf", False))


@chain
def readme(folder, get):
    """The readme's four commands, then DeepLab without flags (its training at a tenth of the width)."""
    make_toy(folder / DATA, train=12, test=3, classes=3, size=48)
    imagenet_weights(folder, "resnet50")
    short = ("--epochs", 1, "--crop_size", 65)
    runs = [run(folder, *command.split(), *(short if trains else ()), "--limit", 4) for command, trains in README]
    dry = run(folder, "train_deeplab.py", "--dry_run")
    train = run(folder, "train_deeplab.py", "--width", 0.1, "--epochs", 1)
    return SimpleNamespace(folder=folder, runs=runs, dry=dry, train=train, test=run(folder, "test_deeplab.py"))


def test_the_readme_commands_work_as_written(readme):
    for name in ("stage1_resnet50", "stage2_resnet50"):
        assert (readme.folder / "output" / name / "model_best.pth.tar").is_file(), f"no checkpoint of {name}"
    masks = list((readme.folder / "output/inference").glob("*.png"))
    assert len(masks) == 4, f"{len(masks)} masks of --limit 4"
    assert "mask" in read_json(readme.folder / "output/eval/scores.json")["scores"]


def test_stage_1_starts_from_imagenet_weights_and_fits_the_mixture(readme):
    said = readme.runs[0].stderr
    assert "resnet50-0676ba61.pth: ImageNet weights, into resnet50" in said, said
    assert "method=mixture" in said and "Mixture: fitted to" in said, said
    assert checkpoint(readme.folder / "output/stage1_resnet50/model_best.pth.tar")["networks"]["classifier"]["seed"] \
        == {"name": "mixture", "depths": [], "background": 12, "fits": 6}


def test_stage_2_starts_from_the_classifier_of_stage_1(readme):
    said = readme.runs[1].stderr
    assert "output/stage1_resnet50/model_best.pth.tar: checkpoint of this project, stage1, into resnet50" in said, said


def test_deeplab_without_flags_takes_what_it_needs_from_the_masks_record(readme):
    for done in (readme.dry, readme.train):
        told = [line for line in done.stderr.splitlines() if line.startswith("Inherited ")]
        assert len(told) == 1 and told[0].endswith("from output/inference"), done.stderr
        for word in ("dataset=pet", f"data_root={DATA}", "split=trainval", "limit=4", "crop_size=65", "seed=0"):
            assert word in told[0], f"{word} not in {told[0]}"
    assert "backbone=resnet38" in readme.dry.stderr and "width=1.0" in readme.dry.stderr, readme.dry.stderr
    warning = "WARNING: no ImageNet weights of resnet38 can be fetched, and --pretrained names no file: training starts"
    assert readme.dry.stderr.count(f"{warning} from RANDOM weights") == 1, readme.dry.stderr
    assert (readme.folder / "output/deeplab_resnet38/model_best.pth.tar").is_file()


def test_deeplab_is_tested_without_flags_on_the_test_split(readme):
    said = readme.test.stderr
    assert "Using output/deeplab_resnet38/model_best.pth.tar" in said, said
    assert re.search(rf"Inherited .*data_root={DATA}.* from output/deeplab_resnet38/model_best", said), said
    record = read_json(readme.folder / "output/deeplab_test/scores.json")
    assert record["split"] == "test" and record["images"] == 3 and record["labels"] == "predicted", record["split"]


# --- help -----------------------------------------------------------------------------------------------------------

HELP = {"run_train.py": (*run_train.NAMES[1], *SEED_FLAGS["avc"]), "run_train.py --stage 2": run_train.NAMES[2],
        "run_inference.py": run_inference.NAMES, "run_eval.py": run_eval.NAMES, "train_deeplab.py": train_deeplab.NAMES,
        "test_deeplab.py": test_deeplab.NAMES}


@chain
def helps(folder, get):
    """What each script says of itself: command -> stdout; and what it wrote."""
    home = folder / "home"
    home.mkdir()
    runs = fork(folder, [(home, (*command.split(), "--help")) for command in HELP])
    assert all(done.returncode == 0 for done in runs), [done.stderr for done in runs]
    return {command: done.stdout for command, done in zip(HELP, runs)}, files(home)


def _groups(text):
    """{title of a group: {flag: its help}} of the output of --help."""
    found, title, name = {}, None, None
    for line in text.split("\n\n", 1)[1].splitlines():
        if flag := re.match(r"  --(\w+)(.*)", line):
            name = flag[1]
            found[title][name] = flag[2]
        elif heading := re.fullmatch(r"([^\s].*):", line):
            title, name = heading[1], None
            found[title] = {}
        elif name and line.startswith("      "):
            found[title][name] += f" {line.strip()}"
    return {title: flags for title, flags in found.items() if flags}


@pytest.mark.parametrize("command", HELP)
def test_help_begins_with_the_step_and_names_what_is_read_and_written(command, helps):
    texts, written = helps
    description = texts[command].split("\n\n", 1)[1]
    step, *results = SCRIPTS[command.split()[0]]
    assert description.startswith(step), f"begins with {description[:40]!r}"
    head = description.split("\noptions:")[0]
    assert re.search(r"\breads\b", head, re.I) and re.search(r"\bwrites\b", head), head
    assert all(name in " ".join(head.split()) for name in results), f"{results} not in: {head}"
    assert not written, f"--help wrote {sorted(written)}"


@pytest.mark.parametrize("command", HELP)
def test_help_shows_every_flag_in_its_group(command, helps):
    expected = {title: {name for name in members if name in HELP[command]} for title, members in GROUPS.items()}
    if command == "run_train.py":
        expected |= {f"--method {method}": set(own) for method, own in SEED_FLAGS.items()}
    expected = {title: names for title, names in expected.items() if names}
    found = {title: set(flags) for title, flags in _groups(helps[0][command]).items() if title != "options"}
    assert found == expected, f"groups and flags: {found}, expected {expected}"
    lost = set(HELP[command]) - set().union(*found.values())
    assert not lost and len(HELP[command]) > 15, f"flags in no group: {lost}"


@pytest.mark.parametrize("command", HELP)
def test_help_says_what_each_flag_means_and_its_default(command, helps):
    flags = {name: text for group in _groups(helps[0][command]).values() for name, text in group.items()}
    plain = {name: re.sub(r"\(default: .*\)|--[\w-]+|\{.*?\}|\b[A-Z_]+\b", "", text) for name, text in flags.items()}
    bare = [name for name, text in plain.items() if len(re.findall(r"[a-z]{3}", text)) < 2]
    assert not bare, f"without help: {bare}"
    silent = [name for name, text in flags.items() if "(default: " not in text and name != "stage"]
    assert not silent, f"their default is not told: {silent}"


def test_help_shows_defaults_as_they_are_typed(helps):
    flags = {name: text for group in _groups(helps[0]["run_train.py"]).values() for name, text in group.items()}
    expected = {"flip": "on", "compile": "off", "scales": "0.5 1.0 1.5", "lr": "0.01", "backbone": "resnet50",
                "avc_start": str(SEED_FLAGS["avc"]["avc_start"].default)}
    found = {name: re.search(r"\(default: (.*?)\)", flags[name])[1] for name in expected}
    assert found == expected, found


# --- scoring --------------------------------------------------------------------------------------------------------

@chain
def scored(folder, get):
    """run_eval on the masks of step 3, on the test split, on a few images, and on stage 1's checkpoint."""
    copy(get("pipeline").folder, folder, without=("deeplab*", "walks"))
    run(folder, "run_eval.py", "--mask_dir", "output/inference", "--output_dir", "masks", *MACHINE)
    predicted = run(folder, "run_eval.py", "--split", "test", "--output_dir", "predicted", *MACHINE)
    ids = _train_ids(folder)
    (folder / "ids.txt").write_text("\n".join(ids[6:2:-1]) + "\n")
    run(folder, "run_eval.py", "--mask_dir", "output/inference", "--ids", "ids.txt", "--limit", 3,
        "--output_dir", "few", *MACHINE)
    run(folder, "run_eval.py", "--model_path", "output/stage1_resnet18/model_best.pth.tar", "--output_dir", "seed",
        *MACHINE)
    return SimpleNamespace(folder=folder, predicted=predicted, ids=ids)


def test_the_checkpoint_and_its_masks_score_the_same(pipeline, scored):
    made = read_json(pipeline.folder / "output/eval/scores.json")["scores"]["mask"]["fixed"]
    kept = read_json(scored.folder / "masks/scores.json")["scores"]["masks"]["fixed"]
    assert made == kept, f"from the checkpoint {made}, of its masks {kept}"


def test_the_seed_of_stage_1_scores_the_same_as_that_of_stage_2(pipeline, scored):
    later = read_json(pipeline.folder / "output/eval/scores.json")["scores"]
    alone = read_json(scored.folder / "seed/scores.json")["scores"]
    assert alone["seed"] == later["seed"] and set(alone) == {"central box", "seed", "mask"}, f"{alone}, then {later}"


def test_the_test_split_is_scored_by_predicted_labels(scored):
    record = read_json(scored.folder / "predicted/scores.json")
    assert record["labels"] == "predicted" and record["split"] == "test" and record["images"] == 6, record["labels"]
    assert "labels: predicted" in scored.predicted.stdout
    assert (scored.folder / "output/stage2_resnet18/scores/cam_test_predicted/manifest.json").is_file()


def test_ids_and_limit_choose_the_images_in_the_order_of_the_split(scored):
    record = read_json(scored.folder / "few/scores.json")
    assert list(record["image_fg_iou"]) == scored.ids[3:6], f"{list(record['image_fg_iou'])} of {scored.ids}"


# --- one's own folder of images, DeepLab on ground truth, dry runs --------------------------------------------------

def _own_dataset(root):
    rows = {"one": "cat", "two": "dog", "both": "dog;cat", "more": "cat", "none": ""}
    for name in rows:
        picture(root / "images" / f"{name}.png", 52, 58, "RGB", "PNG")
    (root / "labels.csv").write_text("image_id,class\n" + "".join(f"{name},{label}\n" for name, label in rows.items()))


@chain
def own_images(folder, get):
    """Steps 1 to 3 on a plain folder of images, one of them with two classes and one with none."""
    _own_dataset(folder / "mine")
    run(folder, "run_train.py", "--stage", 1, "--dataset", "folder", "--data_root", "mine", "--crop_size", 65,
        "--scales", 1, *SMALL)
    run(folder, "run_train.py", "--stage", 2, *SMALL)
    run(folder, "run_inference.py", "--model_path", STAGE2, *MACHINE)
    return folder


def test_a_plain_folder_goes_from_stage_1_to_masks(own_images):
    names = {path.stem for path in (own_images / "output/inference").glob("*.png")}
    assert names == {"one", "two", "both", "more", "none"}, f"{names}"


@pytest.mark.parametrize("name, keys", [("one", [0]), ("two", [1]), ("both", [0, 1]), ("none", [])])
def test_an_image_has_one_map_for_each_of_its_classes(own_images, name, keys):
    with np.load(own_images / "data/cams" / f"{name}.npz", allow_pickle=False) as file:
        assert file["keys"].tolist() == keys and len(file["cam"]) == len(keys), f"{file['keys']}, {file['cam'].shape}"


def test_an_image_without_a_class_is_all_background(own_images):
    with Image.open(own_images / "output/inference/none.png") as mask:
        assert np.asarray(mask).max() == 0, f"{np.unique(mask)}"


# --- seeds that fire nowhere -----------------------------------------------------------------------------------------

@chain
def empty(folder, get):
    """Stage 2 on CAMs that are 0 everywhere, then on CAMs of which one is not."""
    home = copy(get("pipeline").folder, folder / "home", without=("inference", "eval", "deeplab*"))
    for path in (home / "data/cams").glob("*.npz"):
        keys, cam = load_cam(path.parent, path.stem)
        save_cam(path.parent, path.stem, keys, np.zeros_like(cam), _image_size(home, path.stem))
    command = ("run_train.py", "--stage", 2, *SMALL, "--output_dir")
    (nothing,) = fork(folder, [(home, (*command, "output/nothing"))])
    cam[:, :cam.shape[1] // 2] = 1
    save_cam(path.parent, path.stem, keys, cam, _image_size(home, path.stem))
    (one,) = fork(folder, [(home, (*command, "output/one"))])
    return nothing, one


def test_stage_2_warns_when_no_affinity_label_has_any_foreground(empty):
    nothing, one = empty
    assert (nothing.returncode, one.returncode) == (0, 0), nothing.stderr + one.stderr
    warning = "WARNING: no affinity label in output/nothing/affinity_labels has any foreground"
    assert nothing.stderr.count(warning) == 1 and "--alpha_low" in nothing.stderr, nothing.stderr
    assert "WARNING" not in one.stderr, one.stderr


# --- published checkpoints ------------------------------------------------------------------------------------------

def _published(folder, kind, family, **how):
    """A file in a published layout, of random weights at an eighth of the width."""
    how = {"kind": kind, "backbone": "resnet38", "width": 0.125, "output_stride": 8, **how}
    random_weights(folder, f"{kind}.pth", family, **how)


@chain
def foreign(folder, get):
    """Published files through every step that takes one."""
    make_toy(folder / DATA, train=4, test=1, classes=2, size=48)
    _published(folder, "classifier", "psa", classes=2)
    _published(folder, "affinity", "psa")
    _published(folder, "deeplab", "mctformer", classes=2, head="mctformer")
    told = subprocess.run([sys.executable, "-m", "models.weights", str(folder / "classifier.pth"), "--export", "psa",
                           str(folder / "again.pth")], cwd=ROOT, capture_output=True, text=True, check=True)
    seed = run(folder, "run_train.py", "--stage", 1, "--model_path", "classifier.pth", "--scales", 1, *MACHINE)
    run(folder, "run_train.py", "--stage", 2, "--epochs", 1, "--crop_size", 65, *MACHINE)
    masks = run(folder, "run_inference.py", "--model_path", "affinity.pth", "--no-crf", *MACHINE)
    run(folder, "run_eval.py", "--model_path", "classifier.pth", "--scales", 1, *MACHINE)
    test = run(folder, "test_deeplab.py", "--model_path", "deeplab.pth", "--scales", 1, *MACHINE)
    run(folder, "run_train.py", "--stage", 1, "--backbone", "resnet38", "--width", 0.125, "--pretrained", "again.pth",
        "--method", "cam", "--freeze", 2, "--bn", "frozen", "--long_side", 40, 60, "--epochs", 1, "--crop_size", 65,
        "--scales", 1, "--cam_dir", "trained_cams", "--output_dir", "trained", *MACHINE)
    adopted = "output/stage1_resnet38/model_best.pth.tar"
    before = files(folder / "output")
    run(folder, "run_train.py", "--stage", 1, "--model_path", adopted, "--split", "test", "--scales", 1, "--cam_dir",
        "test_cams", *MACHINE)
    _published(folder, "classifier", "psa", classes=2, seed=1)
    other = finish(start(folder, "run_train.py", "--stage", 1, "--model_path", "classifier.pth", *MACHINE))
    return SimpleNamespace(folder=folder, told=told, seed=seed, masks=masks, test=test, other=other,
                           changed=set(files(folder / "output").items()) ^ set(before.items()))


def test_a_file_of_weights_is_told_by_its_path(foreign):
    said = foreign.told.stdout
    assert "classifier.pth: PSA ResNet38 classifier" in said and "width 0.125, 2 classes" in said, said
    assert "again.pth: 229 tensors under psa's names" in said, said


def test_a_published_classifier_makes_the_cams_without_training(foreign):
    record = read_json(foreign.folder / "data/cams/manifest.json")
    assert record["complete"] and record["count"] == 4 and "PSA ResNet38 classifier" in foreign.seed.stderr, record
    adopted = checkpoint(foreign.folder / "output/stage1_resnet38/model_best.pth.tar")
    published = torch.load(foreign.folder / "again.pth", weights_only=True)  # the first, which was exported again
    assert torch.equal(adopted["networks"]["classifier"]["state"]["head.weight"], published["fc8.weight"])
    assert adopted["options"]["backbone"] == "resnet38" and adopted["options"]["width"] == 0.125, adopted["options"]
    assert not (foreign.folder / "output/stage1_resnet38/log.jsonl").exists(), "it trained"


def test_our_own_classifier_makes_the_cams_of_another_split_and_is_not_copied(foreign):
    record = read_json(foreign.folder / "test_cams/manifest.json")
    options = {name: record["options"][name] for name in ("labels", "model_path")}
    assert options == {"labels": "predicted", "model_path": "output/stage1_resnet38/model_best.pth.tar"}, options
    assert record["count"] == 1, record["count"]


def test_a_published_classifier_does_not_replace_another(foreign):
    said = foreign.other.stderr
    assert foreign.other.returncode == 1 and "with another classifier; pass another --output_dir" in said, said
    assert not foreign.changed, f"touched: {sorted(foreign.changed)}"


def test_stage_2_goes_on_from_a_published_classifier(foreign):
    networks = checkpoint(foreign.folder / "output/stage2_resnet38/model_best.pth.tar")["networks"]
    assert {name: record["width"] for name, record in networks.items()} == {"affinity": 0.125, "classifier": 0.125}


def test_a_published_affinitynet_takes_the_classifier_of_the_cams(foreign):
    said = foreign.masks.stderr
    assert "Taking the classifier from output/stage1_resnet38/model_best.pth.tar" in said, said
    assert "Using the CAMs in data/cams" in foreign.masks.stdout, foreign.masks.stdout
    names = {path.name for path in (foreign.folder / "output/inference").glob("*.png")}
    assert len(names) == 4 and (foreign.folder / "output/scores_affinity").is_dir(), names


def test_a_published_classifier_is_scored(foreign):
    table = read_json(foreign.folder / "output/eval/scores.json")
    assert set(table["scores"]) == {"central box", "seed", "mask"} and table["labels"] == "gt", table["scores"]


def test_a_published_deeplab_is_tested_as_its_head_was(foreign):
    said = foreign.test.stderr
    for word in ("DeepLabV1-ResNet38 with MCTformer's head", "merge=max", "flip=False", "crf_preset=mctformer"):
        assert word in said, f"{word} not in {said}"
    assert (foreign.folder / "output/deeplab_test/scores.json").is_file()


def test_stage_1_trains_from_a_published_backbone_by_the_psa_recipe(foreign):
    payload = checkpoint(foreign.folder / "trained/model_best.pth.tar")
    trained = payload["networks"]["classifier"]["state"]
    start = torch.load(foreign.folder / "again.pth", weights_only=True)
    same = {name: torch.equal(trained[f"backbone.{name}"], start[name])
            for name in ("conv1a.weight", "b2_2.conv_branch2b1.weight", "b3.conv_branch2a.weight", "bn7.weight",
                         "bn7.running_mean")}
    assert same == {"conv1a.weight": True, "b2_2.conv_branch2b1.weight": True, "b3.conv_branch2a.weight": False,
                    "bn7.weight": True, "bn7.running_mean": True}, same


@chain
def ceiling(folder, get):
    make_toy(folder / DATA, train=4, test=1, classes=2, size=48)
    run(folder, "train_deeplab.py", "--mask_dir", "gt", "--head", "mctformer", *SMALL, "--crop_size", 65)
    return folder


def test_deeplab_trains_on_ground_truth_with_no_earlier_step(ceiling):
    payload = checkpoint(ceiling / "output/deeplab_resnet18/model_best.pth.tar")
    assert payload["options"]["mask_dir"] == "gt", payload["options"]["mask_dir"]


def test_a_head_brings_its_published_training_settings(ceiling):
    payload = checkpoint(ceiling / "output/deeplab_resnet18/model_best.pth.tar")
    expected = {"head": "mctformer", "lr": 0.0007, "momentum": 0.0, "weight_decay": 0.0, "batch_size": 4}
    settings = {name: payload["options"][name] for name in expected}
    assert settings == expected, settings
    assert payload["networks"]["deeplab"]["head"] == "mctformer"


@chain
def dry(folder, get):
    """Every step again as a dry run, in a copy of the pipeline.  (what the runs said, files before, files after)."""
    home = copy(get("pipeline").folder, folder / "copy", without=("walks", "overlays"))
    commands = (("run_train.py", "--stage", 1, "--overwrite"), ("run_train.py", "--stage", 2, "--overwrite"),
                ("run_train.py", "--stage", 2, *SMALL, "--resume"), ("run_inference.py",),
                ("run_inference.py", "--images", f"{DATA}/images"), ("run_eval.py",),
                ("train_deeplab.py", "--overwrite"), ("test_deeplab.py", "--scales", 1))
    before = files(home)
    return fork(folder, [(home, (*command, "--dry_run", *MACHINE)) for command in commands]), before, files(home)


def test_a_dry_run_prints_the_options_and_writes_nothing(dry):
    runs, before, after = dry
    for done in runs:
        said = done.stderr
        assert done.returncode == 0 and "Dry run" in said and "seed=0" in said, f"{done.args}: {said}"
    touched = set(before.items()) ^ set(after.items())
    assert not touched, f"written or touched: {sorted(touched)}"


def test_masks_are_scored_and_pictured_though_a_photo_is_damaged(pipeline, tmp_path):
    home = copy(pipeline.folder, tmp_path, without=("walks", "overlays", "deeplab*", "eval"))
    photo = next(iter(sorted((home / DATA / "images").glob("*.jpg"))))
    photo.write_bytes(photo.read_bytes()[:-300])
    (home / "foreign").mkdir()
    for mask in (home / "output/inference").glob("*.png"):
        (home / "foreign" / mask.name).write_bytes(mask.read_bytes())
    run(home, "run_eval.py", "--mask_dir", "foreign", "--data_root", DATA, "--output_dir", "scored", *MACHINE)
    made = {path.name for path in (home / "scored").iterdir()}
    assert {"scores.json", "panel.png", "panel_worst.png", "report.html"} <= made, made


@pytest.mark.gpu
def test_two_gpus_have_the_losses_of_one(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, there is {torch.cuda.device_count()}")
    make_toy(tmp_path / DATA, train=8, test=2, classes=2, size=48)
    gpu = (*SMALL, "--device", "cuda", "--crop_size", 65, "--batch_size", 4)
    run(tmp_path, "run_train.py", "--stage", 1, *gpu, "--scales", 1)
    step = ("run_train.py", "--stage", 2, *gpu, "--epochs", 2)
    run(tmp_path, *step, "--output_dir", "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / step[0],
               *step[1:], "--output_dir", "two"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = ([line for line in map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
                 if "grad_norm" in line] for name in ("one", "two"))
    assert len(one) == len(two) == 4, f"{len(one)} and {len(two)} steps"
    gaps = [abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(one, two)]
    assert max(gaps) < 1e-3, f"losses differ by {gaps}"


@pytest.mark.gpu
def test_the_pipeline_runs_on_a_gpu_in_bf16(tmp_path):
    make_toy(tmp_path / DATA, train=8, test=2, classes=2, size=48)
    gpu = (*SMALL, "--device", "cuda", "--precision", "bf16")
    run(tmp_path, "run_train.py", "--stage", 1, *gpu, "--crop_size", 65, "--scales", 1)
    run(tmp_path, "run_train.py", "--stage", 2, *gpu)
    run(tmp_path, "run_inference.py", "--model_path", STAGE2, "--device", "cuda", "--workers", 2,
        "--crf_backend", "torch")
    record = read_json(tmp_path / "output/inference/manifest.json")
    assert record["count"] == 8 and record["device_name"] != "cpu" and record["options"]["precision"] == "bf16", record
