"""Masks of any image files (--images): what is written where, and that no file of the user's is written over."""
import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from script_runs import MACHINE, STAGE2, chain, files, fork, picture, read_json
from test_refusals import check_one_line

from src.inference import LEDGER, check_results, list_images, result_names
from utils.errors import UserError

COMMON = ("run_inference.py", "--model_path", "model.pth.tar", "--no-crf", *MACHINE)


def _hashes(folder):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files(folder)}


def _results(*stems, folder=""):
    return {f"{folder}{stem}{end}" for stem in stems for end in (".png", "_overlay.png")} | {f"{folder}{LEDGER}"}


# --- in folders of their own -----------------------------------------------------------------------------------------

@chain
def pictures(folder, get):
    """One image outside any dataset, twice, then a folder of them, where nothing but the checkpoint is."""
    home = folder / "home"
    home.mkdir()
    (home / "model.pth.tar").hardlink_to(get("pipeline").folder / STAGE2)
    picture(home / "alone" / "drawn.jpg", 50, 61)
    picture(home / "several" / "rgba.jpg", 47, 70, "RGBA", "PNG")
    picture(home / "several" / "grey.png", 66, 45, "L", "PNG")
    one, again, many = fork(folder, [(home, (*COMMON, "--images", "alone/drawn.jpg", "--save_walk", "--crf")),
                                     (home, (*COMMON, "--images", "alone/drawn.jpg", "--crf")),
                                     (home, (*COMMON, "--images", "several", "--output_dir", "masks"))])
    for done in (one, again, many):
        assert done.returncode == 0, f"{done.args}: {done.stderr}"
    return SimpleNamespace(folder=home, one=one, again=again, many=many)


@pytest.mark.parametrize("name, size, out", [("drawn", (50, 61), "output/images"), ("rgba", (47, 70), "masks"),
                                             ("grey", (66, 45), "masks")])
def test_any_image_gets_a_mask_and_an_overlay_from_the_checkpoint_alone(pictures, name, size, out):
    with Image.open(pictures.folder / out / f"{name}.png") as mask:
        assert mask.mode == "P" and mask.size[::-1] == size, f"{mask.mode} {mask.size}"
        assert np.asarray(mask).max() <= 3
    with Image.open(pictures.folder / out / f"{name}_overlay.png") as overlay:
        below = overlay.height - size[0]
        assert overlay.mode == "RGB" and overlay.width == size[1] and 0 < below < 80, f"{overlay.mode} {overlay.size}"


def test_each_image_is_told_with_its_classes_and_where_its_mask_is(pictures):
    said = pictures.one.stdout
    assert "alone/drawn.jpg: " in said and "foreground" in said and "-> output/images/drawn.png" in said, said
    assert any(name in said for name in ("bullseye_hound", "Crossmark_cat", "dotted_terrier")), said
    assert "labels=predicted" in pictures.one.stderr, pictures.one.stderr


def test_the_propagation_on_any_image_can_be_animated(pictures):
    with Image.open(pictures.folder / "output/images/walks/drawn.gif") as animation:
        assert animation.format == "GIF" and animation.size == (61, 50), f"{animation.format} {animation.size}"


def test_nothing_but_results_is_written_for_any_image(pictures):
    expected = {"model.pth.tar", "alone/drawn.jpg", "several/rgba.jpg", "several/grey.png",
                *_results("rgba", "grey", folder="masks/"), *_results("drawn", folder="output/images/"),
                "output/images/walks/drawn.gif"}
    assert set(files(pictures.folder)) == expected, set(files(pictures.folder)) ^ expected


# --- beside photos, and beside each other ----------------------------------------------------------------------------

@chain
def beside(folder, get):
    """Every case in a folder of its own: name -> (runs, hashes before, hashes after)."""
    homes = {name: folder / name for name in BESIDE}
    jobs = []
    for name, (photos, commands) in BESIDE.items():
        homes[name].mkdir()
        (homes[name] / "model.pth.tar").hardlink_to(get("pipeline").folder / STAGE2)
        for number, photo in enumerate(photos):
            picture(homes[name] / "photos" / photo, 40 + number, 45)
        jobs += [(homes[name], (*COMMON, *command)) for command in commands]
    write_manifest(homes["of_a_split"])
    before = {name: _hashes(home) for name, home in homes.items()}
    runs = iter(fork(folder, jobs))
    return {name: SimpleNamespace(folder=homes[name], runs=[next(runs) for _ in commands], before=before[name],
                                  after=_hashes(homes[name])) for name, (_, commands) in BESIDE.items()}


def write_manifest(home):
    (home / "output/inference").mkdir(parents=True)
    (home / "output/inference/manifest.json").write_text("{}")


HERE = ("--images", "photos", "--output_dir", "photos")
BESIDE = {  # name -> (photos, the flags of each run)
    "one_over_another": (("a.jpg", "a.png"), (("--images", "photos/a.jpg", "--output_dir", "photos"),)),
    "a_mask_over_its_photo": (("b.png",), (HERE,)),
    "an_overlay_over_a_photo": (("c.jpg", "c_overlay.png"), (("--images", "photos/c.jpg", "--output_dir", "photos"),)),
    "of_a_split": (("a.jpg",), (("--images", "photos", "--output_dir", "output/inference"),)),
    "same_stem": (("a.jpg", "a.png", "d.jpg"), (("--images", "photos"), ("--images", "photos"))),
    "cat": (("cat.jpg", "cat_overlay.jpg"), (("--images", "photos"),)),
    "among_photos": (("a.jpg", "b.jpeg"), (HERE, HERE)),
    "same_stem_among_photos": (("a.jpg", "a.png"), (HERE, HERE)),
}
REFUSED = {"one_over_another": ("photos/a.png is there already", "not made by --images", "another --output_dir"),
           "a_mask_over_its_photo": ("photos/b.png is there already", "not made by --images", "another --output_dir"),
           "an_overlay_over_a_photo": ("photos/c_overlay.png is there already", "another --output_dir"),
           "of_a_split": ("output/inference holds the masks of a split", "manifest.json", "another --output_dir")}


