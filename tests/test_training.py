"""The training loop on a tiny network: groups, schedule, micro-batches, interruption and resuming, logs, refusals."""
import json
import math
import multiprocessing
import os
import random
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from script_runs import ROOT
from torch import nn
from torch.nn import functional as F

from models.backbone import Network
from models.weights import build_network
from src.seeds import attach
from src.training.loop import MicroBatch, Run, Task, no_totals, synchronise_norms, train
from src.training.optimiser import build_optimiser, parameter_groups, set_rates
from src.training.resume import RESUME_FREE, check_run_dir, set_generators
from utils import distributed
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.config import Machine, TrainConfig
from utils.errors import UserError
from utils.interrupt import Interrupt, Interrupted
from utils.loader import TrainingSamples
from utils.log import duration
from utils.runtime import run_main
from utils.transforms import Augmentation

CPU = torch.device("cpu")
COUNT, BATCH, EPOCHS = 10, 4, 3
STEPS = 3  # a batch of four, one of four, one of two
OPTIONS = {"batch_size": BATCH, "epochs": EPOCHS, "lr": 0.02, "head_lr": 5.0, "momentum": 0.9, "weight_decay": 1e-3,
           "crop_size": 17, "max_size": 64, "seed": 3, "workers": 0, "precision": "fp32", "resume": False,
           "tensorboard": False, "scales": [0.5, 1.0], "output_dir": "somewhere", "accumulate": 1, "clip_grad": 0.0,
           "compile": False, "save_every": 0.0}


class Backbone(nn.Module):
    stages, stride, channels = ("a",), 4, {"a": 6}

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 5, 4, bias=False), nn.BatchNorm2d(6)

    def forward(self, x):
        return {"a": F.relu(self.norm(self.conv(x)))}

    def blocks(self):
        return [[self.conv, self.norm]]


class Tiny(Network):
    """A network with everything that resuming could forget: statistics, momentum and dropout."""

    def __init__(self):
        super().__init__(Backbone())
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(6, 2)

    def forward(self, images):
        return self.head(self.dropout(self.backbone(images)["a"].mean(dim=(2, 3))))


class Noise:
    """A dataset of noise in memory."""
    root, classes = "noise", ["x", "y"]

    def __init__(self):
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (COUNT, 20, 24, 3), dtype=np.uint8)
        self.labels = np.eye(2, dtype=np.uint8)[rng.integers(0, 2, COUNT)]
        self.ids = [f"noise_{index}" for index in range(COUNT)]

    def __len__(self):
        return COUNT

    def photo(self, index, used):
        return self.image(index), None

    def image(self, index):
        return self.images[index]


def classify(network, batch, micro):
    logits = network(batch["image"])
    loss = F.binary_cross_entropy_with_logits(logits, batch["labels"].to(logits.dtype)) * micro.weight
    return loss, {"twice": 2 * loss.detach()}


def tiny_task(loss=classify, validate=None, step="stage1", **more):
    torch.manual_seed(0)
    network = Tiny()
    samples = TrainingSamples(Noise(), Augmentation(17), OPTIONS["seed"])
    return Task(step, network, loss, samples, validate,
                lambda: {"classes": ["x", "y"], "networks": {"tiny": {"state": network.state_dict()}}}, **more)


def interrupting(step, number=signal.SIGINT):
    """The loss, with a signal sent to this process in the given call (counted from 0)."""
    calls = []

    def loss(network, batch, micro):
        if len(calls) == step:
            os.kill(os.getpid(), number)
        calls.append(1)
        return classify(network, batch, micro)
    return loss


def run(folder, task, **changes):
    options = {**OPTIONS, **changes}
    machine = Machine(CPU, options["precision"], options["workers"])
    return train(task, TrainConfig.of(options), machine, folder, options)


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def step_lines(folder):
    return [line for line in lines(folder) if "grad_norm" in line]


def different(first, second):
    return [name for name, tensor in first.state_dict().items() if not torch.equal(tensor, second.state_dict()[name])]


def gaps(first, second):
    """{tensor: largest difference between two networks / its largest value}."""
    others = second.state_dict()
    return {name: ((tensor - others[name]).abs().max() / tensor.abs().max().clamp(min=1e-9)).item()
            for name, tensor in first.state_dict().items()}


