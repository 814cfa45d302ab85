"""Masks for annotation tools: polygons against brute force, a round trip of each format, what is kept and refused."""
import functools
import json
import os
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as rle
from pycocotools.coco import COCO
from scipy import ndimage
from script_runs import DATA, MACHINE, STAGE2, chain, copy, files, fork, picture, read_json
from test_refusals import check_one_line
from trees import make_folder, opened

from src.export import of_split
from src.masks import read_checked
from utils.errors import UserError
from utils.export import EXPORTS, MaskSet, check_export, write_export
from utils.export import folder as export_folder
from utils.export.folder import RECORD
from utils.export.polygons import polygons
from utils.labels import read_mask, save_mask, voc_palette

# --- polygons --------------------------------------------------------------------------------------------------------


def blobs(rng, height, width, scale):
    """Random blobs with holes; at scale 0 single random pixels, many of which touch at corners alone."""
    noise = rng.random((height, width))
    if not scale:
        return noise < rng.random()
    smooth = ndimage.gaussian_filter(noise, scale)
    return smooth > np.quantile(smooth, rng.uniform(0.2, 0.8))


def drawn(points, shape):
    """A polygon as labelme draws it: by Pillow, border and all."""
    canvas = Image.new("L", shape[::-1])
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in points], outline=1, fill=1)
    return np.asarray(canvas).astype(bool)


def by_centres(points, shape):
    """A polygon by definition: the pixels whose centres it has inside, by the even-odd rule, edge by edge."""
    y, x = np.mgrid[:shape[0], :shape[1]] + 0.48  # not 0.5: on a slit, a centre would be neither inside nor outside
    inside = np.zeros(shape, bool)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0)):
        if y0 != y1:
            inside ^= ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


def by_fifths(points, shape):
    """A polygon as pycocotools renders it."""
    return rle.decode(rle.merge(rle.frPyObjects([points.ravel().tolist()], *shape))).astype(bool)


def by_opencv(points, shape):
    """A polygon as Ultralytics has OpenCV draw it, border and all, after cutting its coordinates down; by Pillow here.
    """
    return drawn(points.astype(np.int32), shape)


@pytest.mark.parametrize("scale", [0, 1, 2])
@pytest.mark.parametrize("draw", [drawn, by_centres, by_fifths, by_opencv])
def test_polygons_drawn_again_are_the_mask_and_never_overlap(scale, draw):
    rng = np.random.default_rng(scale)
    for _ in range(60):
        mask = blobs(rng, *rng.integers(1, 26, 2), scale)
        total = sum((draw(points, mask.shape).astype(int) for points in polygons(mask)), np.zeros(mask.shape, int))
        assert np.array_equal(total, mask), f"{(total != mask).sum()} of {mask.size} pixels differ:\n{mask.astype(int)}"


@pytest.mark.parametrize("scale", [0, 1, 2])
def test_each_polygon_is_one_component_within_the_image_of_corners_alone(scale):
    rng = np.random.default_rng(10 + scale)
    for _ in range(60):
        mask = blobs(rng, *rng.integers(1, 26, 2), scale)
        found, (_, components) = polygons(mask), ndimage.label(mask)
        assert len(found) == components, f"{len(found)} polygons of {components} components"
        for points in found:
            assert len({tuple(point) for point in points}) >= 4, points
            assert (points > 0).all() and (points < mask.shape[::-1]).all(), points
            steps = np.roll(points, -1, axis=0) - points
            assert ((steps == 0).sum(axis=1) == 1).all(), "an edge is slanted, or has no length"
            turns = (steps == 0) != (np.roll(steps, 1, axis=0) == 0)
            straight = ~turns.all(axis=1)  # where a slit begins or ends, and nowhere else
            assert np.array_equal(straight & (points[:, 0] % 1 != 0.5), np.zeros(len(points), bool)), "collinear points"