@pytest.mark.parametrize("case", REFUSED)
def test_results_never_meet_files_that_were_not_made_by_images(case, beside):
    done = beside[case]
    check_one_line(done.runs[0], REFUSED[case])
    assert done.after == done.before, f"written or changed: {set(done.after.items()) ^ set(done.before.items())}"


@pytest.mark.parametrize("case, names", [("same_stem", ("a.jpg", "a.png", "d")),
                                         ("cat", ("cat.jpg", "cat_overlay.jpg"))])
def test_images_whose_results_would_meet_get_results_of_their_own(case, names, beside):
    done = beside[case]
    assert [one.returncode for one in done.runs] == [0] * len(done.runs), done.runs[-1].stderr
    written = set(done.after) - set(done.before)
    assert written == _results(*names, folder="output/images/"), written
    for photo, name in zip(BESIDE[case][0], names):
        with Image.open(done.folder / "photos" / photo) as image, \
                Image.open(done.folder / f"output/images/{name}.png") as mask:
            assert mask.size == image.size, f"the mask of {photo} has the size {mask.size}, the photo {image.size}"


@pytest.mark.parametrize("case, names", [("among_photos", ("a", "b")), ("same_stem_among_photos", ("a.jpg", "a.png"))])
def test_results_among_the_photos_leave_these_alone_and_are_not_taken_for_photos(case, names, beside):
    done = beside[case]
    assert [one.returncode for one in done.runs] == [0, 0], done.runs[-1].stderr
    changed = [name for name in done.before if done.after.get(name) != done.before[name]]
    assert not changed, f"photos that were written over: {changed}"
    assert set(done.after) - set(done.before) == _results(*names, folder="photos/"), set(done.after)
    assert done.runs[0].stdout == done.runs[1].stdout, f"first:\n{done.runs[0].stdout}then:\n{done.runs[1].stdout}"


# --- without a network -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("files, names", [
    (("a.jpg", "b.png"), ["a", "b"]),
    (("a.jpg", "a.png", "b.png"), ["a.jpg", "a.png", "b"]),
    (("cat.jpg", "cat_overlay.jpg"), ["cat.jpg", "cat_overlay.jpg"]),
    (("a.jpg", "a.png", "a.jpg.png"), ["a.jpg", "a.png", "a.jpg.png"]),
    (("x/a.jpg",), ["a"]),
])
def test_every_image_has_names_of_its_own(files, names, tmp_path):
    found = result_names([tmp_path / file for file in files])
    assert found == names, found
    results = [f"{name}{end}" for name in found for end in (".png", "_overlay.png")]
    assert len(set(results)) == len(results), results


def test_the_ledger_names_results_and_nothing_else(tmp_path):
    (tmp_path / LEDGER).write_text('{"results": ["a.png", "a_overlay.png"]}')
    for name in ("a.jpg", "a.png", "b.png"):
        picture(tmp_path / name, 8, 9)
    assert [path.name for path in list_images(tmp_path)] == ["a.jpg", "b.png"]
    check_results([tmp_path / "a.jpg"], tmp_path)
    with pytest.raises(UserError, match="b.png is there already and was not made by --images"):
        check_results([tmp_path / "b.jpg"], tmp_path)


def test_a_folder_of_results_alone_holds_no_image(tmp_path):
    (tmp_path / LEDGER).write_text('{"results": ["a.png"]}')
    picture(tmp_path / "a.png", 8, 9)
    with pytest.raises(UserError, match="holds no image .*pass another --images"):
        list_images(tmp_path)


def test_a_damaged_ledger_is_refused_with_the_remedy(tmp_path):
    (tmp_path / LEDGER).write_text("{")
    with pytest.raises(UserError, match=f"cannot read .*{LEDGER}.*another --output_dir"):
        check_results([tmp_path / "b.jpg"], tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"results": "a.png"}', "3"])
def test_a_ledger_of_another_program_is_refused_with_the_remedy(tmp_path, content):
    (tmp_path / LEDGER).write_text(content)
    for call in (lambda: check_results([tmp_path / "b.jpg"], tmp_path), lambda: list_images(tmp_path)):
        with pytest.raises(UserError, match=f"{LEDGER} .*delete it, and name another --output_dir"):
            call()


def test_a_run_that_fails_lists_what_it_wrote_and_nothing_else(pipeline, tmp_path):
    """What is listed counts as made by --images: a photo that is put there later must not."""
    home = tmp_path / "home"
    for name in ("a.jpg", "b.jpg"):
        picture(home / "photos" / name)
    whole = (home / "photos/b.jpg").read_bytes()
    (home / "photos/b.jpg").write_bytes(whole[:300])
    (home / "model.pth.tar").hardlink_to(pipeline.folder / STAGE2)
    (failed,) = fork(tmp_path, [(home, (*COMMON, *HERE))])
    check_one_line(failed, ("cannot decode image", "b.jpg"))
    assert read_json(home / "photos" / LEDGER)["results"] == ["a.png", "a_overlay.png"]
    (home / "photos/b.jpg").rename(home / "b.jpg")
    mine = picture(home / "photos/b.png", 30, 31, "RGB", "PNG").read_bytes()
    (refused,) = fork(tmp_path, [(home, (*COMMON, *HERE))])
    check_one_line(refused, ("photos/b.png is there already", "not made by --images"))
    assert (home / "photos/b.png").read_bytes() == mine