# --- parameter groups ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["classifier", "classifier with a seed", "affinity", "deeplab"])
@pytest.mark.parametrize("bn, blocks", [("train", 0), ("frozen", 2)])
def test_every_parameter_that_learns_is_in_exactly_one_group(kind, bn, blocks):
    with torch.device("meta"):
        network = build_network(kind.split()[0], "resnet18", classes=3)
        if "seed" in kind:
            attach(network, {"name": "avc"})
        network.freeze(blocks, bn)
    groups = parameter_groups(network, TrainConfig.of(OPTIONS))
    placed = {}
    for group in groups:
        for parameter in group["params"]:
            assert id(parameter) not in placed, "a parameter is in two groups"
            placed[id(parameter)] = group
    for name, parameter in network.named_parameters():
        assert (id(parameter) in placed) == parameter.requires_grad, f"{name}: placed is {id(parameter) in placed}"
        if parameter.requires_grad:
            group = placed[id(parameter)]
            lr = OPTIONS["lr"] * (1 if name.startswith("backbone.") else OPTIONS["head_lr"])
            decay = OPTIONS["weight_decay"] if parameter.ndim > 1 else 0
            assert group["lr"] == group["initial_lr"] == lr, f"{name}: {group['lr']}, not {lr}"
            assert group["weight_decay"] == decay, f"{name}: decay {group['weight_decay']}, not {decay}"
    assert all(group["params"] for group in groups), "an empty group"


# --- a whole run ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without interruption: (folder, trained network, path returned)."""
    folder = tmp_path_factory.mktemp("run") / "deep" / "stage1_tiny"
    task = tiny_task()
    before = {name: tensor.clone() for name, tensor in task.network.state_dict().items()}
    path = run(folder, task)
    still = [name for name, tensor in task.network.state_dict().items() if torch.equal(before[name], tensor)]
    assert not still, f"{still} did not learn"
    return folder, task.network, path


def test_a_run_leaves_its_checkpoints_options_and_log(whole):
    folder, network, path = whole
    assert {entry.name for entry in folder.iterdir()} == {"checkpoint.pth.tar", "model_best.pth.tar", "options.json",
                                                         "log.jsonl"}
    assert path == folder / "model_best.pth.tar"
    record = json.loads((folder / "options.json").read_text())
    assert record["step"] == "stage1" and record["options"] == OPTIONS and "torch" in record, record
    newest = load_checkpoint(folder / "checkpoint.pth.tar", steps=("stage1",))
    assert newest["epoch"] == EPOCHS and newest["step_in_epoch"] == 0 and newest["classes"] == ["x", "y"]
    state = newest["networks"]["tiny"]["state"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_the_log_has_a_line_per_step_and_one_per_epoch(whole):
    steps, epochs = step_lines(whole[0]), [line for line in lines(whole[0]) if "mean" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS * EPOCHS + 1)), [line["step"] for line in steps]
    assert [line["epoch"] for line in epochs] == list(range(EPOCHS))
    for line in epochs:
        losses = [step["loss"] for step in steps if step["epoch"] == line["epoch"]]
        assert line["mean"]["loss"] == pytest.approx(sum(losses) / STEPS, rel=1e-9), f"{line['mean']} of {losses}"
        assert line["mean"]["twice"] == pytest.approx(2 * line["mean"]["loss"], rel=1e-6), line["mean"]
        assert line["validation"] == {"score": -line["mean"]["loss"]}, line


def test_a_step_is_logged_with_pace_time_left_memory_rates_and_gradient(tmp_path, capsys):
    run(tmp_path, tiny_task())
    steps = step_lines(tmp_path)
    for line in steps:
        assert line["images_per_second"] > 0 and line["memory_gb"] > 0.05 and line["grad_norm"] > 0, line
        assert line["lrs"] == pytest.approx([line["lr"]] * 2 + [line["lr"] * OPTIONS["head_lr"]] * 2), line["lrs"]
    assert steps[-1]["seconds_left"] == 0
    said = capsys.readouterr().err
    for word in ("loss", "twice", "grad_norm", "| lr", "img/s", "GB", "left"):
        assert word in said, f"{word!r} is not on the line"


@pytest.mark.parametrize("seconds, words", [(45, "45 s"), (720, "12 min"), (11_100, "3 h 05 min")])
def test_durations_are_told_in_two_units(seconds, words):
    assert duration(seconds) == words


