"""AVC through the real scripts, on a few toy images: training, resuming, evaluation, affinity maps, refusals."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from script_runs import DATA, MACHINE, STAGE2, chain, checkpoint, files, finish, interrupt, picture, run, start
from test_refusals import check_one_line

from data.make_toy import make_toy

COMMAND = ("run_train.py", "--stage", 1, "--method", "avc", "--backbone", "resnet18", "--pretrained", "none",
           "--crop_size", 65, "--scales", 1, "--epochs", 3, "--batch_size", 4, *MACHINE)
RUN = "output/stage1_resnet18"


@chain
def avc_run(folder, get):
    """Stage 1 with AVC, its evaluation, and the same training interrupted and resumed."""
    make_toy(folder / DATA, train=12, test=2, classes=2, size=56)
    run(folder, *COMMAND)
    scored = run(folder, "run_eval.py", "--model_path", f"{RUN}/model_best.pth.tar", "--show_affinity", "10,20",
                 *MACHINE)
    other = folder / "other"
    make_toy(other / DATA, train=12, test=2, classes=2, size=56)
    interrupt(start(other, *COMMAND), other / RUN / "log.jsonl", lines=4)
    changed = finish(start(other, *COMMAND, "--resume", "--avc_separation", 0.5))
    resumed = run(other, *COMMAND, "--resume")
    return SimpleNamespace(folder=folder, other=other, scored=scored, resumed=resumed, changed=changed)


def test_resuming_ends_with_the_same_bits(avc_run):
    whole, resumed = (checkpoint(home / RUN / "model_best.pth.tar")["networks"]["classifier"]
                      for home in (avc_run.folder, avc_run.other))
    assert "Resuming" in avc_run.resumed.stderr, avc_run.resumed.stderr
    different = [name for name in whole["state"] if not torch.equal(whole["state"][name], resumed["state"][name])]
    assert not different, f"{len(different)} tensors differ, such as {different[0]}"


def test_resuming_with_another_weight_is_refused(avc_run):
    assert avc_run.changed.returncode == 1 and "avc_separation was 1.0, is 0.5" in avc_run.changed.stderr


def test_the_record_builds_the_head_and_the_cams_are_in_range(avc_run):
    record = checkpoint(avc_run.folder / RUN / "model_best.pth.tar")["networks"]["classifier"]
    assert record["seed"] == {"name": "avc", "dims": 32, "power": 4, "colour": 0.0}, record["seed"]
    steps = record["state"]["seed.head.steps"]
    assert steps == 9, f"model_best is of step {steps}, not of the last: 3 epochs of 11 images in batches of 4"
    for path in (avc_run.folder / "data" / "cams").glob("*.npz"):
        with np.load(path) as stored:
            assert stored["cam"].min() >= 0 and stored["cam"].max() <= 1, path.name


def test_the_log_holds_every_term_and_the_mean_average_precision(avc_run):
    lines = [json.loads(line) for line in (avc_run.folder / RUN / "log.jsonl").read_text().splitlines()]
    terms = {"loss", "classification", "equivariance", "agreement", "separation", "consistency"}
    assert terms <= lines[0].keys() and terms <= lines[-1]["mean"].keys(), (lines[0], lines[-1])
    scores = [line["validation"]["score"] for line in lines if "validation" in line]
    assert len(scores) == 3 and all(0 <= score <= 1 for score in scores), scores


def test_a_checkpoint_alone_is_scored_and_shows_affinity(avc_run):
    assert "seed" in avc_run.scored.stdout, avc_run.scored.stdout
    shown = sorted((avc_run.folder / "output" / "eval" / "affinity").glob("*_cam.png"))
    assert len(shown) == 8, f"{len(shown)} pictures instead of the first 8 images'"
    image_id = shown[0].name.removesuffix("_cam.png")
    with Image.open(shown[0]) as drawn, Image.open(next((avc_run.folder / DATA).rglob(f"{image_id}.jpg"))) as image:
        assert drawn.size == image.size
        assert drawn.getpixel((10, 20)) == (255, 0, 0), "the chosen pixel is not marked"


def test_inference_shows_the_affinity_of_both_networks(pipeline, tmp_path):
    image = picture(tmp_path / "ellipse.jpg")
    run(tmp_path, "run_inference.py", "--model_path", pipeline.folder / STAGE2, "--images", image,
        "--output_dir", tmp_path / "out", "--show_affinity", "30,25", *MACHINE)
    names = sorted(path.name for path in (tmp_path / "out" / "affinity").iterdir())
    assert names == ["ellipse_affinitynet.png", "ellipse_cam.png"]


@pytest.mark.parametrize("flags, words", [
    (("run_inference.py", "--images", "ellipse.jpg", "--show_affinity", "61,0"), ("61,0", "61x50", "X below 61")),
    (("run_inference.py", "--show_affinity", "12"), ("12", "two whole numbers")),
    (("run_eval.py", "--mask_dir", "masks", "--show_affinity", "1,1"), ("--model_path",)),
    (("run_train.py", "--stage", 1, "--method", "avc", "--cutmix", 0.5, "--pretrained", "none"), ("--cutmix",)),
    (("run_train.py", "--stage", 1, "--avc_start", 0.95), ("0.9",)),
])
def test_mistakes_end_with_one_line_and_a_remedy_before_anything_is_written(pipeline, tmp_path, flags, words):
    picture(tmp_path / "ellipse.jpg")
    where = {"run_inference.py": ("--model_path", pipeline.folder / STAGE2),
             "run_train.py": ("--data_root", pipeline.folder / DATA)}.get(flags[0], ())
    done = finish(start(tmp_path, *flags, *where, "--output_dir", "output/refused", "--device", "cpu"))
    check_one_line(done, words)
    assert list(files(tmp_path)) == ["ellipse.jpg"], f"written: {sorted(files(tmp_path))}"
