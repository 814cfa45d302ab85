"""Every mistake a user can mend is refused in one line that says what, where and the remedy, and spoils nothing."""
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from script_runs import DATA, MACHINE, SMALL, chain, copy, files, finish, fork, mask_picture, read_json, start

from data.make_toy import make_toy
from models.build import build_network, pack
from models.weights import Weights, export
from utils.checkpoint import save_tensors

REFUSALS = {}  # name -> (function that spoils a folder, words that the error line must have)
LATE = set()  # refused in the midst of the work: what was finished before stays
ARGUMENTS = {  # refused before anything is read
    "crop_size_0": (("run_train.py", "--stage", 1, "--crop_size", 0), ("--crop_size", "at least 32")),
    "epochs_0": (("run_train.py", "--stage", 1, "--epochs", 0), ("--epochs", "at least 1")),
    "limit_0": (("run_eval.py", "--limit", 0), ("--limit", "at least 1")),
    "an_lr_that_is_no_number": (("train_deeplab.py", "--lr", "fast"), ("--lr", "fast")),
    "an_unknown_backbone": (("run_train.py", "--stage", 1, "--backbone", "vgg16"), ("--backbone", "vgg16", "resnet38")),
    "a_missing_stage": (("run_train.py",), ("--stage",)),
    "masks_and_checkpoint_together": (("run_eval.py", "--mask_dir", "m", "--model_path", "c"),
                                      ("--mask_dir", "--model_path", "pass one of them")),
}


def refusal(*words, late=False):
    """Declare a case: a function that spoils a copy of the finished pipeline and returns the command to be refused."""
    def declare(spoil):
        REFUSALS[spoil.__name__] = spoil, words
        if late:
            LATE.add(spoil.__name__)
        return spoil
    return declare


@chain
def refused(folder, get):
    """Every case, in a copy of the pipeline: name -> (the run, files before, files after, unfinished manifests)."""
    folders = {name: copy(get("pipeline").folder, folder / name) for name in REFUSALS}
    commands = {name: spoil(folders[name]) for name, (spoil, _) in REFUSALS.items()}
    before = {name: files(home) for name, home in folders.items()}
    runs = fork(folder, [(folders[name], commands[name]) for name in REFUSALS])
    return {name: (done, before[name], files(folders[name]), _unfinished(folders[name]))
            for name, done in zip(REFUSALS, runs)}


def _unfinished(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("manifest.json")
            if not read_json(path)["complete"]}


def _first_id(folder, split="trainval"):
    return (folder / DATA / "annotations" / f"{split}.txt").read_text().split()[0]


def _image(folder, split="trainval"):
    return folder / DATA / "images" / f"{_first_id(folder, split)}.jpg"


def _trimap(folder):
    return folder / DATA / "annotations" / "trimaps" / f"{_first_id(folder)}.png"


def _truncate(path):
    path.write_bytes(path.read_bytes()[:400])


STAGE_1 = ("run_train.py", "--stage", 1, *SMALL, "--crop_size", 65, "--output_dir", "output/new",
           "--cam_dir", "new_cams")
SCORE_MASKS = ("run_eval.py", "--mask_dir", "output/inference", "--output_dir", "output/new", *MACHINE)
DEEPLAB = ("train_deeplab.py", *SMALL, "--crop_size", 65, "--output_dir", "output/new")


@refusal("nowhere", "pass --data_root", "data.make_toy")
def a_missing_data_root(folder):
    return *STAGE_1, "--data_root", "nowhere"


@refusal("annotations/val.txt", "there is", "trainval")
def a_missing_split_file(folder):
    return *STAGE_1, "--split", "val"


@refusal("holds no image", "trainval", "--split")
def an_empty_split(folder):
    (folder / DATA / "annotations" / "trainval.txt").write_text("# nothing\n")
    return STAGE_1


@refusal("bullseye_hound_1", "no such image", "split file")
def an_id_without_an_image(folder):
    _image(folder).unlink()
    return STAGE_1


@refusal("cannot decode image", "bullseye_hound_1.jpg", "replace the file", late=True)
def a_truncated_image_in_training(folder):
    _truncate(_image(folder))
    return *STAGE_1, "--workers", 1


