"""Two ranks do what one does: the same steps, files and scores; and none hangs.

The same steps, up to rounding, hold for networks without dropout whose normalisation is frozen. Dropout is drawn by
each rank for itself, and on CPUs normalisation that learns takes the statistics of a rank's own images: then gradients
and losses of the ranks still add up, as tests/float64_steps.py shows, but not to those of one rank.
"""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from report_page import read_report
from script_runs import DATA, MACHINE, ROOT, STAGE2, chain, checkpoint, copy, environment, files, finish, read_json

from data.make_toy import make_toy

TRAIN = ("--backbone", "resnet18", "--pretrained", "none", "--epochs", 2, "--batch_size", 5, "--crop_size", 65,
         "--lr", 0.001, *MACHINE)
STAGE1 = "output/stage1_resnet18/model_best.pth.tar"
MIXTURE = "output/two_mixture"
SCORED = ("--scales", 1, *MACHINE)
TRAININGS = [  # (run folder, command)
    ("output/two1", ("run_train.py", "--stage", 1, *TRAIN, "--bn", "frozen", "--scales", 1, "--cam_dir", "two/cams1")),
    ("output/two_avc", ("run_train.py", "--stage", 1, *TRAIN, "--bn", "frozen", "--scales", 1, "--method", "avc",
                        "--cam_dir", "two/cams_avc")),
    ("output/two2", ("run_train.py", "--stage", 2, *TRAIN, "--bn", "frozen")),
    ("output/two5", ("train_deeplab.py", *TRAIN)),
    ("output/two5m", ("train_deeplab.py", *TRAIN, "--bn", "frozen", "--head", "mctformer")),
]
# Those that draw (dropout, and the second view of AVC), and how far, relative to the loss, other draws may take them:
# less than a loss that is counted twice or by half.
LOOSE = {"output/two1": 0.1, "output/two_avc": 0.2, "output/two5": 0.1}
SPLITS = [
    ("run_train.py", "--stage", 1, "--model_path", STAGE1, "--cam_dir", "two/cams", *MACHINE),
    ("run_inference.py", "--model_path", "two/model_best.pth.tar", "--output_dir", "two/masks", "--export", "coco",
     "labelme", *MACHINE),
    ("run_eval.py", "--model_path", "two/model_best.pth.tar", "--output_dir", "two/eval", *MACHINE),
    ("test_deeplab.py", "--output_dir", "two/deeplab", *SCORED),
    ("run_train.py", "--stage", 1, "--method", "mixture", "--backbone", "resnet18", "--pretrained", STAGE1, *SCORED,
     "--output_dir", MIXTURE, "--cam_dir", "two/cams_mixture"),
]


