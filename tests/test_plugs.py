"""The proof of the plugs: a backbone, a seed method and a dataset of this file's own, registered with one line each, go
through all six steps of the real scripts.

    python tests/test_plugs.py run_train.py --stage 1 ...      a script, with the three plugs registered
"""
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from script_runs import chain, checkpoint, copy, environment, files, finish, interrupt, read_json, start  # noqa: E402

from models.backbone import BACKBONES, BackbonePlug  # noqa: E402
from models.classifier import Classifier  # noqa: E402
from src.seeds import SEEDS  # noqa: E402
from src.seeds.cam import Plan, Seed, sum_views, unit_maximum  # noqa: E402
from utils.datasets import DATASETS  # noqa: E402
from utils.datasets.base import Dataset, Layout  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.recipes import by_step  # noqa: E402
from utils.runtime import run_main  # noqa: E402
from utils.transforms import Normalise  # noqa: E402

# --- a backbone: one stride for all stages, group normalisation, pre-activation blocks, pixels of its own ------------


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.bn1, self.conv1 = nn.GroupNorm(2, inputs), nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)

    def forward(self, x):
        return self.conv1(F.relu(self.bn1(x)))


class ToyBackbone(nn.Module):
    stages, stride, normalise = ("first", "second", "third"), 8, Normalise((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    channels = {"first": 12, "second": 16, "third": 20}

    def __init__(self, output_stride, width, dilated):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8, padding=4)
        self.first, self.second, self.third = Block(8, 12), Block(12, 16), Block(16, 20)
        self.register_buffer("gain", torch.tensor(1.5), persistent=False)

    def forward(self, x):
        x, maps = self.stem(x) * self.gain, {}
        for stage in self.stages:
            x = maps[stage] = getattr(self, stage)(x)
        return maps

    def blocks(self):
        return [[self.stem], [self.first], [self.second], [self.third]]

    def pairs(self):
        return ()


# --- a seed: how much a cell's features look like the mean of those where the class's CAM is high --------------------

class Lookalike(Seed):
    name = "lookalike"
    closed_form = True

    def __init__(self, classes, channels):
        super().__init__()
        self.register_buffer("means", torch.zeros(classes, channels))

    @classmethod
    def check(cls, plan: Plan):
        if plan.accumulate > 2:
            raise UserError("--method lookalike dislikes --accumulate above 2; lower it")

    @classmethod
    def build(cls, classifier: Classifier):
        return cls(classifier.head.out_channels, classifier.backbone.channels["second"])

    def fit(self, classifier, read, labels, seed):
        count = len(labels)
        for features, cam, keys in read(range(count)):
            for key in keys:
                weight = cam[0, key].softmax(dim=-1)
                self.means[key] += (features["second"][0].float() * weight).sum(dim=(1, 2)) / count

    def maps(self, classifier, features, cam, images):
        return (torch.einsum("bdhw,kd->bkhw", F.normalize(features["second"].float(), dim=1),
                             F.normalize(self.means, dim=1)),)

    def merge(self, views, keys, size):
        return unit_maximum(sum_views([one[:, keys].relu() for one, in views], size))


# --- a dataset: images and masks are .npy files ----------------------------------------------------------------------

class Arrays(Dataset):
    def image(self, index):
        return np.load(self.image_path(index))

    def size(self, index):
        return self.image(index).shape[:2]


def read_array(image_id, labels):
    path = Path("shapes") / f"{image_id}.mask.npy"
    return path, np.load(path)


def open_shapes(root, split, **_):
    rows = json.loads((root / "labels.json").read_text())
    ids = [image_id for image_id, row in rows.items() if row["split"] == (split or "learn")]
    labels = np.array([[name in rows[image_id]["shows"] for name in ("disc", "square")] for image_id in ids], np.uint8)
    return Arrays("shapes", root, split or "learn", ("learn",), ["disc", "square"], ids, labels, root,
                  [f"{image_id}.npy" for image_id in ids], read_array)


def draw(root, count=10):
    """Bright discs and dark squares on noise, half of them to learn from."""
    rng, rows = np.random.default_rng(0), {}
    root.mkdir(parents=True)
    y, x = np.mgrid[:49, :57]
    for number in range(count):
        shape = number % 2
        inside = (abs(y - 24) < 14) & (abs(x - 30) < 14) if shape else (y - 24) ** 2 + (x - 30) ** 2 < 200
        image = rng.integers(90, 150, (49, 57, 3)) + (inside * (-80 if shape else 90))[..., None]
        np.save(root / f"s{number}.npy", image.astype(np.uint8))
        np.save(root / f"s{number}.mask.npy", (inside * (shape + 1)).astype(np.uint8))
        rows[f"s{number}"] = {"shows": ["square" if shape else "disc"], "split": "test" if number >= 6 else "learn"}
    (root / "labels.json").write_text(json.dumps(rows))


# --- one line each ---------------------------------------------------------------------------------------------------

def register():
    BACKBONES["toy"] = BackbonePlug(ToyBackbone)
    SEEDS["lookalike"] = Lookalike
    DATASETS["shapes"] = Layout(open_shapes, "shapes", test_split="test", defaults=by_step(64))


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The plugs, for the tests of this file alone."""
    register()
    yield
    del BACKBONES["toy"], SEEDS["lookalike"], DATASETS["shapes"]


HERE = "tests/test_plugs.py"
MACHINE = ("--device", "cpu", "--workers", 0, "--precision", "fp32")
TRAIN = ("--dataset", "shapes", "--backbone", "toy", "--pretrained", "none", "--crop_size", 33, "--batch_size", 3,
         "--epochs", 4, *MACHINE)
STEPS = (("run_train.py", "--stage", 1, *TRAIN, "--method", "lookalike", "--scales", 1),
         ("run_train.py", "--stage", 2, "--epochs", 2, "--batch_size", 3, *MACHINE),
         ("run_inference.py", "--model_path", "output/stage2_toy/model_best.pth.tar", *MACHINE),
         ("run_eval.py", *MACHINE),
         ("train_deeplab.py", "--backbone", "toy", "--pretrained", "none", "--epochs", 2, "--batch_size", 3, *MACHINE),
         ("test_deeplab.py", "--scales", 1, *MACHINE))


@chain
def plugged(folder, get):
    """All six steps.  The folder they ran in, and what they said."""
    draw(folder / "shapes")
    return folder, [finish(start(folder, HERE, *step)) for step in STEPS]


@chain
def resumed(folder, get):
    """Step 1 stopped by Ctrl-C in its midst, and taken up again.  The folder."""
    draw(folder / "shapes")
    step = (*STEPS[0], "--save_every", 0)
    stopped = interrupt(start(folder, HERE, *step), folder / "output/stage1_toy/log.jsonl", 1)
    return folder, stopped, finish(start(folder, HERE, *step, "--resume"))


@chain
def two_ranks(folder, get):
    """Steps 1 and 2 as two ranks on the CPU, the second from the CAMs of one.  The folder, and what torchrun said."""
    home = copy(get("plugged")[0], folder / "home")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / HERE)]
    steps = [(*STEPS[0], "--cam_dir", "two/cams", "--output_dir", "two/1"), (*STEPS[1], "--output_dir", "two/2")]
    return home, [subprocess.run([*command, *map(str, step)], cwd=home, env=environment(home), text=True,
                                 capture_output=True, timeout=200) for step in steps]


def test_all_six_steps_run_with_the_three_plugs(plugged):
    folder, runs = plugged
    bad = [done for done in runs if done.returncode]
    assert not bad, f"{bad[0].args[1:]}: {bad[0].stderr[-2000:]}"
    scores = [read_json(folder / "output" / name / "scores.json")["scores"] for name in ("eval", "deeplab_test")]
    assert "mask" in scores[0] and "+ CRF" in scores[1], [list(one) for one in scores]


def test_the_checkpoint_carries_the_seed_and_the_backbone_by_name(plugged):
    record = checkpoint(plugged[0] / "output/stage2_toy/model_best.pth.tar")["networks"]["classifier"]
    assert (record["backbone"], record["seed"]) == ("toy", {"name": "lookalike"}), record["seed"]
    assert record["state"]["seed.means"].abs().sum() > 0, "the seed was not fitted"
    assert "backbone.gain" not in record["state"], "a buffer that is not persistent was saved"


def test_the_cams_are_those_of_the_seed(plugged):
    """Computed again here, from the checkpoint's tensors and the definition alone."""
    from models.weights import unpack
    from src.seeds import attach
    from utils.grids import resize_image
    folder = plugged[0]
    network = unpack(checkpoint(folder / "output/stage1_toy/model_best.pth.tar")["networks"]["classifier"], attach)
    assert network.backbone.gain == 1.5, "the buffer that is not persistent was lost"
    image = resize_image(np.load(folder / "shapes/s0.npy"), (49, 57))
    view = network.backbone.normalise(image)
    with torch.no_grad():
        found = []
        for one in (view, view.flip(-1)):
            features = F.normalize(network.backbone(one[None])["second"], dim=1)[0]
            found.append(torch.einsum("dhw,d->hw", features, F.normalize(network.seed.means, dim=1)[0]).relu())
        total = F.interpolate((found[0] + found[1].flip(-1))[None, None], (13, 15), mode="bilinear", align_corners=True)
    with np.load(folder / "data/cams/s0.npz") as stored:
        assert stored["keys"].tolist() == [0], stored["keys"]
        gap = abs(stored["cam"][0].astype(np.float32) - (total / total.max())[0, 0].numpy()).max()
    assert gap < 2e-3, f"the stored CAM differs by {gap:.1e} from the seed's definition"


def test_a_pipeline_in_memory_makes_the_masks_of_step_3(plugged):
    from PIL import Image

    from src.pipeline import Pipeline
    folder = plugged[0]
    pipeline = Pipeline.load(folder / "output/stage2_toy/model_best.pth.tar", device="cpu", scales=(1.0,))
    for number, name in ((0, "disc"), (1, "square")):
        mask = pipeline.mask(np.load(folder / f"shapes/s{number}.npy"), labels=[name])
        stored = np.asarray(Image.open(folder / f"output/inference/s{number}.png"))
        assert np.array_equal(mask, stored), f"{(mask != stored).mean():.1%} of s{number}'s pixels differ"


def test_a_stopped_run_resumes_to_the_same_bits(plugged, resumed):
    folder, stopped, again = resumed
    assert stopped.returncode == 130 and "--resume goes on from there" in stopped.stderr, stopped.stderr[-1000:]
    assert again.returncode == 0, again.stderr[-2000:]
    states = [checkpoint(home / "output/stage1_toy/model_best.pth.tar")["networks"]["classifier"]["state"]
              for home in (plugged[0], folder)]
    differing = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert not differing, f"{differing} differ from the run that was not stopped"


def test_two_ranks_have_the_losses_of_one(plugged, two_ranks):
    folder, runs = two_ranks
    bad = [done for done in runs if done.returncode]
    assert not bad, bad[0].stderr[-3000:]
    one, two = ([line for line in map(json.loads, (folder / place / "log.jsonl").read_text().splitlines())
                 if "grad_norm" in line] for place in ("output/stage2_toy", "two/2"))  # stage 1 has dropout
    assert len(one) == len(two) > 2, f"{len(one)} and {len(two)} steps"
    for a, b in zip(one, two):
        assert abs(a["loss"] - b["loss"]) < 1e-4 * a["loss"], f"step {a['step']}: {a['loss']} and {b['loss']}"
    assert read_json(folder / "two/cams/manifest.json")["processes"] == 2


@pytest.mark.parametrize("flags, words", [
    (("--method", "lookalike", "--accumulate", 3), ("dislikes --accumulate above 2", "lower it")),
    (("--method", "look"), ("unknown seed method 'look'", "lookalike")),
    (("--backbone", "toys"), ("unknown backbone 'toys'", "toy")),
    (("--pretrained", "imagenet"), ("no ImageNet weights of toy", "--pretrained PATH")),
    ((), ("is there already", "--overwrite"))])
def test_a_dry_run_refuses_what_would_fail(plugged, flags, words):
    before = files(plugged[0])
    done = finish(start(plugged[0], HERE, *STEPS[0], *flags, "--dry_run"))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode and all(word in last for word in words) and "Traceback" not in done.stderr, done.stderr
    assert files(plugged[0]) == before, "a dry run wrote something"


def test_a_dry_run_of_a_good_run_says_so(plugged, tmp_path):
    home = copy(plugged[0], tmp_path / "copy")
    done = finish(start(home, HERE, *STEPS[0], "--dry_run", "--overwrite"))
    assert done.returncode == 0 and "Dry run: everything checked" in done.stderr, done.stderr


def test_an_export_is_refused_with_its_reason(plugged):
    done = finish(start(plugged[0], HERE, "-m", "models.weights", "output/stage1_toy/model_best.pth.tar", "--export",
                        "psa", "out.pth"))
    assert done.returncode == 1 and "no file of psa holds a classifier on toy" in done.stderr, done.stderr
    assert not (plugged[0] / "out.pth").exists()


if __name__ == "__main__":
    register()
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "-m":
        runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
    else:
        run_main(runpy.run_path(str(ROOT / sys.argv[0]))["main"])
