"""Datasets: Pet, the plain folder, pictures of every kind, stamps, the registry, every refusal with its remedy."""
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from trees import (
    LISTS,
    TRIMAP,
    H,
    W,
    make_coco,
    make_folder,
    make_pet,
    make_voc,
    opened,
    save_grey,
    save_picture,
    write_lists,
)

from utils import distributed
from utils.config import DataConfig
from utils.datasets import DATASETS, Dataset, Layout, open_dataset
from utils.datasets.lists import image_files
from utils.errors import UserError
from utils.images import image_size, read_image
from utils.labels import read_mask
from utils.recipes import by_step


def palette_picture(indices, palette):
    picture = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    picture.putpalette(palette)
    return picture


def refusal(*arguments, **keywords):
    """The one line that opening a dataset with these arguments is refused with."""
    with pytest.raises(UserError) as caught:
        opened(*arguments, **keywords)
    text = str(caught.value)
    assert "\n" not in text, f"more than one line: {text!r}"
    return text


def assert_says(text, *parts):
    missing = [part for part in parts if str(part) not in text]
    assert not missing, f"{missing} not in {text!r}"


# --- Pet -----------------------------------------------------------------------------------------------------------

def test_class_ids_with_gaps_become_indices_in_their_order(pet):
    dataset = opened("pet", pet)
    assert dataset.classes == ["Abyssinian", "beagle", "Persian"], dataset.classes
    assert dataset.ids == ["Persian_1", "beagle_1", "Persian_2"], dataset.ids
    assert dataset.labels.tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 1]], dataset.labels.tolist()
    assert dataset.labels.dtype == np.uint8 and dataset.split == "trainval", (dataset.labels.dtype, dataset.split)


def test_names_of_several_words_lose_only_their_number(pet):
    write_lists(pet, {"list": [("english_cocker_spaniel_12", 1), *LISTS["trainval"]], "test": []})
    assert opened("pet", pet).classes[0] == "english_cocker_spaniel"


@pytest.mark.parametrize("lists", [{"list"}, {"trainval", "test"}, {"list", "trainval", "test"}])
def test_classes_are_the_same_in_every_split(pet, lists):
    """From list.txt, or from all the lists there are: an index must mean the same class in training and test."""
    write_lists(pet, {"part": LISTS["test"]})
    for name in {"list", "trainval", "test"} - lists:
        (pet / "annotations" / f"{name}.txt").unlink()
    found = {split: opened("pet", pet, split).classes for split in lists | {"part"}}
    assert all(classes == ["Abyssinian", "beagle", "Persian"] for classes in found.values()), found


def test_a_class_that_only_the_chosen_split_has_is_known(pet):
    write_lists(pet, {"extra": [("Sphynx_1", 4)]})
    save_picture(pet / "images" / "Sphynx_1.jpg")
    dataset = opened("pet", pet, "extra")
    assert dataset.classes == ["Abyssinian", "beagle", "Sphynx", "Persian"], dataset.classes
    assert dataset.labels.tolist() == [[0, 0, 1, 0]], dataset.labels.tolist()


def test_the_trimap_becomes_class_background_and_ignored(pet):
    dataset = opened("pet", pet)
    for index, label in enumerate([3, 2, 3]):
        mask = dataset.mask(index)
        assert mask.dtype == np.uint8 and mask[0].tolist() == [label, label, 0, 0, 255, 255, label, 0], mask[0]


def test_a_palette_trimap_reads_as_its_indices(pet):
    picture = palette_picture(TRIMAP, [0, 0, 0, 200, 10, 10, 9, 9, 9, 8, 8, 8])
    picture.save(pet / "annotations" / "trimaps" / "Persian_1.png")
    assert opened("pet", pet).mask(0)[0].tolist() == [3, 3, 0, 0, 255, 255, 3, 0]