def test_a_square_ring_is_cut_open_once():
    ring = np.ones((5, 6), bool)
    ring[2:4, 2:4] = False
    expected = [(0.05, 0.05), (2.5, 0.05), (2.5, 1.95), (1.95, 1.95), (1.95, 4.05), (4.05, 4.05), (4.05, 1.95),
                (2.5, 1.95), (2.5, 0.05), (5.95, 0.05), (5.95, 4.95), (0.05, 4.95)]
    found = polygons(ring)
    assert len(found) == 1 and [tuple(point) for point in found[0]] == expected, found


@pytest.mark.parametrize("size, expected", [((1, 1), 1), ((3, 3), 1)])
def test_an_image_full_of_one_class_is_one_rectangle_and_an_empty_one_nothing(size, expected):
    found = polygons(np.ones(size, bool))
    assert len(found) == expected and len(found[0]) == 4, found
    assert polygons(np.zeros(size, bool)) == []


def test_thousands_of_holes_and_components_take_no_more_than_their_borders():
    """Holes in a column are joined to each other: none is lost, and nothing recurses."""
    ladder = np.ones((4001, 3), bool)
    ladder[1::2, 1] = False
    (points,) = polygons(ladder)
    assert np.array_equal(drawn(points, ladder.shape), ladder) and len(points) == 4 + 2000 * 8, len(points)
    dots = np.zeros((120, 120), bool)
    dots[::2, ::2] = True
    assert len(polygons(dots)) == 3600


# --- formats ---------------------------------------------------------------------------------------------------------

CLASSES = ["cat", "dog: \"big\"", "Kuh ü", *(f"class {k}" for k in range(4, 81))]