def test_the_learning_rate_falls_as_a_polynomial_to_near_nothing(whole):
    rates = [line["lr"] for line in step_lines(whole[0])]
    total = STEPS * EPOCHS
    expected = [OPTIONS["lr"] * (1 - step / total) ** 0.9 for step in range(total)]
    assert np.allclose(rates, expected, rtol=1e-9, atol=0), f"{rates}, not {expected}"
    optimizer = load_checkpoint(whole[0] / "checkpoint.pth.tar")["optimizer"]
    last = {round(group["lr"] / group["initial_lr"], 6) for group in optimizer["param_groups"]}
    assert last == {round((1 / total) ** 0.9, 6)}, f"last rates are {last} of the first"


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(tmp_path, whole):
    for seed, same in ((OPTIONS["seed"], True), (OPTIONS["seed"] + 1, False)):
        torch.manual_seed(99), np.random.seed(99)
        task = tiny_task()
        torch.rand(7)  # what was drawn before must not matter
        run(tmp_path / str(seed), task, seed=seed)
        assert (not different(whole[1], task.network)) == same, f"seed {seed}: {different(whole[1], task.network)}"


def test_frozen_parts_do_not_move_in_a_run(tmp_path):
    task = tiny_task()
    task.network.freeze(1, "frozen")
    before = {name: tensor.clone() for name, tensor in task.network.backbone.state_dict().items()}
    run(tmp_path, task, epochs=1)
    moved = [name for name, tensor in task.network.backbone.state_dict().items()
             if not torch.equal(tensor, before[name])]
    assert not moved, f"{moved} moved although frozen"


def test_bf16_trains_close_to_full_precision_on_float32_weights(tmp_path, whole):
    task = tiny_task()
    run(tmp_path, task, precision="bf16")
    assert {tensor.dtype for tensor in task.network.parameters()} == {torch.float32}
    gap = gaps(whole[1], task.network)["head.weight"]
    assert 0 < gap < 0.1, f"head weights differ by {gap:.4f} of their largest"


# --- micro-batches -------------------------------------------------------------------------------------------------

def step_batch():
    """A batch of COUNT images in float64."""
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.randn(COUNT, 3, 17, 17, generator=generator, dtype=torch.float64),
            "labels": torch.eye(2)[torch.arange(COUNT) % 2], "index": torch.arange(COUNT)}


def stepped(count=3, bn="frozen", dropout=0.0, loss=classify, totals=no_totals, **changes):
    """Take steps on one batch in float64.  Returns what each said, and the network after them."""
    task = tiny_task(loss, totals=totals)
    task.network.double().freeze(0, bn).dropout.p = dropout
    options = {**OPTIONS, "batch_size": COUNT, "epochs": max(1, count), **changes}
    one = Run(task, TrainConfig.of(options), Machine(CPU), Path("unused"), options)
    return [one.train_step(step_batch(), (0, COUNT, COUNT)) for _ in range(count)], task.network


def first_class_alone(network, batch, micro):
    """A mean over some of the images: micro-batches have unequal numbers of them, the last of two has none."""
    chosen = batch["labels"][:, 0] * (batch["index"] < 5)
    logits = network(batch["image"])[:, 0]
    return (F.softplus(-logits) * chosen).sum() / micro.totals, {}


CASES = {"a mean over images": {}, "a mean over some of them": {
    "loss": first_class_alone, "totals": lambda batch: (batch["labels"][:, 0] * (batch["index"] < 5)).sum()}}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("parts", [2, 3, COUNT, 50])
def test_micro_batches_give_the_step_of_the_whole_batch_with_frozen_norms_and_no_dropout(case, parts):
    (one, network), (parted, other) = stepped(**CASES[case]), stepped(accumulate=parts, **CASES[case])
    for a, b in zip(one, parted, strict=True):
        assert a["loss"] > 0 and b == pytest.approx(a, rel=1e-10), f"{parts} micro-batches: {b}, one: {a}"
    found = gaps(network, other)
    assert max(found.values()) < 1e-12, f"{parts} micro-batches: {found}"
    start = gaps(network, stepped(0)[1])
    assert start["backbone.conv.weight"] > 1e-4, f"the steps moved nothing: {start}"


def test_norms_that_learn_take_the_statistics_of_each_micro_batch():
    """What accumulating then promises: the gradients of micro-batches, each normalised for itself, add up."""
    task = tiny_task()
    network, batch = task.network.double(), step_batch()
    network.dropout.p = 0.0
    options = TrainConfig.of({**OPTIONS, "epochs": 3})
    optimiser, losses, norms = build_optimiser(network, options), [], []
    for number in range(3):
        set_rates(optimiser, number / 3)
        optimiser.zero_grad()
        values = []
        for low, high in ((0, 3), (3, 6), (6, COUNT)):
            part = {name: value[low:high] for name, value in batch.items()}
            values.append(classify(network, part, MicroBatch((high - low) / COUNT, None, number / 3))[0])
            values[-1].backward()
        losses.append(sum(values).item())
        norms.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]).norm().item())
        optimiser.step()
    said, other = stepped(bn="train", accumulate=3)
    assert [step["loss"] for step in said] == pytest.approx(losses, rel=1e-10), f"{said}, by hand {losses}"
    assert [step["grad_norm"] for step in said] == pytest.approx(norms, rel=1e-10), f"{said}, by hand {norms}"
    found = gaps(network, other)
    assert max(found.values()) < 1e-12, found
    whole = gaps(network, stepped(bn="train")[1])
    assert max(whole.values()) > 1e-6, "the statistics of the whole batch give the same: this test compares nothing"