def test_limit_and_ids_choose_images_and_keep_their_labels(pet, tmp_path):
    (tmp_path / "ids.txt").write_text("# mine\nPersian_2\n\nbeagle_1\nnot_here_9\n")
    chosen = opened("pet", pet, ids=tmp_path / "ids.txt")
    assert chosen.ids == ["beagle_1", "Persian_2"], chosen.ids
    assert chosen.labels.argmax(1).tolist() == [1, 2] and len(chosen.classes) == 3, chosen.labels.tolist()
    assert [chosen.image_path(i).stem for i in range(2)] == chosen.ids, chosen.files
    assert [np.unique(chosen.mask(i)).tolist() for i in range(2)] == [[0, 2, 255], [0, 3, 255]]
    assert opened("pet", pet, limit=2).ids == ["Persian_1", "beagle_1"]
    assert opened("pet", pet, limit=1, ids=tmp_path / "ids.txt").ids == ["beagle_1"]


def test_without_trimaps_the_split_opens_and_its_masks_are_refused(pet):
    for path in (pet / "annotations" / "trimaps").iterdir():
        path.unlink()
    (pet / "annotations" / "trimaps").rmdir()
    with pytest.raises(UserError, match="no ground truth for split trainval .no folder annotations/trimaps"):
        opened("pet", pet).mask(0)


@pytest.mark.parametrize("name, remedy", [("pet", "python -m data.make_toy"), ("folder", "or create it")])
def test_a_missing_data_root_is_refused(tmp_path, name, remedy):
    assert_says(refusal(name, tmp_path / "nowhere"), tmp_path / "nowhere", "--data_root", remedy)


def test_a_missing_split_file_is_refused_with_those_there_are(pet):
    assert_says(refusal("pet", pet, "val"), "val.txt", "there is: list, test, trainval")


def test_a_root_without_annotations_is_refused(tmp_path):
    assert_says(refusal("pet", tmp_path), "no file", "trainval.txt", "create it")


def test_a_root_without_an_image_folder_is_refused(pet):
    (pet / "images").rename(pet / "pictures")
    assert_says(refusal("pet", pet), f"no folder {pet / 'images'}", "--data_root")


def test_ids_without_an_image_are_refused_with_the_first_and_the_count(pet):
    for image_id in ("beagle_1", "Persian_2"):
        (pet / "images" / f"{image_id}.jpg").unlink()
    assert_says(refusal("pet", pet), "names beagle_1 (and 1 more)", "correct the split file")
    assert opened("pet", pet, limit=1).ids == ["Persian_1"], "an image that is not asked for was missed"


def test_an_empty_split_is_refused(pet):
    write_lists(pet, {"none": []})
    assert_says(refusal("pet", pet, "none"), "split none", "holds no image", "--split")


def test_ids_without_a_match_are_refused_with_their_file(pet, tmp_path):
    (tmp_path / "ids.txt").write_text("Persian\n")
    assert_says(refusal("pet", pet, ids=tmp_path / "ids.txt"), "holds no image", tmp_path / "ids.txt", "--split")


@pytest.mark.parametrize("line", ["Persian_9", "Persian_9 six 1 1", "Persian_9 -1 1 1"])
def test_a_malformed_line_is_refused_and_shown(pet, line):
    with open(pet / "annotations" / "trainval.txt", "a") as file:
        file.write(line + "\n")
    assert_says(refusal("pet", pet), "trainval.txt", repr(line), "expected: image CLASS-ID SPECIES BREED-ID")


def test_a_list_that_is_no_text_is_refused(pet, tmp_path):
    (tmp_path / "ids.txt").write_bytes(b"\xff\xfe\x00\x81")
    assert_says(refusal("pet", pet, ids=tmp_path / "ids.txt"), "ids.txt is not a text file", "replace it")
    assert_says(refusal("pet", pet, ids=pet / "images"), "cannot read", "name a text file")
    assert_says(refusal("pet", pet, ids=tmp_path / "gone.txt"), "no file", "gone.txt")


def test_a_byte_order_mark_is_no_part_of_the_first_id(pet, tmp_path):
    (tmp_path / "ids.txt").write_text("\ufeffPersian_1\r\n", encoding="utf-8")
    assert opened("pet", pet, ids=tmp_path / "ids.txt").ids == ["Persian_1"]


TRIMAP_FAULTS = {
    "of another size": (lambda path: save_grey(path, TRIMAP[:, :5]), ("is 5x6 but its image is 8x6", "replace")),
    "with another value": (lambda path: save_grey(path, TRIMAP + 3), ("holds the value 4", "1 (pet), 2 (background)")),
    "with a zero": (lambda path: save_grey(path, TRIMAP % 3), ("holds the value 0", "3 (border)")),
    "in colours": (lambda path: save_picture(path), ("mode RGB", "8-bit palette or grey")),
    "missing": (lambda path: path.unlink(), ("no ground truth", "take its id out of the split file")),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:50]), ("cannot decode", "replace the file")),
    "of text": (lambda path: path.write_text("text"), ("cannot decode", "replace the file")),
}