@functools.cache
def some_masks():
    """Masks of 80 classes: regions with holes, ignored areas, single pixels, background alone, one class alone."""
    rng = np.random.default_rng(0)
    heights = ndimage.gaussian_filter(rng.random((48, 65)), 2)
    ranks = heights.argsort(axis=None).argsort().reshape(heights.shape)
    regions = rng.permutation(81)[ranks * 81 // ranks.size]
    ignored = regions.copy()
    ignored[blobs(rng, *ranks.shape, 3)] = 255
    pixels = np.where(rng.random((20, 23)) < 0.1, rng.integers(0, 81, (20, 23)), 0)
    pixels[0, 0] = pixels[-1, -1] = 80
    return {"regions": regions, "ignored": ignored, "pixels": pixels, "empty": np.zeros((7, 9), int),
            "full": np.full((5, 4), 3), "nothing.but.255": np.full((6, 6), 255), "one": np.ones((1, 1), int)}


def mask_set(folder, masks, classes=CLASSES, split="trainval", training=True):
    """A `MaskSet` of masks that are written to a folder, of photos beside it."""
    for name, mask in masks.items():
        save_mask(folder / "masks" / f"{name}.png", mask)
        photo = folder / "photos" / f"{name}.jpg"
        photo.parent.mkdir(exist_ok=True)
        Image.new("RGB", mask.shape[::-1]).save(photo)
    return MaskSet(classes, split, training, list(masks), [folder / "photos" / f"{name}.jpg" for name in masks],
                   [folder / "masks" / f"{name}.png" for name in masks],
                   lambda path, index: read_checked(path, list(masks.values())[index].shape, len(classes), ignore=True))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """.masks: of 80 classes.  .home: each format's export of them lies in .home / its name."""
    folder, masks = tmp_path_factory.mktemp("exported"), some_masks()
    ours = mask_set(folder, masks, [name.replace(":", "") for name in CLASSES])
    for name in EXPORTS:
        assert write_export(name, folder / "export" / name, ours)
    return SimpleNamespace(masks=masks, home=folder / "export", photos=folder / "photos", classes=list(ours.classes))


def without_ignored(mask):
    return np.where(mask == 255, 0, mask)


def test_coco_decodes_to_the_same_pixels_through_pycocotools(exported, capsys):
    table = COCO(exported.home / "coco" / "annotations" / "instances_train2014.json")
    assert [one["name"] for one in table.loadCats(table.getCatIds())] == exported.classes
    assert sorted(table.anns) == list(range(1, len(table.anns) + 1)), "ids of annotations are not 1, 2, 3, ..."
    by_name = {image["file_name"]: image for image in table.dataset["images"]}
    for name, mask in exported.masks.items():
        image = by_name[f"{name}.jpg"]
        assert (image["height"], image["width"]) == mask.shape, image
        found = np.zeros(mask.shape, int)
        for one in table.imgToAnns[image["id"]]:
            shape = table.annToMask(one).astype(bool)
            assert one["iscrowd"] == 0 and one["area"] == shape.sum() and not found[shape].any(), one["id"]
            rows, columns = np.flatnonzero(shape.any(axis=1)), np.flatnonzero(shape.any(axis=0))
            box = [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert one["bbox"] == box, f"{one['bbox']}, not {box}"
            found[shape] = one["category_id"]
        assert np.array_equal(found, without_ignored(mask)), f"{name}: {(found != without_ignored(mask)).sum()} pixels"


@pytest.mark.parametrize("training, split", [(True, "train"), (False, "val")])
def test_coco_is_read_again_by_dataset_coco_with_the_same_pixels_and_names(tmp_path, monkeypatch, training, split):
    monkeypatch.chdir(tmp_path)  # for output/cache
    masks = some_masks()
    ours = mask_set(tmp_path, masks, [name.replace(":", "") for name in CLASSES], training=training)
    write_export("coco", tmp_path / "coco", ours)
    (tmp_path / "coco" / f"{split}2014").symlink_to(tmp_path / "photos")
    found = opened("coco", tmp_path / "coco", split)
    assert found.classes == list(ours.classes), found.classes
    shown = {name for name, mask in masks.items() if without_ignored(mask).any()}
    assert set(found.ids) == (shown if training else set(masks)), found.ids
    for index, name in enumerate(found.ids):
        assert np.array_equal(found.mask(index), without_ignored(masks[name])), name
    check_export("coco", tmp_path / "coco", ours.classes)  # a link to photos that was put there disturbs nothing
    assert not write_export("coco", tmp_path / "coco", ours), "written again"


def test_labelmes_polygons_draw_the_same_pixels(exported):
    for name, mask in exported.masks.items():
        content = read_json(exported.home / "labelme" / f"{name}.json")
        assert (content["imageHeight"], content["imageWidth"]) == mask.shape and content["imageData"] is None
        photo = exported.home / "labelme" / content["imagePath"]
        assert not Path(content["imagePath"]).is_absolute() and photo.samefile(exported.photos / f"{name}.jpg"), photo
        found = np.zeros(mask.shape, int)
        for shape in content["shapes"]:
            assert shape["shape_type"] == "polygon" and len(shape["points"]) >= 4, shape
            found[drawn(shape["points"], mask.shape)] = exported.classes.index(shape["label"]) + 1
        assert np.array_equal(found, without_ignored(mask)), f"{name}: {(found != without_ignored(mask)).sum()} pixels"


def test_yolos_lines_draw_the_same_pixels_and_stay_within_0_and_1(exported):
    home = exported.home / "yolo"
    for name, mask in exported.masks.items():
        found = np.zeros(mask.shape, int)
        for line in (home / "labels" / "trainval" / f"{name}.txt").read_text().splitlines():
            kind, *numbers = line.split(" ")
            points = np.array(numbers, np.float32).reshape(-1, 2)
            assert len(points) >= 4 and points.min() > 0 and points.max() < 1, line[:80]
            found[by_opencv(points * np.float32(mask.shape[::-1]), mask.shape)] = int(kind) + 1
        assert np.array_equal(found, without_ignored(mask)), f"{name}: {(found != without_ignored(mask)).sum()} pixels"
    assert (home / "labels" / "trainval" / "empty.txt").read_text() == ""
    lines = (home / "data.yaml").read_text(encoding="utf-8").splitlines()
    names = lines[lines.index("names:") + 1:]
    assert [json.loads(line.split(": ", 1)[1]) for line in names] == exported.classes, names[:4]
    assert 'train: "trainval.txt"' in lines, lines[:4]
    listed = (home / "trainval.txt").read_text().splitlines()
    assert listed == [f"./images/trainval/{name}.jpg" for name in exported.masks], listed[:2]


def test_png_holds_the_masks_values_without_a_palette_and_a_list_of_names(exported):
    home = exported.home / "png"
    for name, mask in exported.masks.items():
        with Image.open(home / "labels" / f"{name}.png") as found:
            assert found.mode == "L" and np.array_equal(found, mask), f"{name}: {found.mode}"
    rows = [line.split("\t") for line in (home / "classes.txt").read_text(encoding="utf-8").splitlines()]
    assert rows == [[str(k), name] for k, name in enumerate(["background", *exported.classes])], rows[:3]


def test_vocs_colours_mean_by_labelmap_what_the_masks_values_mean(exported):
    home = exported.home / "voc"
    first, *rows = (home / "labelmap.txt").read_text(encoding="utf-8").splitlines()
    meant = {}
    for row in rows:
        name, colour, parts, actions = row.split(":")
        meant[tuple(map(int, colour.split(",")))] = name
        assert not parts and not actions, row
    assert first.startswith("#") and len(meant) == len(rows) == 82, rows[:2]
    names = {0: "background", 255: "ignored", **dict(enumerate(exported.classes, start=1))}
    for name, mask in exported.masks.items():
        with Image.open(home / "SegmentationClass" / f"{name}.png") as found:
            assert found.mode == "P" and np.array_equal(found, mask), name
            colours = np.asarray(found.convert("RGB"))
        assert {(meant[tuple(colour)], value) for colour, value in zip(colours.reshape(-1, 3), mask.ravel())} \
            == {(names[value], value) for value in np.unique(mask)}, name
        objects = read_mask(home / "SegmentationObject" / f"{name}.png")
        assert np.array_equal(objects, without_ignored(mask)), name
    assert (home / "ImageSets" / "Segmentation" / "trainval.txt").read_text().split() == list(exported.masks)


def test_labelmap_names_no_ignored_pixels_where_there_are_none(tmp_path):
    write_export("voc", tmp_path / "voc", mask_set(tmp_path, {"a": np.eye(4, dtype=int)}, ["ignored"]))
    text = (tmp_path / "voc" / "labelmap.txt").read_text()
    assert text.splitlines()[1:] == ["background:0,0,0::", "ignored:128,0,0::"], text


@pytest.mark.parametrize("name", EXPORTS)
def test_two_exports_of_the_same_masks_are_equal_to_the_byte(exported, tmp_path, name):
    again = mask_set(tmp_path, exported.masks, exported.classes)
    write_export(name, tmp_path / "export" / name, again)
    first, second = ({path: (home / path).read_bytes() for path in files(home)}
                     for home in (exported.home / name, tmp_path / "export" / name))
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    assert not [path for path in first if first[path] != second[path]], "files differ"


def test_a_large_picture_keeps_its_pixels_through_yolos_decimals(tmp_path):
    mask = np.zeros((3, 60_000), int)
    places = np.arange(1, 60_000, 2)[[*range(100), *range(-300, 0)]]
    mask[1, places] = 1
    write_export("yolo", tmp_path / "yolo", mask_set(tmp_path, {"wide": mask}, ["a"]))
    lines = (tmp_path / "yolo" / "labels" / "trainval" / "wide.txt").read_text().splitlines()
    found = [np.array(line.split()[1:], np.float32).reshape(-1, 2)[:, 0] * np.float32(60_000) for line in lines]
    assert len(found) == 400 and all((one.astype(int) == place).all() for place, one in zip(places, found)), found[-1]


def test_masks_are_read_one_after_the_other(tmp_path):
    """What is read is gone before the next is read, so that memory does not grow with the split."""
    ours, refs, alive = mask_set(tmp_path, {f"{k}": np.eye(9, dtype=int) for k in range(20)}, ["a"]), [], []

    def read(path, index):
        mask = ours.read(path, index)
        alive.append(sum(ref() is not None for ref in refs))
        refs.append(weakref.ref(mask))
        return mask
    for name in EXPORTS:
        write_export(name, tmp_path / name, replace(ours, read=read))
    assert len(alive) == 20 * len(EXPORTS) and max(alive) <= 1, f"up to {max(alive)} masks in memory, and the next"


# --- what is there already -------------------------------------------------------------------------------------------

def test_an_export_is_written_again_only_when_a_mask_or_a_name_changes(tmp_path):
    home, ours = tmp_path / "export" / "yolo", mask_set(tmp_path, some_masks())
    assert write_export("yolo", home, ours)
    before = files(home)
    save_mask(ours.paths[0], some_masks()["regions"])  # the same pixels, written anew
    assert not write_export("yolo", home, ours) and files(home) == before, "written again"
    save_mask(ours.paths[3], np.ones((7, 9), int))
    assert write_export("yolo", home, ours) and (home / "labels/trainval/empty.txt").read_text().startswith("0 ")
    assert write_export("yolo", home, replace(ours, classes=["Katze", *CLASSES[1:]]))
    (home / "trainval.txt").unlink()
    assert write_export("yolo", home, replace(ours, classes=["Katze", *CLASSES[1:]])), "a deleted file stayed away"
    assert (home / "trainval.txt").is_file()


def test_files_of_images_that_are_gone_are_deleted_and_those_of_the_users_stay(tmp_path):
    home, ours = tmp_path / "png", mask_set(tmp_path, some_masks())
    write_export("png", home, ours)
    (home / "notes.txt").write_text("mine")
    (home / "images").symlink_to(tmp_path / "photos")
    fewer = replace(ours, names=ours.names[1:], photos=ours.photos[1:], paths=ours.paths[1:],
                    read=lambda path, index: ours.read(path, index + 1))
    check_export("png", home, CLASSES)
    assert write_export("png", home, fewer)
    assert not (home / "labels" / "regions.png").exists() and len(list((home / "labels").iterdir())) == 6
    assert (home / "notes.txt").read_text() == "mine" and (home / "images").is_symlink()


def test_a_file_that_was_corrected_by_hand_is_refused_and_kept(tmp_path):
    home, ours = tmp_path / "labelme", mask_set(tmp_path, some_masks())
    write_export("labelme", home, ours)
    (home / "full.json").write_text("corrected")
    for act in (lambda: check_export("labelme", home, CLASSES), lambda: write_export("labelme", home, ours)):
        with pytest.raises(UserError, match="full.json was changed since it was exported .1 such files.; rename"):
            act()
    assert (home / "full.json").read_text() == "corrected"


def test_a_folder_of_the_users_or_a_file_in_its_place_is_refused(tmp_path):
    ours = mask_set(tmp_path, some_masks())
    (tmp_path / "export" / "coco").mkdir(parents=True)
    check_export("coco", tmp_path / "export" / "coco", CLASSES)  # an empty folder is nobody's
    (tmp_path / "export" / "coco" / "mine.json").write_text("{}")
    (tmp_path / "export" / "png").write_text("")
    for name, words in (("coco", "holds files that no --export wrote; move them away"), ("png", "is a file, where a")):
        with pytest.raises(UserError, match=words):
            check_export(name, tmp_path / "export" / name, CLASSES)
        with pytest.raises(UserError, match=words):
            write_export(name, tmp_path / "export" / name, ours)
    assert sorted(path.name for path in (tmp_path / "export").rglob("*")) == ["coco", "mine.json", "png"]


def test_a_file_of_the_users_in_the_way_of_a_new_one_is_kept(tmp_path):
    home, ours = tmp_path / "labelme", mask_set(tmp_path, some_masks())
    fewer = replace(ours, names=ours.names[:2], photos=ours.photos[:2], paths=ours.paths[:2])
    write_export("labelme", home, fewer)
    (home / "pixels.json").write_text("mine")
    before = files(home)
    with pytest.raises(UserError, match="pixels.json is there already and was not written by --export"):
        write_export("labelme", home, ours)
    assert files(home) == before and os.listdir(tmp_path).count("labelme") == 1
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".labelme")], "a temporary folder was left"


