"""Every mistake a user can mend is refused in one line that says what, where and the remedy, and spoils nothing; what
can be known before the work, a dry run refuses too."""
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from script_runs import (
    DATA,
    MACHINE,
    SMALL,
    STAGE2,
    chain,
    copy,
    files,
    fork,
    mask_picture,
    picture,
    random_weights,
    read_json,
)

from data.make_toy import make_toy

REFUSALS = {}  # name -> (function that spoils a folder, words that the error line must have)
LATE = set()  # not refused by a dry run, but in the midst of the work: what was finished before stays
ARGUMENTS = {  # refused before anything is read
    "crop_size_0": (("run_train.py", "--stage", 1, "--crop_size", 0), ("--crop_size", "at least 32")),
    "epochs_0": (("run_train.py", "--stage", 1, "--epochs", 0), ("--epochs", "at least 1")),
    "limit_0": (("run_eval.py", "--limit", 0), ("--limit", "at least 1")),
    "an_lr_that_is_no_number": (("train_deeplab.py", "--lr", "fast"), ("--lr", "fast")),
    "a_fraction_above_1": (("run_train.py", "--stage", 1, "--cutmix", 1.5), ("--cutmix", "at most 1")),
    "a_range_from_its_end": (("run_train.py", "--stage", 1, "--long_side", 600, 400),
                             ("--long_side", "its minimum 600 is above its maximum 400")),
    "an_infinite_scale": (("run_train.py", "--stage", 1, "--scales", 1, "inf"), ("--scales", "at most 8")),
    "a_seed_of_64_bits": (("run_train.py", "--stage", 1, "--seed", 2 ** 64 - 1), ("--seed", "at most 4294967295")),
    "an_unknown_dataset": (("run_train.py", "--stage", 1, "--dataset", "imagenet"), ("--dataset", "pet", "folder")),
    "a_flag_of_another_step": (("run_train.py", "--stage", 2, "--method", "cam"), ("--method",)),
    "known_labels_of_any_image": (("run_inference.py", "--images", "x.jpg", "--labels", "gt"),
                                  ("--images", "--labels")),
    "a_choice_of_any_image": (("run_inference.py", "--images", "x", "--limit", 1, "--split", "foo", "--ids", "nofile"),
                              ("--split and --ids and --limit", "--images", "leave one of them out")),
    "a_choice_of_any_image_by_deeplab": (("test_deeplab.py", "--images", "x", "--limit", 1),
                                         ("--limit", "--images", "leave one of them out")),
    "a_training_flag_beside_a_finished_classifier": (
        ("run_train.py", "--stage", 1, "--model_path", "c", "--cutmix", 0.5, "--avc_start", 0.5),
        ("--cutmix and --avc_start", "--model_path takes a classifier as it is", "leave one")),
    "flags_of_networks_beside_masks": (
        ("run_eval.py", "--mask_dir", "m", "--no-crf", "--bg_threshold", 0.01, "--scales", 3),
        ("--scales and --bg_threshold and --no-crf", "--mask_dir scores masks as they are", "leave one of them out")),
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
    """Every case, in a copy of the pipeline: name -> ([the dry run unless it is late, the run], files before, files
    after, unfinished manifests)."""
    folders = {name: copy(get("pipeline").folder, folder / name) for name in REFUSALS}
    commands = {name: spoil(folders[name]) for name, (spoil, _) in REFUSALS.items()}
    before = {name: files(home) for name, home in folders.items()}
    jobs = [(name, (*commands[name], *dry)) for name in REFUSALS
            for dry in (((),) if name in LATE else (("--dry_run",), ()))]
    runs = {}
    for (name, _), done in zip(jobs, fork(folder, [(folders[name], command) for name, command in jobs])):
        runs.setdefault(name, []).append(done)
    return {name: (runs[name], before[name], files(folders[name]), _unfinished(folders[name])) for name in REFUSALS}


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


def _without_pretrained(command):
    place = command.index("--pretrained")
    return command[:place] + command[place + 2:]


def _second(folder):
    """Another dataset with the same classes, names and sizes of files."""
    make_toy(folder / "data" / "second", train=12, test=6, classes=3, size=56, seed=1)
    return "--data_root", "data/second"


def _replace_photo(folder):
    picture(_image(folder), *Image.open(_image(folder)).size[::-1])


def _correct_label(folder):
    """Give the first image the class of the second."""
    path = folder / DATA / "annotations" / "trainval.txt"
    first, second, *rest = path.read_text().splitlines()
    path.write_text("\n".join([" ".join([first.split()[0], *second.split()[1:]]), second, *rest]) + "\n")


STAGE_1 = ("run_train.py", "--stage", 1, *SMALL, "--crop_size", 65, "--output_dir", "output/new",
           "--cam_dir", "new_cams")
SCORE_MASKS = ("run_eval.py", "--mask_dir", "output/inference", "--output_dir", "output/new", *MACHINE)
STAGE_2 = ("run_train.py", "--stage", 2, *SMALL, "--output_dir", "output/new")
MASKS = ("run_inference.py", "--model_path", STAGE2, *MACHINE)
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


@refusal("no image of split all in data/mine has a label", "stage 1 needs image labels")
def images_without_any_label(folder):
    picture(folder / "data" / "mine" / "images" / "a.jpg")
    (folder / "data" / "mine" / "classes.txt").write_text("cat\n")
    (folder / "data" / "mine" / "labels.csv").write_text("a,\n")
    return *STAGE_1, "--dataset", "folder"


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
def a_damaged_image_in_a_pool_of_crf_workers(folder):
    """Of the size and time that the image had when it was whole, so that its scores are still taken for its own."""
    path = _image(folder)
    whole, times = path.read_bytes(), path.stat()
    path.write_bytes(whole[:400] + bytes(len(whole) - 400))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return *MASKS, "--bg_threshold", 0.4, "--output_dir", "output/new", "--workers", 2


@refusal("bullseye_hound_1.png", "9x9", "replace the file", late=True)
def a_trimap_of_another_size(folder):
    mask_picture(_trimap(folder), np.ones((9, 9)))
    return SCORE_MASKS


@refusal("bullseye_hound_1.png", "value 7", "1 (pet), 2 (background), 3 (border)", late=True)
def a_trimap_with_other_values(folder):
    mask_picture(_trimap(folder), np.full_like(np.asarray(Image.open(_trimap(folder))), 7))
    return SCORE_MASKS


@refusal("no CAM for bullseye_hound_1 in data/cams (and 0 more)", "run: python run_train.py --stage 1", "--limit")
def a_missing_cam(folder):
    (folder / "data" / "cams" / "bullseye_hound_1.npz").unlink()
    return STAGE_2


@refusal("3 classes", "2 (", "--data_root")
def cams_of_other_classes(folder):
    make_toy(folder / "data" / "two", train=2, test=1, classes=2, size=48)
    return *STAGE_2, "--data_root", "data/two"


@refusal("no data/empty/manifest.json", "run: python run_train.py --stage 1")
def a_folder_without_cams(folder):
    return "run_train.py", "--stage", 2, *SMALL, "--cam_dir", "data/empty"


@refusal("comes from stage2", "stage1 is needed", "--model_path")
def a_checkpoint_of_another_stage(folder):
    return ("run_train.py", "--stage", "1", "--model_path", "output/stage2_resnet18/model_best.pth.tar", "--cam_dir",
            "data/other", *MACHINE)


@refusal("has no AffinityNet to walk with", "--save_walk")
def a_walk_without_an_affinitynet(folder):
    return ("run_inference.py", "--model_path", "output/stage1_resnet18/model_best.pth.tar", "--output_dir",
            "output/new", "--save_walk", *MACHINE)


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
    random_weights(folder, "cls.pth", "psa", kind="classifier", backbone="resnet38", width=0.05, output_stride=8,
                   classes=2)
    return "run_train.py", "--stage", 1, "--model_path", "cls.pth", "--output_dir", "output/new", *MACHINE


@refusal("has backbone resnet18, not resnet50", "leave --backbone out")
def another_backbone_than_the_checkpoints(folder):
    return ("run_train.py", "--stage", 1, "--model_path", "output/stage1_resnet18/model_best.pth.tar", "--backbone",
            "resnet50", "--output_dir", "output/new", *MACHINE)


@refusal("other.pth", "holds weights of resnet50", "pass --backbone resnet50")
def weights_of_another_backbone_before_labels_are_made(folder):
    random_weights(folder, "other.pth", "backbone", kind="deeplab", backbone="resnet50", classes=1)
    return ("run_train.py", "--stage", 2, "--pretrained", "other.pth", "--alpha_low", 3, "--output_dir", "output/new",
            *MACHINE)


# --- networks and methods that cannot be trained ---------------------------------------------------------------------

@refusal("unknown backbone 'vgg5'", "--backbone", "resnet38")
def an_unknown_backbone_of_the_classifier(folder):
    return *STAGE_1, "--backbone", "vgg5"


@refusal("resnet18 has no other width than its own", "pass --width 1")
def a_width_of_a_backbone_that_has_but_one(folder):
    return *STAGE_1, "--width", 0.5


@refusal("unknown backbone 'vgg5'", "--backbone", "resnet38")
def an_unknown_backbone_of_affinitynet(folder):
    return *STAGE_2, "--backbone", "vgg5"


@refusal("unknown backbone 'vgg5'", "--backbone", "resnet38")
def an_unknown_backbone_of_deeplab(folder):
    return *DEEPLAB, "--backbone", "vgg5"


@refusal("unknown seed method 'best'", "--method cam, common, avc")
def an_unknown_method(folder):
    return *STAGE_1, "--method", "best"


@refusal("--method common reads pretrained features", "--pretrained PATH", "--method cam")
def common_from_random_weights(folder):
    return *STAGE_1, "--method", "common"


@refusal("--method common needs the features of the pretrained backbone", "--freeze 4")
def common_with_too_few_frozen_blocks(folder):
    random_weights(folder, "weights.pth", "backbone", kind="classifier", backbone="resnet18", classes=1)
    return *STAGE_1, "--method", "common", "--pretrained", "weights.pth", "--freeze", 3


@refusal("--cutmix", "--method avc", "leave one of them out")
def avc_with_cutmix(folder):
    return *STAGE_1, "--method", "avc", "--cutmix", 0.5


@refusal("--cutmix and --long_side and --bn:", "--head_only or --method mixture", "--method cam to train")
def training_flags_of_a_mixture_whose_head_is_fitted(folder):
    random_weights(folder, "weights.pth", "backbone", kind="classifier", backbone="resnet18", classes=1)
    return (*STAGE_1, "--pretrained", "weights.pth", "--cutmix", 0.5, "--long_side", 40, 60, "--bn", "train")


@refusal("--cutmix:", "nothing is trained, by --head_only", "leave it out")
def cutmix_of_a_head_that_is_fitted(folder):
    return *STAGE_1, "--head_only", "--cutmix", 0.5


@refusal("--avc_colour: of --method avc, and this is --method cam", "leave it out, or pass --method avc")
def a_flag_of_another_method(folder):
    return *STAGE_1, "--method", "cam", "--avc_colour", 3


@refusal("--method avc", "--accumulate", "leave one of them out")
def avc_with_accumulate(folder):
    return *STAGE_1, "--method", "avc", "--accumulate", 2


@refusal("no checkpoint gone.params")
def initial_weights_that_are_not_there(folder):
    return *DEEPLAB, "--pretrained", "gone.params"


@refusal("no ImageNet weights of resnet38", "--pretrained PATH", "--pretrained none")
def imagenet_weights_that_do_not_exist(folder):
    return *DEEPLAB, "--backbone", "resnet38", "--pretrained", "imagenet"


@refusal("cannot download the ImageNet weights of resnet18", "--pretrained PATH", "--pretrained none", late=True)
def imagenet_weights_that_cannot_be_fetched(folder):
    return _without_pretrained(STAGE_1)


@refusal("cannot download the ImageNet weights of resnet18", "--pretrained PATH", "--pretrained none", late=True)
def imagenet_weights_that_cannot_be_fetched_for_deeplab(folder):
    return _without_pretrained(DEEPLAB)


@refusal("cannot download the ImageNet weights of resnet18", "--pretrained PATH", "--pretrained none", late=True)
def imagenet_weights_that_cannot_be_fetched_though_asked_for(folder):
    return *STAGE_1, "--pretrained", "imagenet"


@refusal("--alpha_low", "9 is above --alpha_high, 4")
def alphas_the_wrong_way_round(folder):
    return "run_train.py", "--stage", 2, "--alpha_low", 9, "--alpha_high", 4, "--output_dir", "output/new"


@refusal("none of the 12 images of split trainval", "can be decoded", late=True)
def a_head_without_a_single_image(folder):
    for path in (folder / DATA / "images").glob("*.jpg"):
        _truncate(path)
    return *STAGE_1, "--head_only", "--on_bad_image", "skip"


# --- finished work of other data or settings -------------------------------------------------------------------------

@refusal("--resume: there is no output/new/checkpoint.pth.tar to go on from", "leave --resume out")
def a_resumption_of_nothing(folder):
    return *STAGE_1, "--resume"


@refusal("--resume: output/stage1_resnet18/checkpoint.pth.tar was made with other options", "lr was 0.01, is 0.5")
def a_resumption_of_the_classifier_with_another_option(folder):
    return ("run_train.py", "--stage", 1, *SMALL, "--crop_size", 65, "--epochs", 4, "--batch_size", 2, "--scales", 1,
            "--resume", "--lr", 0.5)


@refusal("--resume: output/stage2_resnet18/checkpoint.pth.tar was made with other options", "radius was 5, is 4")
def a_resumption_of_affinitynet_with_another_option(folder):
    return "run_train.py", "--stage", 2, *SMALL, "--resume", "--radius", 4


@refusal("--resume: output/deeplab_resnet18/checkpoint.pth.tar was made with other options", "epochs was 1, is 2")
def a_resumption_of_deeplab_with_another_option(folder):
    return "train_deeplab.py", *SMALL, "--resume", "--epochs", 2


@refusal("--resume: output/deeplab_resnet18/checkpoint.pth.tar was made from other masks", "leave --resume out")
def a_resumption_of_deeplab_on_ground_truth_instead_of_masks(folder):
    return "train_deeplab.py", *SMALL, "--crop_size", 65, "--resume", "--mask_dir", "gt"


@refusal("--resume: output/deeplab_resnet18/checkpoint.pth.tar was made from other masks", "put them back")
def a_resumption_of_deeplab_after_a_mask_was_mended(folder):
    path = min((folder / "output/inference").glob("*.png"))
    mask = np.array(Image.open(path))
    mask[::2, ::2] = 1
    mask_picture(path, mask)
    return "train_deeplab.py", *SMALL, "--resume"


@refusal("output/stage1_resnet18/checkpoint.pth.tar is there already", "--resume", "--overwrite", "--output_dir")
def a_classifier_over_a_finished_one(folder):
    return "run_train.py", "--stage", 1, *SMALL, "--crop_size", 65, "--cam_dir", "new_cams"


@refusal("output/stage2_resnet18/checkpoint.pth.tar is there already", "--resume", "--overwrite", "--output_dir")
def an_affinitynet_over_a_finished_one(folder):
    return "run_train.py", "--stage", 2, *SMALL


@refusal("output/deeplab_resnet18/checkpoint.pth.tar is there already", "--resume", "--overwrite", "--output_dir")
def a_deeplab_over_a_finished_one(folder):
    return "train_deeplab.py", *SMALL


@refusal("data/cams holds 12 files of an earlier run", "name another folder", "--overwrite")
def cams_over_those_of_an_earlier_classifier(folder):
    return *STAGE_1, "--cam_dir", "data/cams"


@refusal("data/cams holds 12 finished files", "scales was [1.0], is [0.5, 1.0]", "--overwrite", "another folder")
def cams_of_other_scales(folder):
    return ("run_train.py", "--stage", 1, "--model_path", "output/stage1_resnet18/model_best.pth.tar", "--scales", 0.5,
            1, *MACHINE)


@refusal("scores/walk_trainval_gt holds 12 finished files", "scales was [1.0], is [1.0, 1.5]", "--overwrite")
def walks_of_other_scales(folder):
    return *MASKS, "--scales", 1, 1.5


@refusal("scores/walk_trainval_gt holds 12 finished files", "beta was 8.0, is 4.0", "--overwrite")
def walks_of_another_beta_for_scores(folder):
    return "run_eval.py", "--model_path", STAGE2, "--beta", 4, "--output_dir", "output/new", *MACHINE


@refusal("output/inference holds 12 finished files", "bg_threshold was 0.5, is 0.3", "--overwrite")
def masks_of_another_threshold(folder):
    return *MASKS, "--bg_threshold", 0.3


@refusal("affinity_labels holds 12 finished files", "alpha_high was 24.0, is 16.0", "--overwrite")
def affinity_labels_of_an_interrupted_run_with_other_settings(folder):
    copy(folder / "output" / "stage2_resnet18" / "affinity_labels", folder / "output" / "new" / "affinity_labels")
    return *STAGE_2, "--alpha_high", 16


@refusal("output/deeplab_test/scores holds 6 finished files", "flip was True, is False", "--overwrite")
def a_test_of_other_settings(folder):
    return "test_deeplab.py", "--scales", 1, "--no-flip", *MACHINE


@refusal("scores/walk_trainval_gt holds 12 finished files made from other images or labels", "such as", "--overwrite")
def walks_of_another_dataset(folder):
    return *MASKS, *_second(folder)


@refusal("scores/walk_trainval_gt holds 12 finished files made from other images or labels", "such as", "--overwrite")
def scores_of_another_dataset(folder):
    return "run_eval.py", *_second(folder), "--output_dir", "output/new", *MACHINE


@refusal("data/cams was made from other images or labels than those in data/second", "12 differ, such as "
         "bullseye_hound_1", "run_train.py --stage 1 --overwrite", "--data_root")
def cams_of_another_dataset(folder):
    return *STAGE_2, *_second(folder)


@refusal("output/inference was made from other images or labels than those in data/second", "12 differ, such as "
         "bullseye_hound_1", "run_inference.py --overwrite", "--data_root")
def masks_of_another_dataset_in_training(folder):
    return *DEEPLAB, *_second(folder)


@refusal("output/inference was made from other images or labels than those in data/second", "--data_root")
def masks_of_another_dataset_in_scoring(folder):
    return *SCORE_MASKS, *_second(folder)


@refusal("output/deeplab_test/scores holds 6 finished files made from other images", "such as", "--overwrite")
def a_test_on_another_dataset(folder):
    return "test_deeplab.py", "--scales", 1, *_second(folder), *MACHINE


@refusal("scores/walk_trainval_gt holds 1 finished files", "such as bullseye_hound_1;", "--overwrite")
def masks_after_a_photo_was_replaced(folder):
    _replace_photo(folder)
    return MASKS


@refusal("scores/walk_trainval_gt holds 1 finished files", "such as bullseye_hound_1;", "--overwrite")
def masks_after_a_label_was_corrected(folder):
    _correct_label(folder)
    return MASKS


@refusal("data/cams holds 1 finished files", "such as bullseye_hound_1;", "--overwrite")
def cams_after_a_label_was_corrected(folder):
    _correct_label(folder)
    return ("run_train.py", "--stage", 1, "--model_path", "output/stage1_resnet18/model_best.pth.tar", "--scales", 1,
            *MACHINE)


@refusal("data/cams was made from other images or labels", "1 differ, such as bullseye_hound_1;")
def affinity_labels_after_a_photo_was_replaced(folder):
    _replace_photo(folder)
    return STAGE_2


@refusal("output/inference was made from other images or labels", "1 differ, such as bullseye_hound_1;")
def training_on_masks_after_a_label_was_corrected(folder):
    _correct_label(folder)
    return DEEPLAB


@refusal("no masks in output/inference", "run: python run_inference.py")
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


@refusal("--output_dir notes.txt/masks: ", "notes.txt is a file, not a folder", "name another")
def results_in_a_file(folder):
    (folder / "notes.txt").write_text("notes")
    return *MASKS, "--output_dir", "notes.txt/masks"


@refusal("--cam_dir notes.txt: notes.txt is a file, not a folder", "name another")
def cams_in_a_file(folder):
    (folder / "notes.txt").write_text("notes")
    return *STAGE_1[:-1], "notes.txt"


@refusal("oxford-iiit-pet/images is the folder of the photos", "--output_dir", "name another")
def masks_among_the_photos(folder):
    return *MASKS, "--output_dir", f"{DATA}/images"


@refusal("no image nowhere.jpg", "--images")
def a_missing_images_path(folder):
    return "run_inference.py", "--images", "nowhere.jpg", "--output_dir", "output/new", *MACHINE


@refusal("sees no GPU", "--device cpu")
def cuda_without_a_gpu(folder):
    return "run_eval.py", *MACHINE, "--device", "cuda"


@refusal("--device cuda:99", "GPU", "--device cpu")
def a_gpu_that_is_not_there(folder):
    return *STAGE_1, "--device", "cuda:99"


@refusal("no device 'mps'", "--device cpu, cuda or cuda:N")
def a_kind_of_device_that_is_not_supported(folder):
    return *MASKS, "--device", "mps"


@refusal("no device 'fast one'", "--device cpu, cuda or cuda:N")
def a_device_that_is_none(folder):
    return *DEEPLAB, "--device", "fast one"


@refusal("no device 'cuda:x'", "--device cpu, cuda or cuda:N")
def a_gpu_without_a_number(folder):
    return "test_deeplab.py", *MACHINE, "--device", "cuda:x"


@refusal("no device 'meta'", "--device cpu, cuda or cuda:N")
def a_device_that_computes_nothing_for_the_crf(folder):
    return *MASKS, "--crf_backend", "torch", "--device", "meta"


@refusal("output/locked")
def an_output_folder_that_is_read_only(folder):
    (folder / "output" / "locked").mkdir()
    (folder / "output" / "locked").chmod(0o555)
    return *MASKS, "--bg_threshold", 0.4, "--output_dir", "output/locked"


def check_one_line(done, words):
    """Exactly one line of stderr is the error; it ends the output and has the words."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("Error: ") or ".py: error: " in line]
    assert len(errors) == 1 and lines[-1] == errors[0], f"{len(errors)} error lines in:\n{done.stderr}"
    status = 1 if errors[0].startswith("Error: ") else 2
    assert done.returncode == status, f"status {done.returncode}, not {status}: {errors[0]}"
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    missing = [word for word in words if word not in errors[0]]
    assert not missing, f"{missing} not in: {errors[0]}"


@pytest.mark.parametrize("case", REFUSALS)
def test_a_mistake_is_refused_in_one_line_and_leaves_nothing_half_written(case, refused):
    if case == "cuda_without_a_gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if case == "an_output_folder_that_is_read_only" and os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    runs, before, after, unfinished = refused[case]
    for done in runs:
        check_one_line(done, REFUSALS[case][1])
    new = set(after) - set(before)
    half = {name for name in new if name.endswith((".tmp", ".tar", "scores.json"))
            or name.endswith("manifest.json") and name not in unfinished}
    assert not half, f"left behind: {sorted(half)}"
    changed = {name for name in before if after.get(name) != before[name]}
    assert not changed, f"files of before that were touched: {sorted(changed)}"
    if case not in LATE or "imagenet" in case:
        assert not new, f"written before the refusal: {sorted(new)}"


@chain
def mistyped(folder, get):
    """Every case of ARGUMENTS in an empty folder: name -> the run; and what was written."""
    (folder / "home").mkdir()
    runs = fork(folder, [(folder / "home", command) for command, _ in ARGUMENTS.values()])
    return dict(zip(ARGUMENTS, runs)), files(folder / "home")


@pytest.mark.parametrize("case", ARGUMENTS)
def test_a_wrong_flag_is_refused_before_anything_is_read(case, mistyped):
    (script, *_), words = ARGUMENTS[case]
    done, written = mistyped[0][case], mistyped[1]
    check_one_line(done, words)
    assert done.stderr.startswith(f"{script}: error: ") and done.returncode == 2, f"{done.returncode}: {done.stderr}"
    assert not written, f"written: {sorted(written)}"