def test_every_micro_batch_is_told_its_weight_the_totals_and_the_progress():
    seen = []

    def loss(network, batch, micro):
        seen.append((len(batch["image"]), micro.weight, micro.totals.item(), micro.progress))
        return classify(network, batch, micro)
    stepped(2, loss=loss, totals=lambda batch: batch["index"].sum(), accumulate=3)
    sizes, total = [3, 3, 4], sum(range(COUNT))
    expected = [(size, size / COUNT, total, number / 2) for number in range(2) for size in sizes]
    assert seen == expected, f"{seen}, not {expected}"


def test_draws_depend_on_seed_step_micro_batch_and_rank_alone(monkeypatch):
    def draws(**changes):
        found = []

        def loss(network, batch, micro):
            found.append(torch.rand(()).item())
            return classify(network, batch, micro)
        stepped(3, loss=loss, accumulate=2, **changes)
        return found
    first = draws()
    torch.rand(11)
    assert len(set(first)) == 6, f"micro-batches or steps share draws: {first}"
    assert draws(dropout=0.5)[::2] == first[::2], "a step's draws depend on what was drawn before it"
    assert not set(first) & set(draws(seed=4)), "another seed draws the same"
    for rank in (1, 2):
        monkeypatch.setitem(distributed._place, "rank", rank)
        assert not set(first) & set(draws()), f"rank {rank} draws what rank 0 does"


def test_steps_and_schedule_are_counted_in_batches_whatever_the_micro_batches(tmp_path):
    """The last batch, of two images, is smaller than the number of micro-batches."""
    run(tmp_path, tiny_task(), accumulate=BATCH)
    steps = step_lines(tmp_path)
    assert [line["step"] for line in steps] == list(range(1, STEPS * EPOCHS + 1))
    expected = [OPTIONS["lr"] * (1 - step / (STEPS * EPOCHS)) ** 0.9 for step in range(STEPS * EPOCHS)]
    assert [line["lr"] for line in steps] == pytest.approx(expected)


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_clip_grad_shortens_long_gradients_alone(limit):
    (free, network), (clipped, other) = stepped(1), stepped(1, clip_grad=limit)
    assert clipped[0] == free[0], "the norm in the log is not that before clipping"
    same, norm = not different(network, other), free[0]["grad_norm"]
    assert same == (limit > norm), f"norm {norm}, limit {limit}: same is {same}"
    if not same:
        # The head is not decayed: its bias moves by rate x gradient.
        start = stepped(0)[1].head.bias
        moved = [(one.head.bias - start).norm().item() for one in (network, other)]
        assert moved[1] == pytest.approx(moved[0] * limit / norm, rel=1e-3), f"steps of length {moved}, norm {norm}"


def test_norms_that_learn_are_synchronised_and_frozen_ones_are_left_alone():
    network = Tiny()
    names, images = list(network.state_dict()), torch.randn(2, 3, 17, 17)
    expected = network.eval()(images)
    synchronise_norms(network.freeze(0, "frozen").train())
    assert type(network.backbone.norm) is nn.BatchNorm2d, type(network.backbone.norm)
    network.backbone.norm.requires_grad_(True)
    weight = network.backbone.norm.weight
    synchronise_norms(network.freeze(0, "train").train())
    assert isinstance(network.backbone.norm, nn.SyncBatchNorm), type(network.backbone.norm)
    assert network.backbone.norm.weight is weight, "the layer has another parameter now"
    assert list(network.state_dict()) == names and torch.equal(network.eval()(images), expected)


# --- compiling -----------------------------------------------------------------------------------------------------