@pytest.mark.parametrize("fails_at", [0, 3, 7])
def test_a_run_that_is_killed_among_its_files_is_taken_up_by_the_next(tmp_path, monkeypatch, fails_at):
    home, ours = tmp_path / "png", mask_set(tmp_path, some_masks())
    write_export("png", home, ours)
    for path, mask in zip(ours.paths, some_masks().values()):
        save_mask(path, np.where(mask == 255, 255, 80 - without_ignored(mask)))
    real, done = os.replace, []

    def stop(source, target):
        if home in Path(target).parents and Path(target).name != RECORD:
            done.append(target)
            if len(done) > fails_at:
                raise KeyboardInterrupt
        return real(source, target)
    monkeypatch.setattr(export_folder.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_export("png", home, ours)
    monkeypatch.undo()
    check_export("png", home, CLASSES)
    assert write_export("png", home, ours)
    for name, path in zip(ours.names, ours.paths):
        assert np.array_equal(read_mask(home / "labels" / f"{name}.png"), read_mask(path)), name


@pytest.mark.parametrize("name, word", [("voc", "a:b"), ("voc", "#1"), ("png", "a\tb"), ("yolo", "a\nb")])
def test_a_class_name_that_a_format_cannot_hold_is_refused(tmp_path, name, word):
    with pytest.raises(UserError, match=f"--export {name} cannot hold the class name .*leave {name} out"):
        check_export(name, tmp_path / name, ["cat", word])
    check_export("coco", tmp_path / "coco", ["cat", "a:b", "#1"])


@pytest.mark.parametrize("fault, words", [("missing", "lacks 1 of the 3 masks of split all, such as c; make them"),
                                          ("size", "b.png is 9x9 but its image is"),
                                          ("value", "b.png holds the value 7")])
def test_masks_that_are_missing_or_not_of_their_images_are_refused_and_nothing_is_written(tmp_path, fault, words):
    root = make_folder(tmp_path / "own")
    dataset = opened("folder", root)
    for image_id in "abc":
        save_mask(tmp_path / "masks" / f"{image_id}.png", np.ones(dataset.size(0), int))
    if fault == "missing":
        (tmp_path / "masks" / "c.png").unlink()
    else:
        save_mask(tmp_path / "masks" / "b.png", np.ones((9, 9), int) if fault == "size" else
                  np.full(dataset.size(0), 7))
    with pytest.raises(UserError, match=words):
        write_export("png", tmp_path / "export" / "png", of_split(dataset, tmp_path / "masks"))
    assert not [path for path in (tmp_path / "export").rglob("*") if path.is_file()], "something was written"


# --- through the scripts ---------------------------------------------------------------------------------------------

MASKS = ("run_inference.py", "--model_path", STAGE2, *MACHINE, "--export")


@chain
def scripts(folder, get):
    """Steps 3 and 6 with --export in a copy of the pipeline, twice; then of images; then what is refused."""
    home = copy(get("pipeline").folder, folder / "home")
    for name in ("a.jpg", "b.png", "two/c.jpg", "two/c.png"):
        picture(home / "photos" / name, 40, 53, file_format="JPEG" if name.endswith("jpg") else "PNG")
    picture(home / "mine" / "export" / "voc" / "photo.jpg")
    test = ("test_deeplab.py", "--scales", 1, *MACHINE, "--export", "coco")
    first, again, deeplab, images = fork(folder, [
        (home, (*MASKS, *EXPORTS)), (home, (*MASKS, "coco", "coco", "yolo")), (home, test),
        (home, (*MASKS, "labelme", "coco", "--no-crf", "--images", "photos"))])
    for done in (first, again, deeplab, images):
        assert done.returncode == 0, f"{done.args}: {done.stderr[-2000:]}"
    before = files(home)
    asked = {"name": (*MASKS, "pascal"), "foreign": (*MASKS, "voc", "--output_dir", "mine"),
             "alike": (*MASKS, "png", "--images", "photos/two", "--output_dir", "new"),
             "deeplab": (*test, "svg"), "foreign again": (*MASKS, "voc", "--output_dir", "mine", "--dry_run")}
    refused = dict(zip(asked, fork(folder, [(home, command) for command in asked.values()])))
    return SimpleNamespace(folder=home, first=first, again=again, deeplab=deeplab, images=images, refused=refused,
                           written=set(files(home)) ^ set(before))


def pixels_of(path, name):
    """The mask of an image in a COCO JSON."""
    content = read_json(path)
    image = next(one for one in content["images"] if one["file_name"].startswith(f"{name}."))
    found = np.zeros((image["height"], image["width"]), np.uint8)
    for one in content["annotations"]:
        if one["image_id"] == image["id"]:
            found[rle.decode(one["segmentation"]) > 0] = one["category_id"]
    return found


def test_steps_3_and_6_export_the_masks_that_they_wrote(scripts):
    out = scripts.folder / "output" / "inference"
    assert sorted(os.listdir(out / "export")) == sorted(EXPORTS)
    names = [path.stem for path in out.glob("*.png")]
    for path in (out / "export/coco/annotations/instances_train2014.json",
                 scripts.folder / "output/deeplab_test/export/coco/annotations/instances_val2014.json"):
        content = read_json(path)
        masks = path.parents[3] if path.parents[3].name == "inference" else path.parents[3] / "masks"
        assert [one["name"] for one in content["categories"]][0] == "bullseye_hound", content["categories"]
        for image in content["images"]:
            name = Path(image["file_name"]).stem
            assert np.array_equal(pixels_of(path, name), read_mask(masks / f"{name}.png")), name
    assert len(names) == 12 and f"Wrote {Path('output/inference/export/coco')}: 12 masks" in scripts.first.stdout
    assert np.array_equal(read_mask(out / "export" / "png" / "labels" / f"{names[0]}.png"),
                          read_mask(out / f"{names[0]}.png"))
    shapes = read_json(out / "export" / "labelme" / f"{names[0]}.json")
    photo = out / "export" / "labelme" / shapes["imagePath"]
    assert photo.samefile(scripts.folder / DATA / "images" / f"{names[0]}.jpg"), shapes["imagePath"]


def test_an_export_of_the_same_masks_is_used_again_and_one_named_twice_written_once(scripts):
    said = scripts.again.stdout
    assert said.count("Using output/inference/export/coco: exported from the same masks") == 1, said
    assert "Using output/inference/export/yolo" in said and "masks for annotation tools" not in said, said


def test_images_of_any_kind_are_exported_with_their_own_names(scripts):
    home = scripts.folder / "output" / "images" / "export"
    assert sorted(os.listdir(home)) == ["coco", "labelme"]
    content = read_json(home / "coco" / "annotations" / "instances_train2014.json")
    assert [one["file_name"] for one in content["images"]] == ["a.jpg", "b.png"], content["images"]
    for name in "ab":
        assert np.array_equal(pixels_of(home / "coco" / "annotations" / "instances_train2014.json", name),
                              read_mask(scripts.folder / "output" / "images" / f"{name}.png")), name
    path = read_json(home / "labelme" / "b.json")["imagePath"]
    assert (home / "labelme" / path).samefile(scripts.folder / "photos" / "b.png"), path


REFUSED = {"name": ("--export", "pascal", "coco", "yolo"), "deeplab": ("--export", "svg", "labelme"),
           "foreign": ("mine/export/voc holds files that no --export wrote", "name another --output_dir"),
           "foreign again": ("mine/export/voc holds files that no --export wrote",),
           "alike": ("c.jpg is not the only c", "rename it")}


@pytest.mark.parametrize("case", REFUSED)
def test_an_export_is_refused_before_any_work(case, scripts):
    check_one_line(scripts.refused[case], REFUSED[case])
    assert not scripts.written, f"written: {scripts.written}"


def test_the_palette_of_labelmap_is_that_of_the_masks(scripts):
    rows = (scripts.folder / "output/inference/export/voc/labelmap.txt").read_text().splitlines()[1:]
    assert [tuple(map(int, row.split(":")[1].split(","))) for row in rows] == list(map(tuple, voc_palette()[:4])), rows