@refusal("cannot decode image", "bullseye_hound_2.jpg", "replace the file", late=True)
def a_truncated_image_while_cams_are_made(folder):
    _truncate(_image(folder, "test"))
    return "run_inference.py", "--split", "test", "--output_dir", "output/new", *MACHINE, "--workers", 1


@refusal("cannot decode image", "bullseye_hound_1.jpg", "replace the file", late=True)
def a_truncated_image_in_a_pool_of_crf_workers(folder):
    _truncate(_image(folder))
    return "run_inference.py", "--bg_threshold", 0.4, "--output_dir", "output/new", *MACHINE, "--workers", 2


@refusal("bullseye_hound_1.png", "9x9", "replace the file", late=True)
def a_trimap_of_another_size(folder):
    mask_picture(_trimap(folder), np.ones((9, 9)))
    return SCORE_MASKS


@refusal("bullseye_hound_1.png", "value 7", "1 (pet), 2 (background), 3 (border)", late=True)
def a_trimap_with_other_values(folder):
    mask_picture(_trimap(folder), np.full_like(np.asarray(Image.open(_trimap(folder))), 7))
    return SCORE_MASKS


@refusal("for bullseye_hound_1 in data/cams", "run: python run_train.py --stage 1", late=True)
def a_missing_cam(folder):
    (folder / "data" / "cams" / "bullseye_hound_1.npz").unlink()
    return "run_train.py", "--stage", 2, *SMALL, "--output_dir", "output/new"


@refusal("3 classes", "2 (", "--data_root")
def cams_of_other_classes(folder):
    make_toy(folder / "data" / "two", train=2, test=1, classes=2, size=48)
    return "run_train.py", "--stage", 2, *SMALL, "--output_dir", "output/new", "--data_root", "data/two"


@refusal("no data/empty/manifest.json", "run: python run_train.py --stage 1")
def a_folder_without_cams(folder):
    return "run_train.py", "--stage", 2, *SMALL, "--cam_dir", "data/empty"


@refusal("comes from stage1", "stage2 is needed", "--model_path")
def a_checkpoint_of_another_stage(folder):
    return "run_inference.py", "--model_path", "output/stage1_resnet18/model_best.pth.tar", *MACHINE


@refusal("3 classes", "2 (", "--model_path")
def a_checkpoint_of_another_class_list(folder):
    make_toy(folder / "data" / "two", train=2, test=1, classes=2, size=48)
    return "run_inference.py", "--data_root", "data/two", "--output_dir", "output/new", *MACHINE


@refusal("foreign.pth.tar is none of the known files of weights", "pass one of these", "PSA ResNet38 AffinityNet")
def a_foreign_checkpoint(folder):
    torch.save({"state_dict": {"conv.weight": torch.zeros(2)}}, folder / "foreign.pth.tar")
    return "run_inference.py", "--model_path", "foreign.pth.tar", *MACHINE


@refusal("noise.pth.tar", "damaged")
def a_file_that_is_no_checkpoint(folder):
    (folder / "noise.pth.tar").write_bytes(bytes(range(256)) * 8)
    return "test_deeplab.py", "--model_path", "noise.pth.tar", *MACHINE


class _Touch:
    """Unpickled without care, it writes a file: the refusal would be seen to have left something behind."""

    def __reduce__(self):
        return open, ("pickle_ran_code", "w")


@refusal("code.pth.tar", "could run code", "plain tensors")
def a_pickle_with_code(folder):
    torch.save({"format": "wsss-checkpoint-1", "step": "stage2", "x": _Touch()}, folder / "code.pth.tar")
    return "run_inference.py", "--model_path", "code.pth.tar", *MACHINE


@refusal("plain.pth.tar", "could run code", "plain tensors")
def a_bare_pickle_with_code(folder):
    (folder / "plain.pth.tar").write_bytes(pickle.dumps(_Touch(), protocol=2))
    return "run_inference.py", "--model_path", "plain.pth.tar", *MACHINE


@refusal("no checkpoint gone.pth.tar", "run the step that writes it")
def a_missing_checkpoint(folder):
    return "run_eval.py", "--model_path", "gone.pth.tar", *MACHINE


@refusal("knows 2 classes", "has 3", "--data_root")
def a_published_classifier_of_other_classes(folder):
    how = {"kind": "classifier", "backbone": "resnet38", "width": 0.05, "output_stride": 8, "classes": 2}
    state, _ = export(Weights("", "", {"classifier": pack(build_network(**how), **how)}), "psa")
    save_tensors(folder / "cls.pth", state)
    return "run_train.py", "--stage", 1, "--model_path", "cls.pth", "--output_dir", "output/new", *MACHINE


