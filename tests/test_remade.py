"""Finished work of the scripts: used again where nothing differs, made again with --overwrite as far as something does,
and taken up where it was interrupted."""
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
from script_runs import (
    DATA,
    MACHINE,
    SMALL,
    STAGE2,
    chain,
    copy,
    files,
    fork,
    interrupt_when,
    picture,
    read_json,
    start,
)
from test_refusals import check_one_line

from data.make_toy import make_toy
from utils.files import load_arrays

SCORES = "output/stage2_resnet18/scores"
WALKS, CAMS = f"{SCORES}/walk_trainval_gt", f"{SCORES}/cam_trainval_gt"
LABELS, MASKS = "output/stage2_resnet18/affinity_labels", "output/inference"
INFER = ("run_inference.py", "--model_path", STAGE2, *MACHINE)
ADOPT = ("run_train.py", "--stage", 1, "--model_path", "output/stage1_resnet18/model_best.pth.tar", *MACHINE)
FIRST = "bullseye_hound_1"
IDS = [f"{name}_{number}" for number in (1, 3, 5, 7) for name in (FIRST[:-2], "Crossmark_cat", "dotted_terrier")]


def replace_photo(folder):
    picture(folder / DATA / "images" / f"{FIRST}.jpg", 56, 56)


def correct_label(folder):
    """Give the first image the class of the second."""
    path = folder / DATA / "annotations" / "trainval.txt"
    first, second, *rest = path.read_text().splitlines()
    path.write_text("\n".join([" ".join([first.split()[0], *second.split()[1:]]), second, *rest]) + "\n")


def second_dataset(folder):
    """Other photos of the same classes, with the same names."""
    make_toy(folder / "data" / "second", train=12, test=6, classes=3, size=56, seed=1)


CASES = {  # name -> (what is done to a copy of the pipeline, the runs one after the other)
    "same": (None, {"masks": INFER, "labels": ("run_train.py", "--stage", 2, *SMALL, "--overwrite"),
                    "cams": (*ADOPT, "--scales", 1, "--overwrite")}),
    "settings": (None, {"masks": (*INFER, "--no-crf", "--bg_threshold", 0.3, "--overwrite"),
                        "labels": ("run_train.py", "--stage", 2, *SMALL, "--alpha_high", 16, "--overwrite"),
                        "scales": (*INFER, "--scales", 1, 1.5, "--no-crf", "--overwrite"),
                        "cams": (*ADOPT, "--scales", 1, 1.5, "--overwrite")}),
    "second": (second_dataset, {"masks": (*INFER, "--data_root", "data/second", "--overwrite"),
                                "cams": (*ADOPT, "--scales", 1, "--data_root", "data/second", "--overwrite"),
                                "again": (*INFER, "--data_root", "data/second", "--dry_run")}),
    "photo": (replace_photo, {"masks": (*INFER, "--overwrite"), "cams": (*ADOPT, "--scales", 1, "--overwrite"),
                              "again": (*INFER, "--dry_run")}),
    "label": (correct_label, {"masks": (*INFER, "--overwrite"), "cams": (*ADOPT, "--scales", 1, "--overwrite"),
                              "again": (*INFER, "--dry_run")}),
}


@chain
def remade(folder, get):
    """Every case: name -> SimpleNamespace(.folder; .seen: {"first" or a run: files after it}, .said: {run: stderr})."""
    done = {}
    for name, (change, _) in CASES.items():
        home = copy(get("pipeline").folder, folder / name, without=("deeplab*", "walks", "overlays"))
        done[name] = SimpleNamespace(folder=home, seen={"first": files(home)}, said={})
        if change is not None:
            change(home)
    for step in range(max(len(runs) for _, runs in CASES.values())):  # the same step of each case in one process
        jobs = {name: list(runs.items())[step] for name, (_, runs) in CASES.items() if step < len(runs)}
        runs = fork(folder, [(done[name].folder, command) for name, (_, command) in jobs.items()])
        for (name, (run_name, _)), run in zip(jobs.items(), runs):
            assert run.returncode == 0, f"{name}, {run_name}: {run.stderr[-2000:]}"
            done[name].said[run_name], done[name].seen[run_name] = run.stderr, files(done[name].folder)
    return done