def test_a_compiled_backbone_gives_the_losses_of_the_plain_one_and_validates(tmp_path):
    def validate(network):
        return {"score": network(torch.ones(1, 3, 23, 31))[0, 0].item()}
    for name in (False, True):  # batches of one size: another would be compiled for anew
        run(tmp_path / str(name), tiny_task(validate=validate), compile=name, epochs=1, batch_size=COUNT // 2)
    plain, compiled = ([(line["loss"], line["grad_norm"]) for line in step_lines(tmp_path / str(name))]
                       for name in (False, True))
    assert compiled == [pytest.approx(step, rel=1e-4) for step in plain], f"{compiled} instead of {plain}"
    state = load_checkpoint(tmp_path / "True" / "model_best.pth.tar")["networks"]["tiny"]["state"]
    assert list(state) == list(Tiny().state_dict()), "compiling renamed tensors"


def test_a_backbone_that_cannot_be_compiled_is_one_line_with_the_remedy(tmp_path):
    def loss(network, batch, micro):
        raise torch._dynamo.exc.TorchDynamoException("no compiler\nand much more")
    with pytest.raises(UserError) as caught:
        run(tmp_path, tiny_task(loss), compile=True)
    text = str(caught.value)
    assert "--compile failed (no compiler); leave it out" in text and "\n" not in text, text


# --- interruption and resuming -------------------------------------------------------------------------------------

@pytest.mark.parametrize("step", range(STEPS * EPOCHS))
def test_an_interrupted_run_resumes_to_the_same_weights_bit_for_bit(tmp_path, whole, step):
    number = signal.SIGTERM if step % 2 else signal.SIGINT
    with pytest.raises(Interrupted):
        run(tmp_path, tiny_task(interrupting(step, number)))
    assert len(step_lines(tmp_path)) == step + 1, "the running step was not finished"
    task = tiny_task()
    with torch.no_grad():
        task.network.head.weight.fill_(7)  # comes from the checkpoint, or the result differs
    run(tmp_path, task, resume=True)
    assert not different(whole[1], task.network), f"interrupted at {step}: {different(whole[1], task.network)} differ"
    timeless = ("step", "epoch", "lr", "loss", "mean", "validation")
    found, expected = ([{key: line[key] for key in timeless if key in line} for line in lines(folder)]
                       for folder in (tmp_path, whole[0]))
    assert found == expected, "the log differs from that of the uninterrupted run"


def test_a_run_of_micro_batches_resumes_to_the_same_bits_too(tmp_path):
    one, other = tiny_task(), tiny_task()
    run(tmp_path / "whole", one, accumulate=2)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", tiny_task(interrupting(7)), accumulate=2)  # in the fourth step
    run(tmp_path / "parts", other, accumulate=2, resume=True)
    assert not different(one.network, other.network), different(one.network, other.network)


def test_an_interruption_is_told_with_the_way_to_go_on(tmp_path, capsys):
    with pytest.raises(Interrupted):
        run(tmp_path, tiny_task(interrupting(1)))
    text = capsys.readouterr().err
    assert "finishing this step" in text and "epoch 1, step 2 of 3" in text and "--resume" in text, text
    run(tmp_path, tiny_task(), resume=True)
    assert "Resuming" in capsys.readouterr().err


@pytest.mark.parametrize("epoch", [0, EPOCHS - 1])
def test_an_interruption_during_validation_stops_the_run_too(tmp_path, epoch):
    """Also after the last epoch, so that the steps that follow training are not begun."""
    calls = []

    def validate(network):
        calls.append(1)
        if len(calls) == epoch + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return {"score": 0.0}
    with pytest.raises(Interrupted):
        run(tmp_path, tiny_task(validate=validate))
    found = load_checkpoint(tmp_path / "checkpoint.pth.tar")
    assert (found["epoch"], found["step_in_epoch"]) == (epoch + 1, 0), (found["epoch"], found["step_in_epoch"])


def test_a_second_interruption_stops_at_once(tmp_path):
    def loss(network, batch, micro):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal did not stop the step")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tiny_task(loss))


ONE_LONG_OPERATION = """
import torch
from utils.interrupt import Interrupt
from utils.runtime import run_main
def main():
    with Interrupt():
        matrix = torch.rand(6000, 6000)
        print("begun", flush=True)
        torch.linalg.eigh(matrix + matrix.T)
        print("computed", flush=True)
run_main(main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_run_in_the_midst_of_one_long_operation(number):
    """Python would handle neither before the operation is over; this one takes minutes on one thread."""
    process = subprocess.Popen([sys.executable, "-c", ONE_LONG_OPERATION], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    said = "".join(process.stderr.readline() for _ in range(2))
    assert "finishing this step, then saving; a second signal stops at once" in said, said
    process.send_signal(number)
    out, rest = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "computed" not in out, (process.returncode, out)
    assert rest == "\nStopped in the midst of a step; --resume goes on from what was saved last.\n", rest


def test_a_signal_to_a_forked_data_worker_is_none_of_the_trainings(capsys):
    of_torch = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # with its handler the worker's end arrives there too
    try:
        with Interrupt() as interrupt:
            worker = multiprocessing.get_context("fork").Process(target=lambda: os.kill(os.getpid(), signal.SIGINT))
            worker.start()
            worker.join()
            assert interrupt.seen() == 0 and select.select([interrupt.received], [], [], 0.2)[0] == []
    finally:
        signal.signal(signal.SIGCHLD, of_torch)
    assert "Interrupted" not in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_ends_with_128_and_the_signals_number(tmp_path, number, capsys):
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: run(tmp_path, tiny_task(interrupting(1, number))))
    said = capsys.readouterr().err
    assert ended.value.code == 128 + number, ended.value.code
    assert "with --resume goes on from there" in said and said.endswith("Interrupted.\n"), said


@pytest.mark.parametrize("ends", ["well", "interrupted", "failed"])
def test_the_signal_handlers_are_put_back(tmp_path, ends):
    def fail(network, batch, micro):
        raise ValueError
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    loss = {"well": classify, "interrupted": interrupting(0), "failed": fail}[ends]
    try:
        run(tmp_path, tiny_task(loss), epochs=1)
    except (Interrupted, ValueError):
        assert ends != "well"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_finished_run_resumes_to_itself(tmp_path, whole):
    run(tmp_path, tiny_task())
    task = tiny_task()
    path = run(tmp_path, task, resume=True)
    assert not different(whole[1], task.network) and path.is_file(), different(whole[1], task.network)


def test_the_state_is_saved_within_an_epoch_after_so_many_minutes(tmp_path):
    positions = []

    def loss(network, batch, micro):
        path = tmp_path / "checkpoint.pth.tar"
        positions.append(load_checkpoint(path)["step_in_epoch"] if path.is_file() else None)
        return classify(network, batch, micro)
    run(tmp_path, tiny_task(loss), save_every=1e-9, epochs=1)
    assert positions == [None, 1, 2], positions


def test_a_checkpoint_holds_every_generator_and_restores_it(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, tiny_task(interrupting(2)))
    expected = [torch.rand(()).item(), np.random.rand(), random.random()]
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    set_generators(load_checkpoint(tmp_path / "checkpoint.pth.tar")["generators"])
    assert [torch.rand(()).item(), np.random.rand(), random.random()] == expected


def test_resuming_drops_what_was_logged_after_the_state_was_saved(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, tiny_task(interrupting(2)))
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"epoch": 1, "step": 4, "loss": 9, "grad_norm": 1}\n{"epoch": 1, "st')
    (tmp_path / ".checkpoint.pth.tar.x.tmp").write_bytes(b"half")
    run(tmp_path, tiny_task(), resume=True)
    assert [line["step"] for line in step_lines(tmp_path)] == list(range(1, STEPS * EPOCHS + 1))
    assert not list(tmp_path.glob(".*.tmp")), "what a killed run left is still there"


def events(folder, tag):
    """{step: value} of a tag of TensorBoard, as its own reader has them."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(folder)).Reload()
    return {event.step: event.value for event in found.Scalars(tag)}


def test_tensorboard_reads_what_the_log_has_also_after_resuming(tmp_path):
    pytest.importorskip("tensorboard")
    with pytest.raises(Interrupted):
        run(tmp_path, tiny_task(interrupting(4)), tensorboard=True)
    run(tmp_path, tiny_task(), tensorboard=True, resume=True)
    for tag, name in (("train/loss", "loss"), ("train/twice", "twice"), ("train/lr", "lr"),
                      ("train/grad_norm", "grad_norm"), ("train/images_per_second", "images_per_second")):
        logged = {line["step"]: pytest.approx(line[name], rel=1e-3, abs=0.01) for line in step_lines(tmp_path)}
        assert events(tmp_path, tag) == logged, f"{tag}: {events(tmp_path, tag)}, logged {step_lines(tmp_path)}"
    means = {(line["epoch"] + 1) * STEPS: pytest.approx(line["validation"]["score"], rel=1e-5)
             for line in lines(tmp_path) if "validation" in line}
    assert events(tmp_path, "validation/score") == means, events(tmp_path, "validation/score")


def test_tensorboard_that_is_not_installed_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="--tensorboard needs the tensorboard package; run: pip install tensorboard"):
        run(tmp_path, tiny_task(), tensorboard=True)