def processes(folder, jobs, world):
    """Run jobs in so many processes of one group.  Returns what each said; all must end well."""
    (folder / "jobs.json").write_text(json.dumps([[str(word) for word in job] for job in jobs]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if world > 1 else {}
    started = [subprocess.Popen([sys.executable, str(ROOT / "tests/together.py"), "jobs.json"], cwd=folder, text=True,
                                env={**environment(folder), **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in range(world)]
    done = [finish(process, 300) for process in started]
    bad = [one for one in done if one.returncode]
    assert not bad, f"status {[one.returncode for one in done]}:\n{bad[0].stderr[-3000:]}"
    return done


@chain
def both(folder, get):
    """The same jobs by one rank and by two, each in a copy of the pipeline.  (one, two): .folder, .said."""
    results = []
    for name, world in (("one", 1), ("two", 2)):
        home = copy(get("pipeline").folder, folder / name)
        (home / "two").mkdir()
        os.link(home / STAGE2, home / "two" / "model_best.pth.tar")  # its scores are kept beside it: none are there yet
        trainings = [(*command, "--output_dir", run) for run, command in TRAININGS]
        jobs = [*trainings, *SPLITS, ("tests/float64_steps.py", "float64.json")]
        results.append(SimpleNamespace(folder=home, said=processes(home, jobs, world)))
    return results


def steps(folder, run):
    lines = [json.loads(line) for line in (folder / run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "grad_norm" in line], [line for line in lines if "mean" in line]


@pytest.mark.parametrize("run", [run for run, _ in TRAININGS])
def test_two_ranks_take_as_many_steps_as_one_at_the_same_rates(both, run):
    (one, ends), (two, other_ends) = (steps(result.folder, run) for result in both)
    assert len(one) == len(two) > 3 and len(ends) == len(other_ends) == 2, f"{len(one)} and {len(two)} steps"
    assert [line["lrs"] for line in one] == [line["lrs"] for line in two]
    found = [checkpoint(result.folder / run / "checkpoint.pth.tar")["processes"] for result in both]
    assert found == [1, 2], f"{found} processes"


@pytest.mark.parametrize("run", [run for run, _ in TRAININGS if run not in LOOSE])
def test_two_ranks_have_the_loss_curve_and_the_weights_of_one_without_dropout_and_with_frozen_norms(both, run):
    (one, ends), (two, other_ends) = (steps(result.folder, run) for result in both)
    for a, b in zip(one, two):
        for name in {"loss", "grad_norm", "bg", "fg", "neg"} & a.keys():
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5 * a["loss"]), \
                f"step {a['step']}: {name} is {a[name]} of one rank and {b[name]} of two"
    for a, b in zip(ends, other_ends):
        assert b["validation"]["score"] == pytest.approx(a["validation"]["score"], rel=1e-3), f"{a} and {b}"
    first, second = (checkpoint(result.folder / run / "checkpoint.pth.tar")["networks"] for result in both)
    name = next(iter(first))
    for key, value in first[name]["state"].items():
        value, other = value.double(), second[name]["state"][key].double()
        gap = (value - other).abs().max() / value.abs().max().clamp(min=1e-6)
        assert gap < 1e-3, f"{run}: {key} differs by {gap:.1e} of its largest value"


@pytest.mark.parametrize("run", LOOSE)
def test_with_draws_of_their_own_the_losses_of_two_ranks_are_near_those_of_one(both, run):
    for a, b in zip(*(steps(result.folder, run)[0] for result in both)):
        assert b["loss"] == pytest.approx(a["loss"], rel=LOOSE[run]), \
            f"step {a['step']}: the loss is {a['loss']} of one rank and {b['loss']} of two"


def _numbers(value, name=""):
    """(name, number) of every number in nested JSON."""
    if isinstance(value, (dict, list)):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for key, item in inner for found in _numbers(item, f"{name}/{key}")]
    return [(name, value)]


@pytest.mark.parametrize("how", ["whole", "by rank"])
def test_in_float64_nothing_but_rounding_differs(both, how):
    """Uneven counts of pixels and pairs included: see tests/float64_steps.py for what two ranks do by which rules."""
    one, two = (dict(_numbers(read_json(result.folder / "float64.json")[how])) for result in both)
    assert one.keys() == two.keys() and len(one) > 250, f"{len(one)} and {len(two)} numbers"
    gaps = {name: abs(one[name] - two[name]) / max(abs(one[name]), 1e-9) for name in one}
    worst = max(gaps, key=gaps.get)
    assert gaps[worst] < 1e-10, f"{worst} is {one[worst]} in one process and {two[worst]} in two"


@pytest.mark.parametrize("place, suffix", [("two/cams", "npz"), ("two/masks", "png"), ("two/deeplab/masks", "png"),
                                           ("output/two2/affinity_labels", "png"), ("two/deeplab/scores", "npz"),
                                           ("two/cams_mixture", "npz"), ("two/scores/walk_trainval_gt", "npz")])
def test_every_split_step_makes_the_same_files_in_two_ranks(both, place, suffix):
    one, two = ({path.name: path.read_bytes() for path in (result.folder / place).glob(f"*.{suffix}")}
                for result in both)
    assert len(one) >= 6 and one.keys() == two.keys(), f"{sorted(one)} and {sorted(two)}"
    if suffix == "npz":
        differing = [name for name in one if not _same_arrays(*(result.folder / place / name for result in both))]
    else:
        differing = [name for name in one if one[name] != two[name]]
    assert not differing, f"{len(differing)} of {len(one)} differ, such as {differing[0]}"
    manifests = [read_json(result.folder / place / "manifest.json") for result in both]
    assert [manifest["processes"] for manifest in manifests] == [1, 2], "one rank did all of the work"
    assert manifests[0]["images"] == manifests[1]["images"] and manifests[1]["complete"]


def test_two_ranks_export_the_same_files_as_one(both):
    one, two = ({path: (result.folder / "two/masks/export" / path).read_bytes()
                 for path in files(result.folder / "two/masks/export")} for result in both)
    assert len(one) == 1 + 12 + 2 and one == two, f"{sorted(one)} and {sorted(two)}"  # JSON of each, and two records


def test_each_rank_reads_its_part_for_the_head_and_head_and_mixture_are_those_of_one(both):
    read = [re.findall(r"features: (\d+)/(\d+) images", result.said[0].stderr)[-1] for result in both]
    assert read == [("12", "12"), ("6", "6")], f"rank 0 read {read} images"
    one, two = (checkpoint(result.folder / MIXTURE / "model_best.pth.tar")["networks"]["classifier"]["state"]
                for result in both)
    differing = [name for name in one if not torch.equal(one[name], two[name])]
    assert not differing and "seed.weight" in one and one["head.weight"].any(), differing


def _same_arrays(first, second):
    with np.load(first) as one, np.load(second) as two:
        return all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("folder", ["two/eval", "two/deeplab"])
def test_two_ranks_count_the_same_scores(both, folder):
    one, two = (read_json(result.folder / folder / "scores.json") for result in both)
    for name in ("images", "labels", "classes", "image_fg_iou"):
        assert one[name] == two[name] and list(one["image_fg_iou"]) == list(two["image_fg_iou"]), name
    for stage, kinds in one["scores"].items():
        for kind, entry in kinds.items():
            for name, value in entry.items():
                assert value == pytest.approx(two["scores"][stage][kind][name], abs=1e-9), f"{stage} {kind} {name}"


@pytest.mark.parametrize("folder", ["two/eval", "two/deeplab"])
def test_two_ranks_write_the_report_of_one_and_leave_no_part_of_it(both, folder):
    one, two = (read_report(result.folder / folder / "report.html") for result in both)
    assert list(one.cards) == list(two.cards) and one.cards == two.cards, f"{list(one.cards)}, {list(two.cards)}"
    assert one.data["images"]["truth"] == two.data["images"]["truth"], two.data["images"]
    left = [name for result in both for name in files(result.folder / folder) if name.endswith(".tmp")]
    assert not left, f"left behind: {left}"


def test_only_rank_0_speaks(both):
    first, second = both[1].said
    assert "in 2 processes" in first.stderr and "mIoU" in first.stdout, first.stderr[-500:]
    assert not second.stdout and "Step" not in second.stderr, f"{second.stdout}\n{second.stderr}"


# --- through torchrun itself ----------------------------------------------------------------------------------------

COMMAND = ("run_train.py", "--stage", "1", *map(str, TRAIN), "--epochs", "300", "--bn", "frozen", "--method", "cam",
           "--output_dir", "output/run", "--workers", "1", "--precision", "fp32")


def torchrun(folder, *command):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                             str(ROOT / command[0]), *map(str, command[1:])], cwd=folder, text=True,
                            env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True)


@chain
def stopped(folder, get):
    """SIGTERM to torchrun in the middle of a training run, as from a cluster.  .done, .state, .found: the files."""
    make_toy(folder / DATA, train=12, test=1, classes=2, size=48)
    process, log = torchrun(folder, *COMMAND), folder / "output/run/log.jsonl"
    deadline = time.monotonic() + 120
    while not log.is_file() or len(log.read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < deadline, finish(process).stderr
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    done = finish(process)
    return SimpleNamespace(done=done, state=checkpoint(folder / "output/run/checkpoint.pth.tar"), found=files(folder))


@chain
def failed(folder, get):
    """An image that only one of the ranks reads is damaged.  .done, .image, .seconds."""
    make_toy(folder / DATA, train=12, test=1, classes=2, size=48)
    image = sorted((folder / DATA / "images").glob("*.jpg"))[3]
    image.write_bytes(image.read_bytes()[:300])
    started = time.monotonic()
    done = finish(torchrun(folder, *COMMAND))
    return SimpleNamespace(done=done, image=image, seconds=time.monotonic() - started)


def test_sigterm_to_torchrun_saves_once_and_says_how_to_go_on(stopped):
    said = stopped.done.stderr
    assert stopped.done.returncode != 0 and said.count("--resume goes on from there") == 1, said[-3000:]
    ours, torchruns = said.split("\nInterrupted.\n")
    assert ours.count("finishing this step") == 1 and "Traceback" not in ours, ours[-3000:]
    assert "Warning" not in ours, ours[:3000]
    assert stopped.state["processes"] == 2 and (stopped.state["epoch"], stopped.state["step_in_epoch"]) > (0, 0)
    assert not [name for name in stopped.found if name.endswith(".tmp")], sorted(stopped.found)


def test_a_failure_in_one_rank_ends_all_of_them_with_its_line(failed):
    said = failed.done.stderr
    lines = [line for line in said.splitlines() if "Error: cannot decode image" in line]
    assert failed.done.returncode == 1 and len(lines) == 1 and failed.image.name in lines[0], said[-3000:]
    assert "RuntimeError" not in said, said[-3000:]
    assert failed.seconds < 100, f"it took {failed.seconds:.0f} s: the other rank hung"


def test_more_ranks_than_images_in_a_step_are_refused(monkeypatch):
    from src.training.loop import check_world
    from utils import distributed
    from utils.errors import UserError
    monkeypatch.setitem(distributed._place, "world", 4)
    check_world(9, 4)
    with pytest.raises(UserError, match="4 processes cannot share steps of 3 images; start fewer, or pass a larger"):
        check_world(9, 3)


@pytest.mark.parametrize("count, batch, world", [(13, 5, 2), (13, 4, 3), (16, 5, 4), (21, 5, 1)])
def test_the_slices_of_all_ranks_are_the_batch(count, batch, world):
    from utils.loader import EpochBatches
    ranks = [EpochBatches(count, batch, 0, 1, rank=rank, world=world) for rank in range(world)]
    whole, parts = list(EpochBatches(count, batch, 0, 1)), [list(one) for one in ranks]
    merged = [sum(slices, []) for slices in zip(*parts)]
    assert sum(merged, []) == sum(whole, []), "the order is another"
    smallest = min(len(part) for slices in zip(*parts) for part in slices)
    assert smallest >= 1, f"a rank has {smallest} images in a step"
    for number, slices in enumerate(zip(*parts)):
        edges = [one.bounds(number) for one in ranks]
        assert [end - first for first, end, _ in edges] == [len(part) for part in slices]
        assert edges[0][0] == 0 and edges[-1][1] == edges[-1][2] == len(merged[number]), edges


def test_losses_of_micro_batches_add_up_to_that_of_the_batch():
    """For all three losses, with micro-batches whose counts of pairs and pixels differ."""
    from models.affinitynet import affinity_loss, pair_counts
    from models.classifier import classification_loss
    from models.deeplab import labelled_pixels, segmentation_loss
    from utils.random_walk import half_disc
    generator, offsets = torch.Generator().manual_seed(0), half_disc(3)
    features = torch.rand(5, 4, 7, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (5, 7, 6), generator=generator)
    labels[0], labels[3, 2:] = 255, 255
    parts = (slice(0, 2), slice(2, 5))
    counts, pixels = pair_counts(labels, offsets), labelled_pixels(labels)
    found = {
        "affinity": (affinity_loss(features, labels, offsets)[0],
                     [affinity_loss(features[part], labels[part], offsets, counts)[0] for part in parts]),
        "segmentation": (segmentation_loss(features, labels),
                         [segmentation_loss(features[part], labels[part], pixels=pixels) for part in parts]),
        "classification": (classification_loss(features[:, :, 0, 0], labels[:, 0, :4] % 2),
                           [classification_loss(features[part, :, 0, 0], labels[part, 0, :4] % 2)
                            * (part.stop - part.start) / 5 for part in parts])}
    for name, (whole, added) in found.items():
        assert sum(added).item() == pytest.approx(whole.item(), rel=1e-5), f"{name}: {added} of {whole}"
