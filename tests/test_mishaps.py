"""What stops a run, or should not: full disks, read-only folders, killed workers, kill -9, damaged images."""
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from script_runs import DATA, MACHINE, ROOT, SMALL, STAGE2, chain, copy, fork, picture, read_json
from test_training import COUNT, EPOCHS, STEPS, Noise, classify, different, lines, run, tiny_task
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.kill_resume import compare
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import ImageError, UserError
from utils.files import save_cam, save_scores
from utils.loader import TrainingSamples
from utils.transforms import Augmentation


@chain
def killed(folder, get):
    return compare(folder, epochs=4, kills=3)


def test_kill_9_at_random_moments_and_while_a_checkpoint_is_written_changes_no_bit(killed):
    assert killed["kills"] == 3 and killed["half_written"] >= 1, f"{killed}: no kill fell into a checkpoint's writing"
    assert not any(killed["differing"].values()), killed
    assert not killed["left_behind"], "half-written files of killed runs are still there"


# --- disks ----------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def small_disk(folder, options="size=200k"):
    """A disk of its own at a folder; skips the test where none can be mounted."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# In a process of its own: the limit holds for every file a process writes.
SHORT_FILES = """
import resource, signal, sys, torch
from utils.checkpoint import save_checkpoint
from utils.runtime import run_main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
run_main(lambda: save_checkpoint(sys.argv[1], {"step": "stage1", "value": torch.rand(9000)}))
"""


def line_of(caught):
    text = str(caught.value)
    assert "\n" not in text, text
    return text


def test_a_disk_that_fills_up_stops_the_run_in_one_line_and_the_last_checkpoint_goes_on(tmp_path):
    whole = tiny_task(validate=lambda network: {"score": 0.0})
    run(tmp_path / "whole", whole)
    with small_disk(tmp_path / "small") as disk:
        epochs = []

        def validate(network):
            epochs.append(1)
            if len(epochs) == 2:
                with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
                    while filler.write(bytes(512)):
                        pass
            return {"score": 0.0}
        with pytest.raises(UserError) as caught:
            run(disk / "run", tiny_task(validate=validate))
        text = line_of(caught)
        assert "cannot write" in text and "No space left" in text and "--resume" in text, text
        assert not [path.name for path in (disk / "run").iterdir() if path.suffix == ".tmp"], "a part was left behind"
        kept = load_checkpoint(disk / "run" / "checkpoint.pth.tar")
        assert (kept["epoch"], kept["step_in_epoch"]) == (1, 0), "the last good checkpoint is another"
        (disk / "filler").unlink()
        task = tiny_task(validate=lambda network: {"score": 0.0})
        run(disk / "run", task, resume=True)
        assert not different(whole.network, task.network)
        assert lines(disk / "run")[-1]["epoch"] == EPOCHS - 1


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "checkpoint.pth.tar"
    save_checkpoint(path, {"step": "stage1", "value": 1})
    done = subprocess.run([sys.executable, "-c", SHORT_FILES, str(path)], cwd=ROOT, capture_output=True, text=True)
    (text,) = done.stderr.splitlines()
    assert done.returncode == 1 and text.startswith(f"Error: cannot write {path} (File too large)"), text
    assert "the one written before is kept" in text and "--resume" in text, text
    assert load_checkpoint(path)["value"] == 1 and [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_read_only_output_folder_is_one_line(tmp_path):
    with small_disk(tmp_path / "locked", "ro,size=200k") as disk, pytest.raises(OSError) as caught:
        run(disk / "run", tiny_task())
    text = line_of(caught)
    assert "Read-only file system" in text and "locked" in text, text


# --- data workers ---------------------------------------------------------------------------------------------------

class Deadly(Noise):
    """Its worker is killed, as by the system when memory runs out, in the second epoch."""

    def __init__(self):
        super().__init__()
        self.main = os.getpid()

    def image(self, index):
        if os.getpid() != self.main and os.path.exists("armed"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().image(index)


def test_a_worker_killed_by_the_system_is_one_line_and_the_last_checkpoint_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def validate(network):
        (tmp_path / "armed").touch()
        return {"score": 0.0}
    task = tiny_task(validate=validate)
    task.samples.dataset = Deadly()
    with pytest.raises(UserError) as caught:
        run(tmp_path / "run", task, workers=1)
    text = line_of(caught)
    assert "the system ended a process that reads images" in text and "fewer --workers (now 1)" in text, text
    assert "--resume" in text, text
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")["epoch"] == 1


# --- damaged images -------------------------------------------------------------------------------------------------

class Spoilt(Noise):
    def __init__(self, *bad):
        super().__init__()
        self.bad = bad

    def image(self, index):
        if index in self.bad:
            raise ImageError(f"cannot decode image {self.ids[index]}.jpg")
        return super().image(index)


def spoilt_task(skip_bad, *bad):
    task = tiny_task()
    task.samples = TrainingSamples(Spoilt(*bad), Augmentation(17), 3, skip_bad=skip_bad)
    return task


def test_a_damaged_image_ends_the_run_unless_it_is_to_be_skipped(tmp_path):
    with pytest.raises(ImageError, match="cannot decode image noise_4.jpg"):
        run(tmp_path, spoilt_task(False, 4))


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_replaced_by_the_next_and_named_and_the_run_repeats(tmp_path, workers, capsys):
    states = []
    for name in ("first", "again"):
        task = spoilt_task(True, 4, 9)
        run(tmp_path / name, task, workers=workers)
        states.append(task.network)
        record = read_json(tmp_path / name / "options.json")["failures"]
        assert record == {"noise_4": "cannot decode image noise_4.jpg", "noise_9": "cannot decode image noise_9.jpg"}
    assert not different(*states), "two runs with the same damaged images differ"
    said = capsys.readouterr().err
    assert said.count("Skipping noise_4") == 2, "said once in each run"
    sample = task.samples[0, 9]
    assert sample["index"] == 0, f"{sample['index']} stands for the last image, not the first"


def test_a_set_without_a_good_image_is_refused():
    with pytest.raises(UserError, match="none of the 10 training images can be decoded, such as: cannot decode"):
        spoilt_task(True, *range(COUNT)).samples[0, 3]


def copy_file(source, target):
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(source.read_bytes())


@chain
def skipped(folder, get):
    """The six steps after one training image was damaged.  .folder, .runs, .image_id, .without: the run that stops."""
    home = copy(get("pipeline").folder, folder / "home", without=("inference", "eval", "deeplab_test", "scores"))
    image = sorted((home / DATA / "images").glob("bullseye*.jpg"))[0]
    image.write_bytes(image.read_bytes()[:300])
    for name, source in (("good.jpg", sorted((home / DATA / "images").glob("*.jpg"))[-1]), ("bad.jpg", image)):
        copy_file(source, home / "photos" / name)
    skip = ("--on_bad_image", "skip", *MACHINE)
    commands = [("run_train.py", "--stage", 1, *SMALL, "--crop_size", 65, "--scales", 1, "--cam_dir", "new/cams",
                 "--output_dir", "new/1", *skip),
                ("run_train.py", "--stage", 2, *SMALL, "--cam_dir", "new/cams", "--output_dir", "new/2", *skip),
                ("run_inference.py", "--model_path", "new/2/model_best.pth.tar", "--output_dir", "new/3", *skip,
                 "--bg_threshold", 0.01),  # so that masks of hardly trained networks show something
                ("run_inference.py", "--model_path", STAGE2, "--output_dir", "new/3b", *skip, "--workers", 2),
                ("run_eval.py", "--model_path", "new/2/model_best.pth.tar", "--output_dir", "new/4", *skip),
                ("run_inference.py", "--images", "photos", "--model_path", STAGE2, "--output_dir", "new/3c", *skip),
                ("train_deeplab.py", *SMALL, "--crop_size", 65, "--mask_dir", "new/3", "--output_dir", "new/5")]
    return SimpleNamespace(folder=home, runs=fork(folder, [(home, command) for command in commands]), image=image)


def test_every_step_goes_on_without_a_damaged_image_and_names_it(skipped):
    bad = [(done.args, done.stderr[-1500:]) for done in skipped.runs if done.returncode]
    assert not bad, f"{bad[0][0]}:\n{bad[0][1]}"
    for place in ("new/cams", "new/2/affinity_labels", "new/3", "new/3b"):
        manifest = read_json(skipped.folder / place / "manifest.json")
        (failure,) = manifest["failures"]
        assert failure["image"] == skipped.image.stem and skipped.image.name in failure["reason"], failure
        assert skipped.image.stem not in manifest["images"] and manifest["count"] == len(manifest["images"]) == 11
    assert read_json(skipped.folder / "new/1/options.json")["failures"].keys() <= {skipped.image.stem}
    scored = read_json(skipped.folder / "new/4/scores.json")
    assert scored["images"] == 11 and skipped.image.stem not in scored["image_fg_iou"], scored["images"]


def test_a_damaged_one_of_some_photos_is_skipped(skipped):
    made = sorted(path.name for path in (skipped.folder / "new/3c").iterdir())
    assert made == ["good.png", "good_overlay.png", "wsss_images.json"], made
    said = skipped.runs[-2].stderr
    assert "Skipping photos/bad.jpg: cannot decode image" in said, said


def test_later_steps_leave_it_out_without_being_told(skipped):
    said = skipped.runs[-1].stderr
    assert "Leaving out 1 images that new/3 was made without" in said and skipped.image.stem in said, said


# --- a gradient that is not finite ----------------------------------------------------------------------------------

def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    def loss(network, batch, micro):
        value, terms = classify(network, batch, micro)
        return value + torch.sqrt(network.head.weight.sum() * 0), terms  # 0, but of infinite slope
    task = tiny_task(loss)
    with pytest.raises(UserError, match="the gradient is not finite at step 0"):
        run(tmp_path, task)
    assert all(torch.isfinite(tensor).all() for tensor in task.network.state_dict().values())


def test_a_diverged_training_stops_before_it_becomes_the_best(tmp_path):
    def loss(network, batch, micro):
        value, terms = classify(network, batch, micro)
        return value + 1e6, terms  # finite
    with pytest.raises(UserError, match="training has diverged: the mean loss of epoch 1 is .*; lower --lr"):
        run(tmp_path, tiny_task(loss))
    assert not (tmp_path / "model_best.pth.tar").exists(), sorted(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_the_last_step_made_infinite_never_become_the_best(tmp_path, value):
    task, steps = tiny_task(), []

    def after(optimiser, *_):
        steps.append(1)
        if len(steps) == STEPS:
            with torch.no_grad():
                task.network.head.weight[0, 0] = value
    hook = register_optimizer_step_post_hook(after)
    try:
        with pytest.raises(UserError, match="training has diverged: the network's weights or outputs are not finite"):
            run(tmp_path, task, epochs=1)
    finally:
        hook.remove()
    assert len(steps) == STEPS and not (tmp_path / "model_best.pth.tar").exists(), sorted(tmp_path.iterdir())


@pytest.mark.parametrize("save, shape", [(save_cam, (1, 4, 4)), (save_scores, (2, 4, 4))])
def test_maps_that_are_not_finite_are_not_written(tmp_path, save, shape):
    maps = np.ones(shape, np.float32)
    maps[-1, 0, 0] = np.nan
    with pytest.raises(UserError, match="the maps of photo are not finite: .*lower --lr"):
        save(tmp_path, "photo", [0], maps, (16, 16))
    assert not list(tmp_path.iterdir())


@chain
def unread(folder, get):
    """Scores of masks, and masks with affinities shown, where one photo has no header and one ends early."""
    copy(get("pipeline").folder, folder, without=("deeplab*", "walks"))
    first, second = (folder / DATA / "annotations/trainval.txt").read_text().splitlines()[:2]
    headless, short = ((folder / DATA / "images" / f"{line.split()[0]}.jpg") for line in (first, second))
    masks = folder / "masks"
    shutil.copytree(folder / "output/inference", masks)
    (masks / "manifest.json").unlink()  # masks of somebody else
    headless.write_bytes(b"no picture")
    short.write_bytes(short.read_bytes()[:-400])
    (folder / "photos").mkdir()
    for number, path in enumerate((headless, short)):
        shutil.copy(path, folder / "photos" / f"{number}.jpg")
    picture(folder / "photos" / "2.jpg")
    scoring = ("run_eval.py", "--mask_dir", "masks", *MACHINE)
    shown = ("run_inference.py", "--images", "photos", "--show_affinity", "5,5", "--output_dir", "shown", *MACHINE)
    return SimpleNamespace(runs=fork(folder, [(folder, (*command, *skip)) for command in (scoring, shown)
                                              for skip in ((), ("--on_bad_image", "skip"))]), folder=folder)


def test_damaged_photos_are_skipped_where_masks_are_scored_and_affinities_shown(unread):
    refused, scored, refused_too, shown = unread.runs
    for done in (refused, refused_too):
        assert done.returncode == 1 and "cannot decode image" in done.stderr, done.stderr[-500:]
    assert scored.returncode == 0, scored.stderr[-2000:]
    assert "Leaving out 1 images that cannot be decoded" in scored.stderr, scored.stderr
    assert read_json(unread.folder / "output/eval/scores.json")["images"] == 11
    assert shown.returncode == 0, shown.stderr[-2000:]
    names = {path.name for path in (unread.folder / "shown/affinity").iterdir()}
    assert names == {"2_cam.png", "2_affinitynet.png"} and "in 1 images to" in shown.stdout, (names, shown.stdout)