@refusal("has backbone resnet18, not resnet50", "leave --backbone out")
def another_backbone_than_the_checkpoints(folder):
    return ("run_train.py", "--stage", 1, "--model_path", "output/stage1_resnet18/model_best.pth.tar", "--backbone",
            "resnet50", "--output_dir", "output/new", *MACHINE)


@refusal("other.pth", "holds weights of resnet50", "pass --backbone resnet50")
def weights_of_another_backbone_before_labels_are_made(folder):
    save_tensors(folder / "other.pth", build_network("deeplab", "resnet50", classes=1).trunk.state_dict())
    return ("run_train.py", "--stage", 2, "--pretrained", "other.pth", "--alpha_low", 3, "--output_dir", "output/new",
            *MACHINE)


@refusal("no output/inference/manifest.json", "run: python run_inference.py")
def masks_never_made(folder):
    shutil.rmtree(folder / "output" / "inference")
    return DEEPLAB


@refusal("bullseye_hound_1.png", "run: python run_inference.py")
def a_missing_mask(folder):
    (folder / "output" / "inference" / "bullseye_hound_1.png").unlink()
    return DEEPLAB


@refusal("bullseye_hound_1.png is 9x8", "at the images' own size", late=True)
def a_mask_of_another_size_in_training(folder):
    mask_picture(folder / "output" / "inference" / "bullseye_hound_1.png", np.zeros((8, 9)))
    return *DEEPLAB, "--workers", 1


@refusal("bullseye_hound_1.png is 9x8", "at the images' own size", late=True)
def a_mask_of_another_size_in_scoring(folder):
    mask_picture(folder / "output" / "inference" / "bullseye_hound_1.png", np.zeros((8, 9)))
    return SCORE_MASKS


@refusal("no image nowhere.jpg", "--images")
def a_missing_images_path(folder):
    return "run_inference.py", "--images", "nowhere.jpg", "--output_dir", "output/new", *MACHINE


@refusal("sees no GPU", "--device cpu")
def cuda_without_a_gpu(folder):
    return "run_eval.py", *MACHINE, "--device", "cuda"


@refusal("output/locked")
def an_output_folder_that_is_read_only(folder):
    (folder / "output" / "locked").mkdir()
    (folder / "output" / "locked").chmod(0o555)
    return "run_inference.py", "--bg_threshold", 0.4, "--output_dir", "output/locked", *MACHINE


def check_one_line(done, words):
    """Exactly one line of stderr is the error; it ends the output and has the words."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("Error: ") or ".py: error: " in line]
    assert done.returncode not in (0, None) and len(errors) == 1 and lines[-1] == errors[0], \
        f"status {done.returncode}, {len(errors)} error lines in:\n{done.stderr}"
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    missing = [word for word in words if word not in errors[0]]
    assert not missing, f"{missing} not in: {errors[0]}"


@pytest.mark.parametrize("case", REFUSALS)
def test_a_mistake_is_refused_in_one_line_and_leaves_nothing_half_written(case, refused):
    if case == "cuda_without_a_gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if case == "an_output_folder_that_is_read_only" and os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    done, before, after, unfinished = refused[case]
    check_one_line(done, REFUSALS[case][1])
    new = set(after) - set(before)
    half = {name for name in new if name.endswith((".tmp", ".tar", "scores.json"))
            or name.endswith("manifest.json") and name not in unfinished}
    assert not half, f"left behind: {sorted(half)}"
    changed = {name for name in before if after.get(name) != before[name]}
    assert not changed, f"files of before that were touched: {sorted(changed)}"
    if case not in LATE:
        assert not new, f"written before the refusal: {sorted(new)}"


@pytest.mark.parametrize("case", ARGUMENTS)
def test_a_wrong_flag_is_refused_before_anything_is_read(case, tmp_path):
    (script, *flags), words = ARGUMENTS[case]
    done = finish(start(tmp_path, script, *flags))
    check_one_line(done, words)
    assert done.stderr.startswith(f"{script}: error: ") and done.returncode == 2, f"{done.returncode}: {done.stderr}"
    assert not files(tmp_path), f"written: {sorted(files(tmp_path))}"