CHANGES = {"lr": (0.03, "lr was 0.02, is 0.03"), "scales": ([1.0], "scales was 0.5,1.0, is 1.0"),
           "epochs": (4, "epochs was 3, is 4"), "batch_size": (5, "batch_size was 4, is 5"), "seed": (0, "seed was 3")}


@pytest.mark.parametrize("name", CHANGES)
def test_resuming_with_another_option_is_refused_with_its_name(tmp_path, whole, name):
    value, said = CHANGES[name]
    save_checkpoint(tmp_path / "checkpoint.pth.tar", load_checkpoint(whole[0] / "checkpoint.pth.tar"))
    with pytest.raises(UserError) as caught:
        run(tmp_path, tiny_task(), resume=True, **{name: value})
    text = str(caught.value)
    assert said in text and "pass the same ones, or leave --resume out" in text and "\n" not in text, text
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint.pth.tar"], "the folder was written to"


def test_resuming_with_more_images_is_refused(tmp_path, whole):
    save_checkpoint(tmp_path / "checkpoint.pth.tar", load_checkpoint(whole[0] / "checkpoint.pth.tar"))
    task = tiny_task()
    task.samples = range(COUNT + BATCH)
    with pytest.raises(UserError, match="made with 3 steps an epoch, and now there are 4: other images"):
        run(tmp_path, task, resume=True)