def written(done, before, after, folder, suffix):
    """The ids of a folder's files that were written between two moments."""
    names = {image_id: f"{folder}/{image_id}{suffix}" for image_id in IDS}
    absent = [name for name in names.values() if name not in done.seen[after]]
    assert not absent, f"not there after the run: {absent}"
    return [image_id for image_id, name in names.items() if done.seen[before].get(name) != done.seen[after][name]]


def test_with_the_same_options_and_data_every_step_keeps_what_is_there(remade):
    done = remade["same"]
    for run, folder, suffix in (("masks", MASKS, ".png"), ("masks", WALKS, ".npz"), ("labels", LABELS, ".png"),
                                ("cams", "data/cams", ".npz")):
        touched = written(done, "first", run, folder, suffix)
        assert not touched, f"{folder}: written again: {touched}"
    assert not [name for name in done.seen["masks"] if name.startswith(CAMS)], "step 1's CAMs were not used"


def test_other_options_of_the_masks_redo_these_but_not_the_walk(remade):
    done = remade["settings"]
    masks = written(done, "first", "masks", MASKS, ".png")
    assert masks == IDS, f"{len(masks)} of 12 masks were made again"
    walks = written(done, "first", "masks", WALKS, ".npz")
    assert not walks, f"walks computed again for another threshold: {walks}"


def test_other_options_of_the_affinity_labels_redo_these_but_not_the_cams(remade):
    done = remade["settings"]
    labels = written(done, "masks", "labels", LABELS, ".png")
    assert labels == IDS, f"{len(labels)} of 12 labels were made again"
    cams = written(done, "first", "labels", "data/cams", ".npz")
    assert not cams, f"CAMs made again: {cams}"
    assert read_json(done.folder / LABELS / "manifest.json")["options"]["alpha_high"] == 16


def test_other_scales_redo_everything_from_the_cams_on_and_leave_step_1s_alone(remade):
    done = remade["settings"]
    for folder, suffix in ((CAMS, ".npz"), (WALKS, ".npz"), (MASKS, ".png")):
        made = written(done, "labels", "scales", folder, suffix)
        assert made == IDS, f"{folder}: {len(made)} of 12 were made again"
    kept = written(done, "first", "scales", "data/cams", ".npz")
    assert not kept, f"step 1's CAMs were touched: {kept}"
    assert written(done, "scales", "cams", "data/cams", ".npz") == IDS, "--overwrite did not reach step 1's own folder"


def arrays(folder, place, name):
    return [load_arrays(folder / place, image_id, name, name, remedy="-")[0] for image_id in IDS]


def test_another_dataset_with_the_same_names_gets_cams_walks_and_masks_of_its_own(pipeline, remade):
    done = remade["second"]
    assert "Using the CAMs in data/cams" not in done.said["masks"]
    for run, folder, suffix in (("masks", CAMS, ".npz"), ("masks", WALKS, ".npz"), ("masks", MASKS, ".png"),
                                ("cams", "data/cams", ".npz")):
        made = written(done, "first", run, folder, suffix)
        assert made == IDS, f"{folder}: {len(made)} of 12 were made again"
    for place, name in (("data/cams", "cam"), (WALKS, "probabilities")):
        pairs = zip(arrays(pipeline.folder, place, name), arrays(done.folder, place, name))
        same = [image_id for image_id, (one, other) in zip(IDS, pairs) if np.array_equal(one, other)]
        assert not same, f"{place}: those of the first dataset for {same}"
    masks = [[(home / MASKS / f"{image_id}.png").read_bytes() for image_id in IDS]
             for home in (pipeline.folder, done.folder)]
    same = [image_id for image_id, one, other in zip(IDS, *masks) if one == other]
    assert len(same) < 6, f"masks of the first dataset: {same}"  # two may be all background
    both = zip(arrays(done.folder, CAMS, "cam"), arrays(done.folder, "data/cams", "cam"))
    assert all(np.array_equal(one, other) for one, other in both), "steps 1 and 3 made different CAMs of one dataset"


