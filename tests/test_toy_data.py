"""The toy dataset: same bytes for the same options, the official layout, and no way to tell a class but the pattern."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.make_toy import BREEDS, make_toy
from data.toy_pet import PATTERNS, draw_pet, pattern_ink

REPO = Path(__file__).resolve().parents[1]
TRAIN, TEST, SIZE = 120, 80, 64


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy") / "set"
    make_toy(root, train=TRAIN, test=TEST, size=SIZE)
    return root


def _tree(root):
    """Relative path -> bytes of every file below root."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def _lines(root, name):
    """Fields of the lines of an annotation file, comments left out."""
    text = (root / "annotations" / f"{name}.txt").read_text()
    return [line.split() for line in text.splitlines() if not line.startswith("#")]


def _image(root, image_id):
    return np.asarray(Image.open(root / "images" / f"{image_id}.jpg"))


def _trimap(root, image_id):
    return np.asarray(Image.open(root / "annotations" / "trimaps" / f"{image_id}.png"))


def _cli(*flags):
    command = [sys.executable, "-m", "data.make_toy", *map(str, flags)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60)


# --- determinism ---------------------------------------------------------------------------------------------------

def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        make_toy(tmp_path / name, train=6, test=3, size=40, seed=7)
    a, b = _tree(tmp_path / "a"), _tree(tmp_path / "b")
    different = [name for name in a if a[name] != b.get(name)]
    assert a.keys() == b.keys() and not different, f"{len(different)} of {len(a)} files differ: {different[:3]}"


def test_another_seed_gives_other_images(tmp_path):
    for seed in (0, 1):
        make_toy(tmp_path / str(seed), train=4, test=1, size=40, seed=seed)
    a, b = (_tree(tmp_path / str(seed)) for seed in (0, 1))
    same = [name for name in a if name.endswith(".jpg") and a[name] == b[name]]
    assert not same, f"{len(same)} images are the same under seeds 0 and 1: {same}"


def test_a_larger_set_starts_with_the_smaller_one(toy, tmp_path):
    make_toy(tmp_path / "small", train=9, test=5, size=SIZE)
    small, large = _tree(tmp_path / "small"), _tree(toy)
    pictures = [name for name in small if name.endswith((".jpg", ".png"))]
    different = [name for name in pictures if small[name] != large.get(name)]
    assert len(pictures) == 28 and not different, f"{len(different)} of {len(pictures)} differ: {different[:3]}"
    for name, count in (("trainval", 9), ("test", 5)):
        assert _lines(tmp_path / "small", name) == _lines(toy, name)[:count], f"{name}.txt is not a prefix"


# --- layout --------------------------------------------------------------------------------------------------------

def test_the_annotation_files_have_the_official_layout(toy):
    train, test, everything = (_lines(toy, name) for name in ("trainval", "test", "list"))
    assert (toy / "annotations" / "list.txt").read_text().startswith("#Image CLASS-ID SPECIES BREED ID\n#")
    assert (len(train), len(test)) == (TRAIN, TEST), f"{len(train)} train and {len(test)} test lines"
    assert sorted(everything) == sorted(train + test), "list.txt is not the two splits together"
    ids = {fields[0] for fields in everything}
    assert len(ids) == TRAIN + TEST, f"{len(ids)} different ids in {TRAIN + TEST} lines: the splits overlap"
    assert ids == {p.stem for p in (toy / "images").glob("*.jpg")}
    assert ids == {p.stem for p in (toy / "annotations" / "trimaps").glob("*.png")}


def test_names_and_class_numbers_look_like_pets(toy):
    breeds = {breed.name: breed for breed in BREEDS}
    for image_id, *numbers in _lines(toy, "list"):
        name, number = image_id.rsplit("_", 1)
        breed = breeds[name]
        assert number == str(int(number)) and int(number) >= 1, f"leading zero or bad number in {image_id}"
        expected = [str(breed.class_id), str(breed.species), str(breed.breed_id)]
        assert numbers == expected, f"{image_id}: {numbers}, not {expected}"
        assert name[0].isupper() == (breed.species == 1), f"{name}: cats begin with a capital and dogs do not"


def test_class_ids_follow_the_sorted_names_and_leave_gaps():
    names, ids = [b.name for b in BREEDS], [b.class_id for b in BREEDS]
    assert names == sorted(names, key=str.lower), f"not in Pet's order: {names}"
    assert ids == sorted(set(ids)) and ids[0] >= 1, f"class ids {ids}"
    assert ids[:2] != [1, 2], f"the first two of {ids} leave no gap: code that takes ids as indices would pass"