@pytest.mark.parametrize("change, said", [
    (dict(classes=["x", "z"]), "was made with the classes x, y, ..., and noise has x, z"),
    (dict(ids=[f"other_{index}" for index in range(COUNT)]), "was made from other images or labels"),
    (dict(labels=np.ones((COUNT, 2), np.uint8)), "was made from other images or labels"),
])
def test_other_data_of_as_many_images_is_refused_on_resume(tmp_path, whole, change, said):
    save_checkpoint(tmp_path / "checkpoint.pth.tar", load_checkpoint(whole[0] / "checkpoint.pth.tar"))
    task = tiny_task()
    for name, value in change.items():
        setattr(task.samples.dataset, name, value)
    with pytest.raises(UserError, match=f"--resume: .*{said}.*leave --resume out to start anew"):
        run(tmp_path, task, resume=True)


def test_a_run_resumes_with_the_label_maps_it_was_made_from_and_no_others(tmp_path):
    run(tmp_path, tiny_task(targets="masks"))
    with pytest.raises(UserError, match="--resume: .*was made from other masks or affinity labels than those that"):
        run(tmp_path, tiny_task(targets="others"), resume=True)
    run(tmp_path, tiny_task(targets="masks"), resume=True)


def test_options_that_change_nothing_may_differ_on_resume(tmp_path, whole):
    save_checkpoint(tmp_path / "checkpoint.pth.tar", load_checkpoint(whole[0] / "checkpoint.pth.tar"))
    others = {"output_dir": "elsewhere", "workers": 1, "data_root": "moved", "overwrite": True}
    assert set(others) <= set(RESUME_FREE)
    task = tiny_task()
    run(tmp_path, task, resume=True, **others)
    assert not different(whole[1], task.network)


def test_resuming_without_or_from_another_steps_checkpoint_is_refused(tmp_path, whole):
    with pytest.raises(UserError, match="there is no .*checkpoint.pth.tar to go on from"):
        run(tmp_path, tiny_task(), resume=True)
    save_checkpoint(tmp_path / "checkpoint.pth.tar", load_checkpoint(whole[0] / "checkpoint.pth.tar"))
    with pytest.raises(UserError, match="comes from stage1, but a checkpoint of stage2 is needed"):
        run(tmp_path, tiny_task(step="stage2"), resume=True)


# --- starting anew -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, remedy", [("checkpoint.pth.tar", "pass --resume to go on from it, --overwrite to"),
                                          ("model_best.pth.tar", "pass --overwrite to")])
def test_a_training_is_not_overwritten_unasked(tmp_path, name, remedy):
    check_run_dir(tmp_path / "new", resume=False, overwrite=False)
    (tmp_path / "log.jsonl").touch()  # of a run that was stopped before it had anything to keep
    check_run_dir(tmp_path, resume=False, overwrite=False)
    (tmp_path / name).touch()
    for asked in ("resume", "overwrite"):
        check_run_dir(tmp_path, **{"resume": False, "overwrite": False, asked: True})
    with pytest.raises(UserError) as caught:
        check_run_dir(tmp_path, resume=False, overwrite=False)
    text = str(caught.value)
    assert f"{tmp_path / name} is there already; {remedy} start anew, or another --output_dir" in text, text


def test_a_run_that_starts_anew_is_not_mixed_with_the_one_before(tmp_path, whole):
    run(tmp_path, tiny_task(), seed=8)
    task = tiny_task()
    run(tmp_path, task)
    assert not different(whole[1], task.network), different(whole[1], task.network)
    assert [line["step"] for line in step_lines(tmp_path)] == list(range(1, STEPS * EPOCHS + 1))