@pytest.mark.parametrize("fault", TRIMAP_FAULTS)
def test_a_trimap_is_refused_if_it_is(pet, fault):
    path = pet / "annotations" / "trimaps" / "Persian_1.png"
    spoil, parts = TRIMAP_FAULTS[fault]
    spoil(path)
    with pytest.raises(UserError) as caught:
        opened("pet", pet).mask(0)
    assert_says(str(caught.value), path, *parts)


@pytest.mark.parametrize("fault", ["in colours", "truncated", "of text"])
def test_ground_truth_and_masks_are_refused_by_the_same_reader(pet, fault):
    path = pet / "annotations" / "trimaps" / "Persian_1.png"
    TRIMAP_FAULTS[fault][0](path)
    with pytest.raises(UserError) as of_truth:
        opened("pet", pet).mask(0)
    with pytest.raises(UserError) as of_mask:
        read_mask(path)
    assert str(of_truth.value) == str(of_mask.value), f"{of_truth.value} | {of_mask.value}"


def test_a_mask_too_large_to_be_true_is_refused(pet, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", H * W // 3)
    with pytest.raises(UserError, match="Persian_1.png has more than 178 megapixels; pass --large_images"):
        read_mask(pet / "annotations" / "trimaps" / "Persian_1.png")


# --- pictures ------------------------------------------------------------------------------------------------------

GREY = np.arange(H * W, dtype=np.uint8).reshape(H, W) * 5
COLOUR = np.stack([GREY, 255 - GREY, np.full_like(GREY, 90)], axis=2)


def alpha_picture():
    return Image.fromarray(np.dstack([COLOUR, np.where(GREY > 120, 255, 0).astype(np.uint8)]))


def two_colours():
    return palette_picture(GREY // 128, [10, 20, 30, 40, 50, 60])


SEEN = np.where(GREY[..., None] > 120, COLOUR, 255)
KINDS = {
    "PNG": (lambda: Image.fromarray(COLOUR), {}, COLOUR),
    "grey PNG": (lambda: Image.fromarray(GREY), {}, np.dstack([GREY] * 3)),
    "16-bit PNG": (lambda: Image.fromarray(GREY.astype(np.uint16) * 257), {}, np.dstack([GREY] * 3)),
    "1-bit PNG": (lambda: Image.fromarray(GREY > 120), {}, np.dstack([np.where(GREY > 120, 255, 0)] * 3)),
    "palette PNG": (two_colours, {}, np.where(GREY[..., None] < 128, (10, 20, 30), (40, 50, 60))),
    "palette PNG, one colour transparent": (two_colours, {"transparency": 0},
                                            np.where(GREY[..., None] < 128, (255,) * 3, (40, 50, 60))),
    "RGBA PNG": (alpha_picture, {}, SEEN),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_reads_as_rgb_whatever_it_is_under_its_name(tmp_path, kind):
    make, keywords, expected = KINDS[kind]
    make().save(tmp_path / "x.jpg", format="PNG", **keywords)
    found = read_image(tmp_path / "x.jpg")
    assert found.dtype == np.uint8 and found.shape == (H, W, 3), f"{found.dtype} {found.shape}"
    worst = abs(found.astype(int) - expected).max()
    assert worst == 0, f"{kind}: off by up to {worst}"
    assert image_size(tmp_path / "x.jpg") == (H, W)


def test_the_first_frame_of_a_gif_is_read(tmp_path):
    frames = [Image.fromarray(np.full((H, W), value, np.uint8)) for value in (40, 200)]
    frames[0].save(tmp_path / "x.jpg", format="GIF", save_all=True, append_images=frames[1:])
    found = read_image(tmp_path / "x.jpg")
    assert found.shape == (H, W, 3) and (found == 40).all(), f"{found.shape} {np.unique(found)}"


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (W, H), (0, 100, 200, 51)).save(tmp_path / "x.png")
    found = read_image(tmp_path / "x.png")[0, 0].astype(int)
    assert abs(found - (204, 224, 244)).max() <= 1, f"{found}, not a fifth of the colour on white"


def test_a_cmyk_jpeg_reads_as_the_colours_it_was_made_of(tmp_path):
    Image.new("RGB", (W, H), (200, 60, 30)).convert("CMYK").save(tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as raw:
        assert raw.mode == "CMYK", raw.mode
    found = read_image(tmp_path / "x.jpg")[2, 3].astype(int)
    assert abs(found - (200, 60, 30)).max() <= 6, f"{found}, not about (200, 60, 30)"


def test_the_stored_orientation_is_kept_as_masks_are_drawn_on_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(COLOUR).save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").shape == (H, W, 3)


@pytest.mark.parametrize("read", [read_image, image_size])
def test_a_missing_image_is_refused(tmp_path, read):
    with pytest.raises(UserError, match="no image .*gone.jpg; put it there or take its id out of the split file"):
        read(tmp_path / "gone.jpg")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif"])
def test_a_truncated_image_is_refused_wherever_it_ends(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    for share in (0.0, 0.1, 0.5, 0.9):
        path.write_bytes(whole[:int(len(whole) * share)])
        with pytest.raises(UserError, match="cannot decode image .*; replace the file"):
            read_image(path)
            pytest.fail(f"the first {share:.0%} of a {suffix} were read as an image")


def test_images_are_found_by_stem_under_any_suffix(tmp_path):
    for name in ("a.jpg", "b.PNG", "c.webp", "d.txt", "ab.jpeg"):
        (tmp_path / name).write_bytes(b"")
    found = image_files(tmp_path, ["a", "b", "c", "d", "ab"])
    assert found == ["a.jpg", "b.PNG", "c.webp", None, "ab.jpeg"], found


# --- a plain folder ------------------------------------------------------------------------------------------------

def test_a_folder_reads_several_one_and_no_labels(folder):
    dataset = opened("folder", folder)
    assert dataset.classes == ["sky", "tree"] and dataset.ids == ["a", "b", "c"], (dataset.classes, dataset.ids)
    assert dataset.labels.tolist() == [[1, 1], [0, 0], [1, 0]], dataset.labels.tolist()
    assert (dataset.split, dataset.training_splits) == ("all", ("all",)), (dataset.split, dataset.training_splits)


def test_a_header_in_labels_csv_is_optional(folder):
    with_header = opened("folder", folder)
    (folder / "labels.csv").write_text("# no header\na, tree ; sky\nb,\nc,sky\n")
    without = opened("folder", folder)
    assert without.ids == with_header.ids and without.classes == with_header.classes, (without.ids, without.classes)
    assert (without.labels == with_header.labels).all(), without.labels.tolist()


def test_classes_txt_sets_the_order_and_may_name_more(folder):
    (folder / "classes.txt").write_text("tree\ncar\nsky\n")
    dataset = opened("folder", folder)
    assert dataset.classes == ["tree", "car", "sky"], dataset.classes
    assert dataset.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 1]], dataset.labels.tolist()


def test_train_txt_is_the_training_split_where_it_exists(folder):
    (folder / "train.txt").write_text("c\na\n")
    dataset = opened("folder", folder)
    assert dataset.ids == ["c", "a"] and (dataset.split, dataset.training_splits) == ("train", ("train",)), dataset.ids
    assert dataset.labels.tolist() == [[1, 0], [1, 1]], dataset.labels.tolist()
    assert len(opened("folder", folder, "all")) == 3


def test_masks_of_a_folder_read_as_they_are(folder):
    dataset = opened("folder", folder)
    assert dataset.mask(0)[0].tolist() == [0, 1, 2, 255], dataset.mask(0)[0]


def test_a_mask_with_a_class_too_many_is_refused(folder):
    save_grey(folder / "masks" / "b.png", [[0, 1, 3, 255]] * H)
    with pytest.raises(UserError) as caught:
        opened("folder", folder).mask(1)
    assert_says(str(caught.value), folder / "masks" / "b.png", "holds the value 3", "0 to 2 and 255")


FOLDER_FAULTS = {
    "an id missing in labels.csv": ("train.txt", "a\nz\n", ("no line for z", "add one: z,class")),
    "a class not in classes.txt": ("classes.txt", "sky\n", ("gives a the class 'tree'", "classes.txt")),
    "no class at all": ("labels.csv", "a,\nb,\n", ("names no class", "write one image a line")),
    "a line without a comma": ("labels.csv", "a,sky\nb\n", ("the line 'b'", "expected: image_id,class")),
    "a comma between classes": ("labels.csv", "a,sky,tree\n", ("'a,sky,tree'", "class[;class...]")),
    "two lines for an image": ("labels.csv", "a,sky\nb,sky\na,tree\n", ("two lines for a", "a,class;class")),
    "an image that is not there": ("labels.csv", "a,sky\nq,sky\n", ("names q (and 0 more)", "complete the images")),
    "more classes than 8 bits hold": ("classes.txt", "".join(f"c{i}\n" for i in range(255)), ("255 classes", "254")),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_a_folder_is_refused_for(folder, fault):
    name, text, parts = FOLDER_FAULTS[fault]
    (folder / name).write_text(text)
    assert_says(refusal("folder", folder), *parts)


def test_a_header_of_other_words_is_refused_before_its_second_word_becomes_a_class(folder):
    for name in ("train.txt", "classes.txt"):
        (folder / "labels.csv").write_text("filename,classes\na,tree;sky\nb,\nc,sky\n")
        (folder / name).write_text("a\nb\n" if name == "train.txt" else "sky\ntree\n")
        assert_says(refusal("folder", folder), folder / "labels.csv", "a line for 'filename'", "write image_id,class")


def test_lines_without_an_image_are_warned_about_and_their_classes_do_not_count(folder, capsys):
    (folder / "labels.csv").write_text("image_id,class\nq,car\na,tree\nb,sky\nc,sky\n")
    (folder / "train.txt").write_text("a\nb\n")
    assert opened("folder", folder).classes == ["sky", "tree"]
    assert_says(capsys.readouterr().err, "1 of the 4 lines", folder / "labels.csv", "that of 'q'", "take the lines out")
    (folder / "train.txt").write_text("a\nq\n")
    assert_says(refusal("folder", folder), "names q (and 0 more)", "complete the images")


def test_images_without_a_line_in_labels_csv_are_counted_once(folder, capsys):
    (folder / "labels.csv").write_text("a,sky\n")
    assert opened("folder", folder).ids == opened("folder", folder).ids == ["a"]
    said = capsys.readouterr().err
    assert_says(said, "2 of the 3 images", folder / "images", "such as b;", "add a line for each")
    assert said.count("WARNING") == 1, said


def test_ids_of_a_file_may_have_their_suffix(folder, tmp_path, capsys):
    (tmp_path / "ids.txt").write_text("a.png\nc\n")
    assert opened("folder", folder, ids=str(tmp_path / "ids.txt")).ids == ["a", "c"]
    assert not capsys.readouterr().err


def test_a_space_before_a_quoted_class_is_no_part_of_its_name(folder):
    (folder / "labels.csv").write_text('a, "tree;sky"\n"b", \nc, "sky"\n')
    assert opened("folder", folder).classes == ["sky", "tree"]


def test_a_folder_without_labels_csv_is_refused(folder):
    (folder / "labels.csv").unlink()
    assert_says(refusal("folder", folder), "no file", "labels.csv")


def test_only_pet_can_be_downloaded_and_only_into_its_own_name(tmp_path):
    for name, root in (("folder", tmp_path / "oxford-iiit-pet"), ("pet", tmp_path / "pets")):
        assert_says(refusal(name, root, download=True), "--download fetches --dataset pet", "oxford-iiit-pet", root)


# --- stamps ---------------------------------------------------------------------------------------------------------

def changed(before, after):
    """The positions whose stamps differ."""
    assert len(before) == len(after), f"{len(before)} stamps, then {len(after)}"
    return [index for index, (old, new) in enumerate(zip(before, after)) if old != new]


def later(path, nanoseconds=1):
    """Move a file's time of change by so little."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + nanoseconds))


@pytest.mark.parametrize("labels", [False, True])
def test_stamps_are_short_distinct_and_the_same_when_nothing_changed(pet, labels):
    stamps = opened("pet", pet).stamps(labels)
    assert opened("pet", pet).stamps(labels) == stamps
    assert len(set(stamps)) == 3, stamps
    assert all(8 <= len(stamp) <= 16 and int(stamp, 16) >= 0 for stamp in stamps), stamps


def longer(path):
    path.write_bytes(path.read_bytes() + b"\0")


def renamed(path):
    return path.rename(path.with_suffix(".png"))


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("replace", [later, longer, renamed])
def test_a_replaced_photo_changes_its_own_stamp_alone(pet, replace, labels):
    """By its time of change, its size or its name, the other two being the same."""
    before = opened("pet", pet).stamps(labels)
    path = pet / "images" / "beagle_1.jpg"
    old = path.stat()
    path = replace(path) or path
    if replace is not later:
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert changed(before, opened("pet", pet).stamps(labels)) == [1]


def test_a_corrected_line_in_labels_csv_changes_its_stamp_where_labels_count(folder):
    before = {labels: opened("folder", folder).stamps(labels) for labels in (False, True)}
    text = (folder / "labels.csv").read_text()
    (folder / "labels.csv").write_text(text.replace("b,\n", "b,sky\n"))
    dataset = opened("folder", folder)
    assert changed(before[True], dataset.stamps(True)) == [1], dataset.labels.tolist()
    assert changed(before[False], dataset.stamps(False)) == [], "labels count though they were not to"


@pytest.mark.parametrize("kind, make, file", [
    ("voc", make_voc, "SegmentationClass/2007_000001.png"), ("coco", make_coco, "annotations/instances_train2014.json"),
    ("folder", make_folder, "masks/b.png"), ("pet", make_pet, "annotations/trimaps/beagle_1.png")])
def test_the_stamp_of_ground_truth_changes_with_its_files(tmp_path, monkeypatch, kind, make, file):
    monkeypatch.chdir(tmp_path)  # of the cache of COCO's JSON
    make(tmp_path / "data")
    split = "train" if kind in ("voc", "coco") else None
    before = opened(kind, tmp_path / "data", split).truth_stamp()
    assert before is not None and before == opened(kind, tmp_path / "data", split).truth_stamp()
    os.utime(tmp_path / "data" / file, (1, 1))
    assert opened(kind, tmp_path / "data", split).truth_stamp() != before


def test_a_new_class_changes_every_stamp_where_labels_count(folder):
    before = {labels: opened("folder", folder).stamps(labels) for labels in (False, True)}
    (folder / "classes.txt").write_text("sky\ntree\ncar\n")
    dataset = opened("folder", folder)
    assert changed(before[True], dataset.stamps(True)) == [0, 1, 2], dataset.classes
    (folder / "classes.txt").write_text("sky\nbush\n")  # the same rows under another name
    (folder / "labels.csv").write_text((folder / "labels.csv").read_text().replace("tree", "bush"))
    dataset = opened("folder", folder)
    assert changed(before[True], dataset.stamps(True)) == [0, 1, 2], dataset.classes
    assert changed(before[False], dataset.stamps(False)) == []


def test_a_corrected_line_in_trainval_txt_changes_its_stamp_where_labels_count(pet):
    before = {labels: opened("pet", pet).stamps(labels) for labels in (False, True)}
    path = pet / "annotations" / "trainval.txt"
    path.write_text(path.read_text().replace("Persian_1 6", "Persian_1 2"))
    dataset = opened("pet", pet)
    assert dataset.labels.argmax(1).tolist() == [1, 1, 2] and dataset.classes[1] == "beagle", dataset.labels.tolist()
    assert changed(before[True], dataset.stamps(True)) == [0]
    assert changed(before[False], dataset.stamps(False)) == [], "labels count though they were not to"


def test_a_copy_with_the_same_times_has_the_same_stamps(pet, tmp_path):
    copy = shutil.copytree(pet, tmp_path / "copy")  # copies times too
    for labels in (False, True):
        assert opened("pet", copy).stamps(labels) == opened("pet", pet).stamps(labels)


def test_a_split_without_labels_has_stamps(pet):
    dataset = opened("pet", pet)
    dataset.labels = None
    assert len(set(dataset.stamps(True))) == 3 and dataset.stamps(False) == opened("pet", pet).stamps(False)


def test_stamps_of_a_part_are_those_of_the_whole(pet):
    dataset = opened("pet", pet)
    for labels in (False, True):
        assert [stamp for _, one in dataset for stamp in one.stamps(labels)] == dataset.stamps(labels)


def test_the_stamp_of_a_missing_image_is_refused_as_the_image_is(pet):
    dataset = opened("pet", pet)
    dataset.image_path(1).unlink()
    with pytest.raises(UserError) as of_image:
        dataset.image(1)
    with pytest.raises(UserError) as of_stamps:
        dataset.stamps(False)
    assert str(of_stamps.value) == str(of_image.value), f"{of_stamps.value} | {of_image.value}"
    assert_says(str(of_stamps.value), "no image", "beagle_1.jpg")


# --- the registry ----------------------------------------------------------------------------------------------------

class Arrays(Dataset):
    """Images that are .npy files."""

    def image(self, index):
        return np.load(self.image_path(index))

    def size(self, index):
        return self.image(index).shape[:2]

    def mask(self, index):
        return (self.image(index)[..., 0] > 100).astype(np.uint8)


def open_arrays(root, split, difficult):
    files = sorted(path.name for path in root.glob("*.npy"))
    ids = [name.removesuffix(".npy") for name in files]
    return Arrays("toy", root, split or "all", ("all",), ["thing"], ids, np.ones((len(ids), 1), np.uint8), root, files)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "toy", Layout(open_arrays, "data/toy"))
    for index, value in enumerate((90, 200)):
        np.save(tmp_path / f"x{index}.npy", np.full((H, W, 3), value, np.uint8))
    return tmp_path


def test_a_dataset_of_ones_own_is_one_line_in_the_registry(toy):
    dataset = opened("toy", toy, limit=2)
    assert [np.unique(one.mask(0)).tolist() for _, one in dataset] == [[0], [1]], "a subset is no longer of its class"
    assert dataset.without(["x0"]).image(0).max() == 200 and dataset.size(1) == (H, W)
    before = dataset.stamps(True)
    later(toy / "x1.npy")
    assert changed(before, dataset.stamps(True)) == [1]
    assert DATASETS["toy"].defaults == by_step(1024) and DATASETS["toy"].test_split is None


def test_each_dataset_says_where_it_is_and_what_it_is_tested_on():
    found = {name: (layout.data_root, layout.tested(layout.data_root)) for name, layout in DATASETS.items()}
    assert found == {"pet": ("data/oxford-iiit-pet", "test"), "voc": ("data/VOCdevkit/VOC2012", "val"),
                     "coco": ("data/coco", "val"), "folder": ("data/mine", None)}, found
    sizes = {name: {flags["max_size"] for flags in layout.defaults.values()} for name, layout in DATASETS.items()}
    assert sizes == {"pet": {512}, "voc": {1024}, "coco": {1024}, "folder": {1024}}, sizes
    published = [name for name, layout in DATASETS.items() if layout.defaults["masks"].get("beta") == 8.0]
    assert published == ["voc", "coco"], published


def test_an_unknown_dataset_is_refused_with_those_there_are(tmp_path):
    assert_says(refusal("imagenet", tmp_path), "'imagenet'", "--dataset pet, voc, coco, folder")


def test_whether_difficult_objects_count_reaches_the_layout(tmp_path, monkeypatch):
    said = []
    monkeypatch.setitem(DATASETS, "toy", Layout(lambda root, split, difficult: said.append(difficult)
                                                or open_arrays(root, split, difficult), "data/toy"))
    np.save(tmp_path / "x.npy", np.zeros((H, W, 3), np.uint8))
    for difficult in (True, False):
        open_dataset(DataConfig("toy", str(tmp_path), difficult=difficult))
    assert said == [True, False], said


@pytest.mark.parametrize("module", ["utils.datasets", "utils.datasets.base", "utils.datasets.coco", "utils.store",
                                    "utils.labels", "data.prepare_coco"])
def test_whichever_module_is_imported_first_it_loads_without_torch(module):
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "False", f"{done.stdout} {done.stderr[-500:]}"


def test_each_rank_has_its_part_of_the_images(pet, monkeypatch):
    dataset = opened("pet", pet)
    assert dataset.shard() is dataset
    for rank, ids in enumerate((["Persian_1", "Persian_2"], ["beagle_1"])):
        monkeypatch.setattr(distributed, "world", lambda: 2)
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert dataset.shard().ids == ids, dataset.shard().ids