@pytest.mark.parametrize("name, total", [("trainval", TRAIN), ("test", TEST)])
def test_classes_are_balanced_in_each_split_and_in_its_head(toy, name, total):
    for lines in (_lines(toy, name), _lines(toy, name)[:8]):
        counts = np.unique([fields[1] for fields in lines], return_counts=True)[1]
        assert counts.tolist() == [len(lines) // 4] * 4, f"{name}: {counts.tolist()} images per class"


def test_images_are_rgb_of_varied_size_and_trimaps_match(toy):
    sizes = []
    for image_id, *_ in _lines(toy, "list"):
        image, trimap = _image(toy, image_id), _trimap(toy, image_id)
        assert image.shape == (*trimap.shape, 3), f"{image_id}: image {image.shape}, trimap {trimap.shape}"
        assert set(np.unique(trimap)) == {1, 2, 3}, f"{image_id}: trimap values {np.unique(trimap)}"
        sizes += image.shape[:2]
    low, high = SIZE * 6 / 7 - 1, SIZE * 17 / 14 + 1
    assert low <= min(sizes) and max(sizes) <= high, f"sides {min(sizes)}..{max(sizes)}, not {low:.0f}..{high:.0f}"
    assert len(set(sizes)) > 10 and any(s % 2 for s in sizes), f"{len(set(sizes))} different sides"


# --- what is in the picture ----------------------------------------------------------------------------------------

def test_the_border_is_one_or_two_pixels_between_pet_and_background(toy):
    for image_id, *_ in _lines(toy, "list")[:40]:
        trimap = np.pad(_trimap(toy, image_id), 1, mode="edge")
        h, w = trimap.shape[0] - 2, trimap.shape[1] - 2
        shifts = np.stack([trimap[i:i + h, j:j + w] for i in range(3) for j in range(3)])
        touching = ((shifts == 1).any(0) & (shifts == 2).any(0)).sum()
        assert touching == 0, f"{image_id}: pet meets background without a border at {touching} pixels"
        lone = ((trimap[1:-1, 1:-1] == 3) & (shifts == 3).all(0)).mean()
        assert lone < 0.02, f"{image_id}: {lone:.1%} of the image is border further than one pixel from anything else"


@pytest.mark.parametrize("size, low, high", [(64, 0.18, 0.53), (112, 0.2, 0.53)])
def test_the_pet_fills_a_varied_share_of_the_image(size, low, high):
    pictures = [draw_pet(np.random.default_rng([3, i]), "ring", size)[1] for i in range(60)]
    share = np.array([(trimap == 1).mean() for trimap in pictures])
    assert low <= share.min() and share.max() <= high, f"share {share.min():.3f}..{share.max():.3f} of the image"
    assert share.std() > 0.03, f"shares differ by only {share.std():.3f}"


def test_pets_are_not_always_in_the_middle(toy):
    centres = []
    for image_id, *_ in _lines(toy, "list"):
        pet = _trimap(toy, image_id) == 1
        centres.append([np.mean(np.nonzero(pet)[axis]) / pet.shape[axis] for axis in (0, 1)])
    spread = np.std(centres, axis=0)
    assert spread.min() > 0.05, f"centres differ by {spread.round(3)} of the image's height and width"


def test_an_edge_can_be_seen_between_pet_and_background(toy):
    """The body's mean colour differs from what lies around it, though single clutter may come near to it."""
    distances = []
    for image_id, *_ in _lines(toy, "list"):
        image, trimap = _image(toy, image_id).astype(float), _trimap(toy, image_id)
        distances.append(np.linalg.norm(image[trimap == 1].mean(0) - image[trimap == 2].mean(0)))
    few = np.mean(np.array(distances) < 25)
    assert few < 0.1, f"{few:.0%} of the pets are within 25 RGB levels of their background"


# --- the pattern is all there is to tell a class --------------------------------------------------------------------

def test_every_pattern_inks_the_same_share_of_the_disc():
    u, v = np.meshgrid(np.linspace(-1, 1, 401), np.linspace(-1, 1, 401))
    disc = (u * u + v * v < 1).sum()
    share = {name: pattern_ink(name, u, v).sum() / disc for name in PATTERNS}
    assert max(share.values()) - min(share.values()) < 0.02, f"inked share of the disc: {share}"


@pytest.mark.parametrize("pattern", [breed.pattern for breed in BREEDS[1:]])
def test_only_the_head_changes_with_the_class(pattern):
    for index in range(6):
        a, trimap_a = draw_pet(np.random.default_rng([0, index]), BREEDS[0].pattern, 112)
        b, trimap_b = draw_pet(np.random.default_rng([0, index]), pattern, 112)
        assert np.array_equal(trimap_a, trimap_b), f"pet {index}: the outline depends on the class"
        changed, pet = (a != b).any(-1), trimap_a != 2
        outside = (changed & ~pet).sum()
        share = changed.sum() / pet.sum()
        assert outside == 0, f"pet {index}: {outside} background pixels depend on the class"
        assert 0.03 < share < 0.3, f"pet {index}: {share:.1%} of the pet depends on the class"


def _global_statistics(root, image_id, tint=0.0):
    """What can be seen without the mark: the background's colours, the pet's share of the image, place and frame."""
    image, pet = _image(root, image_id) + tint, _trimap(root, image_id) == 1
    place = [np.mean(np.nonzero(pet)[axis]) / pet.shape[axis] for axis in (0, 1)]
    background = image[_trimap(root, image_id) == 2]
    return np.concatenate([background.mean(0), background.std(0), [pet.mean(), *place, *pet.shape]])


def _nearest_class_mean_accuracy(train, train_labels, test, test_labels):
    scale, classes = train.std(0) + 1e-9, np.unique(train_labels)
    means = np.stack([train[train_labels == c].mean(0) for c in classes])
    nearest = np.linalg.norm((test[:, None] - means) / scale, axis=2).argmin(1)
    return (classes[nearest] == test_labels).mean()


def _accuracy_from_statistics(root, tint=0.0):
    """tint: RGB levels added per class number, to show that the measure sees a leak where there is one."""
    splits = []
    for name in ("trainval", "test"):
        labels = np.array([int(fields[1]) for fields in _lines(root, name)])
        rows = [_global_statistics(root, fields[0], tint * int(fields[1])) for fields in _lines(root, name)]
        splits += [np.stack(rows), labels]
    return _nearest_class_mean_accuracy(*splits)


def test_background_size_and_place_do_not_tell_the_class(toy):
    accuracy = _accuracy_from_statistics(toy)
    assert accuracy < 0.25 + 0.15, f"{accuracy:.3f} of the test images told by global statistics; chance is 0.25"


def test_the_leak_check_sees_a_leak(toy):
    accuracy = _accuracy_from_statistics(toy, tint=40.0)
    assert accuracy > 0.6, f"only {accuracy:.3f} with a tint of 40 levels per class number"


# --- the command ---------------------------------------------------------------------------------------------------

def test_the_command_writes_a_set_and_leaves_it_alone_the_second_time(tmp_path):
    flags = ("--root", tmp_path / "deep" / "toy", "--train", 4, "--test", 2, "--classes", 2, "--size", 33, "--seed", 5)
    first, stamp = _cli(*flags), lambda: (tmp_path / "deep" / "toy" / "toy.json").stat().st_mtime_ns
    assert first.returncode == 0, first.stderr
    before = stamp()
    second = _cli(*flags)
    assert second.returncode == 0 and "already" in second.stdout, second.stdout + second.stderr
    assert stamp() == before, "the set was written again"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["toy"], "something was left beside the set"


def test_other_options_replace_an_older_toy_set(tmp_path, capsys):
    make_toy(tmp_path / "toy", train=6, test=2, size=32)
    make_toy(tmp_path / "toy", train=2, test=2, size=32)
    assert len(_lines(tmp_path / "toy", "trainval")) == 2, capsys.readouterr().out
    assert len(list((tmp_path / "toy" / "images").iterdir())) == 4, "images of the older set are left"
    assert json.loads((tmp_path / "toy" / "toy.json").read_text())["train"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["toy"], "something was left beside the set"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "toy").mkdir()
    make_toy(tmp_path / "toy", train=1, test=1, size=32)
    assert len(_lines(tmp_path / "toy", "list")) == 2


@pytest.mark.parametrize("content", [{"mine.txt": "keep"}, {"toy.json": "{}"}, {"toy.json": "not json"}])
def test_a_folder_made_by_someone_else_is_refused_and_kept(tmp_path, content):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    result = _cli("--root", tmp_path, "--train", 1, "--test", 1)
    assert result.returncode in (1, 2), f"exit status {result.returncode}"
    assert len(result.stderr.splitlines()) == 1 and "was not made by data.make_toy" in result.stderr, result.stderr
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == content, "the folder was changed"


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "toy").write_text("a file")
    result = _cli("--root", tmp_path / "toy", "--train", 1, "--test", 1)
    assert result.returncode in (1, 2) and len(result.stderr.splitlines()) == 1, result.stderr


@pytest.mark.parametrize("flag, value", [("size", 31), ("train", 0), ("test", 0), ("classes", 1), ("classes", 7),
                                         ("seed", -1)])
def test_options_out_of_range_are_refused(tmp_path, flag, value):
    result = _cli("--root", tmp_path / "toy", f"--{flag}", value)
    assert result.returncode == 2 and f"--{flag} must be" in result.stderr, result.stderr
    assert not (tmp_path / "toy").exists()


def test_the_help_shows_units_and_defaults():
    result = _cli("--help")
    assert result.returncode == 0, result.stderr
    for text in ("data/toy", "pixels", "default: 112", "default: 240", "default: 80"):
        assert text in " ".join(result.stdout.split()), f"{text!r} is not in the help"