def test_resuming_never_takes_up_the_run_before_the_one_that_was_started_anew(tmp_path):
    def fail(network, batch, micro):
        raise ValueError("killed before anything was saved")
    run(tmp_path, tiny_task())
    with pytest.raises(ValueError):
        run(tmp_path, tiny_task(fail), mask_dir="others")  # this option alone would not be refused on resuming
    with pytest.raises(UserError, match="there is no .*checkpoint.pth.tar to go on from"):
        run(tmp_path, tiny_task(), mask_dir="others", resume=True)


# --- the loss and the best model -----------------------------------------------------------------------------------

@pytest.mark.parametrize("factors", [(math.nan, 1), (math.inf, 1), (1, math.nan)])
def test_a_loss_or_term_that_is_not_finite_stops_the_run_with_its_terms_and_images(tmp_path, factors):
    """In the second micro-batch of the second step.  factors: of the loss, and of its term."""
    shown = []

    def loss(network, batch, micro):
        shown.append(batch["index"].tolist())
        total, _ = classify(network, batch, micro)
        bad = factors if len(shown) == 4 else (1, 1)
        return total * bad[0], {"pairs": 0.125 * bad[1]}
    task = tiny_task(loss)
    with pytest.raises(UserError) as caught:
        run(tmp_path, task, accumulate=2)
    text, images = str(caught.value), ", ".join(f"noise_{index}" for index in shown[2] + shown[3])
    pairs = f"'pairs': {0.125 + 0.125 * factors[1]}"
    assert "loss is not finite at step 1" in text and pairs in text and "lower --lr" in text, text
    assert f"its images: {images};" in text and len(shown[2] + shown[3]) == BATCH, f"{text}, not {images}"
    assert len(lines(tmp_path)) == 1, "the bad step was logged as a good one"
    assert all(torch.isfinite(tensor).all() for tensor in task.network.state_dict().values()), "it reached the weights"


def trained_with(folder, scores, **more):
    """Train with these validation scores.  Returns the epochs whose weights are those of model_best."""
    states, left = [], list(scores)

    def validate(network):
        assert not network.training and not torch.is_grad_enabled()
        states.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return {"score": left.pop(0), "other": 1.0}
    path = run(folder, tiny_task(validate=validate, **more))
    state = load_checkpoint(path)["networks"]["tiny"]["state"]
    return [epoch for epoch, other in enumerate(states) if all(torch.equal(state[name], other[name]) for name in state)]


@pytest.mark.parametrize("scores, best", [([0.5, 0.7, 0.6], 1), ([0.5, 0.5, 0.4], 1), ([0.0, 0.0, 0.0], 2),
                                          ([-0.3, -0.2, -0.2], 2), ([0.9, 0.1, 0.2], 0)])
def test_the_best_model_is_the_later_of_equal_epochs(tmp_path, scores, best):
    same = trained_with(tmp_path, scores)
    assert same == [best], f"the best of {scores} is epoch {same}, not {best}"
    logged = [line["validation"] for line in lines(tmp_path) if "mean" in line]
    assert logged == [{"score": score, "other": 1.0} for score in scores], logged


@pytest.mark.parametrize("scores, best", [([math.nan] * 3, 2), ([math.nan, 0.5, math.nan], 1),
                                          ([-0.5, math.nan, math.nan], 0)])
def test_a_validation_score_that_is_no_number_counts_as_the_worst(tmp_path, scores, best):
    same = trained_with(tmp_path, scores)
    assert same == [best], f"the best of {scores} is epoch {same}, not {best}"


def test_the_last_epoch_is_the_best_of_a_task_that_keeps_it(tmp_path):
    same = trained_with(tmp_path, [0.9, 0.1, math.nan], keeps_last=True)
    assert same == [EPOCHS - 1], f"epoch {same} was kept"


@pytest.mark.parametrize("first, kept", [(0.9, 1), (math.nan, EPOCHS)])
def test_the_best_score_is_remembered_over_a_resume(tmp_path, first, kept):
    with pytest.raises(Interrupted):
        run(tmp_path, tiny_task(interrupting(STEPS), validate=lambda network: {"score": first}))
    assert load_checkpoint(tmp_path / "model_best.pth.tar")["epoch"] == 1
    run(tmp_path, tiny_task(validate=lambda network: {"score": 0.1}), resume=True)
    found = load_checkpoint(tmp_path / "model_best.pth.tar")["epoch"]
    assert found == kept, f"after a score of {first}, the model of epoch {found} is the best"