@pytest.mark.parametrize("case", ["photo", "label"])
def test_after_a_photo_was_replaced_or_a_label_corrected_only_its_files_are_made_again(case, remade, pipeline):
    done = remade[case]
    for run, folder, suffix in (("masks", WALKS, ".npz"), ("masks", MASKS, ".png"), ("cams", "data/cams", ".npz")):
        made = written(done, "first", run, folder, suffix)
        assert made == [FIRST], f"{folder}: made again: {made}"
    (keys, cam), (keys_before, before) = (load_arrays(home / "data/cams", FIRST, "keys", "cam", remedy="-")
                                          for home in (done.folder, pipeline.folder))
    if case == "label":
        assert (keys_before.tolist(), keys.tolist()) == ([0], [1]), f"the CAM is of class {keys}, was of {keys_before}"
    else:
        assert keys.tolist() == keys_before.tolist() and not np.array_equal(cam, before), "the CAM is the old photo's"


@pytest.mark.parametrize("case", ["photo", "label", "second"])
def test_what_was_made_again_is_used_again(case, remade):
    """The manifests say what is there now: nothing is stale any more."""
    done = remade[case]
    assert "Dry run: everything checked" in done.said["again"], done.said["again"]


# --- interrupted -----------------------------------------------------------------------------------------------------

TRAIN = ("run_train.py", "--stage", 1, *SMALL, "--crop_size", 65, "--epochs", 4, "--batch_size", 2, "--scales", 1)
HALF = IDS[7]  # where the CAM step is interrupted


@chain
def cut_short(folder, get):
    """Step 1, resumed where only its CAMs are missing, interrupted in their midst, and taken up again."""
    home = copy(get("pipeline").folder, folder / "home", without=("stage2*", "deeplab*", "inference", "eval", "cams"))
    photo = home / DATA / "images" / f"{HALF}.jpg"
    photo.rename(home / "aside.jpg")
    os.mkfifo(photo)  # whoever reads it waits, until Ctrl-C
    cams = home / "data/cams"

    def waits_for_the_photo():
        if not (cams / f"{IDS[6]}.npz").is_file():
            return False
        time.sleep(1)  # from the last CAM to the next photo: within a finaliser, Ctrl-C would be lost
        return True
    stopped = interrupt_when(start(home, *TRAIN, "--resume"), waits_for_the_photo)
    photo.unlink()
    (home / "aside.jpg").rename(photo)
    seen, manifest = files(home), read_json(cams / "manifest.json")
    commands = [("run_train.py", "--stage", 2, *SMALL), (*ADOPT, "--scales", 1, 1.5),
                (*TRAIN, "--resume")]
    early, other, resumed = fork(folder, [(home, command) for command in commands])
    return SimpleNamespace(folder=home, stopped=stopped, manifest=manifest, early=early, other=other, resumed=resumed,
                           seen={"stopped": seen, "resumed": files(home)})


def test_ctrl_c_in_the_cam_step_keeps_what_is_finished(cut_short):
    assert cut_short.stopped.returncode == 130, cut_short.stopped.stderr
    made = sorted(name for name in cut_short.seen["stopped"] if name.endswith(".npz"))
    assert made == sorted(f"data/cams/{image_id}.npz" for image_id in IDS[:7]), made
    assert cut_short.manifest["complete"] is False and not any(".tmp" in name for name in cut_short.seen["stopped"])


def test_an_interrupted_cam_step_is_not_taken_for_a_finished_one(cut_short):
    check_one_line(cut_short.early, ("data/cams is unfinished", "run: python run_train.py --stage 1", "are kept"))


def test_an_interrupted_cam_step_is_taken_up_again_and_makes_only_the_rest(cut_short, pipeline):
    assert cut_short.resumed.returncode == 0, cut_short.resumed.stderr
    made = written(cut_short, "stopped", "resumed", "data/cams", ".npz")
    assert made == IDS[7:], f"made in the second run: {made}"
    manifest = read_json(cut_short.folder / "data/cams/manifest.json")
    assert manifest["complete"] and manifest["count"] == 12, manifest["count"]
    pairs = zip(arrays(pipeline.folder, "data/cams", "cam"), arrays(cut_short.folder, "data/cams", "cam"))
    assert all(np.array_equal(one, other) for one, other in pairs), "CAMs differ from those of an uninterrupted run"


def test_finished_cams_survive_a_run_with_one_other_option(cut_short):
    check_one_line(cut_short.other, ("7 finished files", "scales was [1.0], is [1.0, 1.5]", "--overwrite"))
    kept = {name for name in cut_short.seen["stopped"] if name.endswith(".npz")} & set(cut_short.seen["resumed"])
    assert len(kept) == 7, f"kept of 7: {sorted(kept)}"
