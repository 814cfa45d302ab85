"""The training loop on a tiny network: groups, schedule, interruption and resuming, logs, and what it refuses."""
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.build import build_network
from models.trunk import Network
from src.engine import Task, train
from src.resume import RESUME_FREE
from src.stepper import parameter_groups
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.loader import TrainingSamples
from utils.transforms import Augmentation

CPU = torch.device("cpu")
COUNT, BATCH, EPOCHS = 10, 4, 3
STEPS = 3  # a batch of four, one of four, one of two
OPTIONS = {"batch_size": BATCH, "epochs": EPOCHS, "lr": 0.02, "head_lr": 5.0, "momentum": 0.9, "weight_decay": 1e-3,
           "seed": 3, "workers": 0, "precision": "fp32", "resume": False, "tensorboard": False, "scales": [0.5, 1.0],
           "output_dir": "somewhere", "accumulate": 1, "clip_grad": 0.0, "compile": False, "save_every": 0.0}


class Trunk(nn.Module):
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
        super().__init__(Trunk())
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(6, 2)

    def forward(self, images):
        return self.head(self.dropout(self.trunk(images)["a"].mean(dim=(2, 3))))


class Noise:
    """A dataset of noise in memory."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (COUNT, 20, 24, 3), dtype=np.uint8)
        self.labels = np.eye(2, dtype=np.uint8)[rng.integers(0, 2, COUNT)]
        self.ids = [f"noise_{index}" for index in range(COUNT)]

    def __len__(self):
        return COUNT

    def image(self, index):
        return self.images[index]


def classify(network, batch, part):
    loss = F.binary_cross_entropy_with_logits(network(batch["image"]), batch["labels"].float()) * part.share
    return loss, {"twice": 2 * loss.item()}


def tiny_task(loss=classify, validate=None, step="stage1"):
    torch.manual_seed(0)
    network = Tiny()
    samples = TrainingSamples(Noise(), Augmentation(17), OPTIONS["seed"])
    return Task(step, network, loss, samples, COUNT, validate,
                lambda: {"classes": ["x", "y"], "networks": {"tiny": {"state": network.state_dict()}}})


def interrupting(step, number=signal.SIGINT):
    """The loss, with a signal sent to this process in the given call (counted from 0)."""
    calls = []

    def loss(network, batch, part):
        if len(calls) == step:
            os.kill(os.getpid(), number)
        calls.append(1)
        return classify(network, batch, part)
    return loss


def run(folder, task, **changes):
    return train(task, {**OPTIONS, **changes}, folder, CPU)


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def different(first, second):
    return [name for name, tensor in first.state_dict().items() if not torch.equal(tensor, second.state_dict()[name])]


# --- parameter groups ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["classifier", "affinity", "deeplab"])
@pytest.mark.parametrize("bn, blocks", [("train", 0), ("frozen", 2)])
def test_every_parameter_that_learns_is_in_exactly_one_group(kind, bn, blocks):
    with torch.device("meta"):
        network = build_network(kind, "resnet18", classes=3).freeze(blocks, bn)
    groups = parameter_groups(network, OPTIONS)
    placed = {}
    for group in groups:
        for parameter in group["params"]:
            assert id(parameter) not in placed, "a parameter is in two groups"
            placed[id(parameter)] = group
    for name, parameter in network.named_parameters():
        assert (id(parameter) in placed) == parameter.requires_grad, f"{name}: placed is {id(parameter) in placed}"
        if parameter.requires_grad:
            group = placed[id(parameter)]
            lr = OPTIONS["lr"] * (1 if name.startswith("trunk.") else OPTIONS["head_lr"])
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
    steps = [line for line in lines(whole[0]) if "step" in line]
    epochs = [line for line in lines(whole[0]) if "mean" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS * EPOCHS + 1)), [line["step"] for line in steps]
    assert [line["epoch"] for line in epochs] == list(range(EPOCHS))
    for line in epochs:
        losses = [step["loss"] for step in steps if step["epoch"] == line["epoch"]]
        assert abs(line["mean"]["loss"] - sum(losses) / STEPS) < 1e-9, f"{line['mean']} of {losses}"
        assert abs(line["mean"]["twice"] - 2 * line["mean"]["loss"]) < 1e-9
        assert line["validation"] == {"score": -line["mean"]["loss"]}, line


def test_the_learning_rate_falls_as_a_polynomial_to_near_nothing(whole):
    rates = [line["lr"] for line in lines(whole[0]) if "step" in line]
    total = STEPS * EPOCHS
    expected = [OPTIONS["lr"] * (1 - step / total) ** 0.9 for step in range(total)]
    assert np.allclose(rates, expected, rtol=1e-9), f"{rates}, not {expected}"
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


# --- interruption and resuming -------------------------------------------------------------------------------------

@pytest.mark.parametrize("step", range(STEPS * EPOCHS))
def test_an_interrupted_run_resumes_to_the_same_weights_bit_for_bit(tmp_path, whole, step):
    number = signal.SIGTERM if step % 2 else signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tiny_task(interrupting(step, number)))
    assert len([line for line in lines(tmp_path) if "step" in line]) == step + 1, "the running step was not finished"
    task = tiny_task()
    with torch.no_grad():
        task.network.head.weight.fill_(7)  # comes from the checkpoint, or the result differs
    run(tmp_path, task, resume=True)
    assert not different(whole[1], task.network), f"interrupted at {step}: {different(whole[1], task.network)} differ"
    timeless = ("step", "epoch", "lr", "loss", "mean", "validation")
    found, expected = ([{key: line[key] for key in timeless if key in line} for line in lines(folder)]
                       for folder in (tmp_path, whole[0]))
    assert found == expected, "the log differs from that of the uninterrupted run"


def test_an_interruption_is_told_with_the_way_to_go_on(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
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
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tiny_task(validate=validate))
    found = load_checkpoint(tmp_path / "checkpoint.pth.tar")
    assert (found["epoch"], found["step_in_epoch"]) == (epoch + 1, 0), (found["epoch"], found["step_in_epoch"])


def test_a_second_interruption_stops_at_once(tmp_path):
    def loss(network, batch, part):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal did not stop the step")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tiny_task(loss))


@pytest.mark.parametrize("ends", ["well", "interrupted", "failed"])
def test_the_signal_handlers_are_put_back(tmp_path, ends):
    def fail(network, batch, part):
        raise ValueError
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    loss = {"well": classify, "interrupted": interrupting(0), "failed": fail}[ends]
    try:
        run(tmp_path, tiny_task(loss), epochs=1)
    except (KeyboardInterrupt, ValueError):
        assert ends != "well"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_finished_run_resumes_to_itself(tmp_path, whole):
    run(tmp_path, tiny_task())
    task = tiny_task()
    path = run(tmp_path, task, resume=True)
    assert not different(whole[1], task.network) and path.is_file(), different(whole[1], task.network)


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


def test_options_that_change_nothing_may_differ_on_resume(tmp_path, whole):
    save_checkpoint(tmp_path / "checkpoint.pth.tar", load_checkpoint(whole[0] / "checkpoint.pth.tar"))
    others = {"output_dir": "elsewhere", "workers": 1, "data_root": "moved"}
    assert set(others) <= set(RESUME_FREE)
    task = tiny_task()
    run(tmp_path, task, resume=True, **others)
    assert not different(whole[1], task.network)


def test_resuming_without_or_from_another_steps_checkpoint_is_refused(tmp_path, whole):
    with pytest.raises(UserError, match="no checkpoint .*checkpoint.pth.tar"):
        run(tmp_path, tiny_task(), resume=True)
    save_checkpoint(tmp_path / "checkpoint.pth.tar", load_checkpoint(whole[0] / "checkpoint.pth.tar"))
    with pytest.raises(UserError, match="comes from stage1, but a checkpoint of stage2 is needed"):
        run(tmp_path, tiny_task(step="stage2"), resume=True)


# --- the loss and the best model -----------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_with_its_terms(tmp_path, value):
    calls = []

    def loss(network, batch, part):
        calls.append(1)
        total, _ = classify(network, batch, part)
        return total * (value if len(calls) == 2 else 1), {"pairs": 0.25}
    task = tiny_task(loss)
    with pytest.raises(UserError) as caught:
        run(tmp_path, task)
    text = str(caught.value)
    assert "not finite at step 1" in text and "'pairs': 0.25" in text and "lower --lr" in text, text
    assert len(lines(tmp_path)) == 1, "the bad step was logged as a good one"
    assert all(torch.isfinite(tensor).all() for tensor in task.network.state_dict().values()), "it reached the weights"


@pytest.mark.parametrize("scores, best", [([0.5, 0.7, 0.6], 1), ([0.5, 0.5, 0.4], 1), ([0.0, 0.0, 0.0], 2),
                                          ([-0.3, -0.2, -0.2], 2), ([0.9, 0.1, 0.2], 0)])
def test_the_best_model_is_the_later_of_equal_epochs(tmp_path, scores, best):
    states, left = [], list(scores)

    def validate(network):
        assert not network.training and not torch.is_grad_enabled()
        states.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return {"score": left.pop(0), "other": 1.0}
    path = run(tmp_path, tiny_task(validate=validate))
    state = load_checkpoint(path)["networks"]["tiny"]["state"]
    same = [epoch for epoch, other in enumerate(states) if all(torch.equal(state[name], other[name]) for name in state)]
    assert same == [best], f"the best of {scores} is epoch {same}, not {best}"
    logged = [line["validation"] for line in lines(tmp_path) if "mean" in line]
    assert logged == [{"score": score, "other": 1.0} for score in scores], logged


def test_the_best_score_is_remembered_over_a_resume(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tiny_task(interrupting(STEPS), validate=lambda network: {"score": 0.9}))
    first = load_checkpoint(tmp_path / "model_best.pth.tar")["epoch"]
    run(tmp_path, tiny_task(validate=lambda network: {"score": 0.1}), resume=True)
    assert load_checkpoint(tmp_path / "model_best.pth.tar")["epoch"] == first == 1, "a worse epoch replaced the best"


def test_frozen_parts_do_not_move_in_a_run(tmp_path):
    task = tiny_task()
    task.network.freeze(1, "frozen")
    before = {name: tensor.clone() for name, tensor in task.network.trunk.state_dict().items()}
    run(tmp_path, task, epochs=1)
    moved = [name for name, tensor in task.network.trunk.state_dict().items() if not torch.equal(tensor, before[name])]
    assert not moved, f"{moved} moved although frozen"


def test_bf16_trains_close_to_full_precision_on_float32_weights(tmp_path, whole):
    task = tiny_task()
    run(tmp_path, task, precision="bf16")
    assert {tensor.dtype for tensor in task.network.parameters()} == {torch.float32}
    difference = (task.network.head.weight - whole[1].head.weight).abs().max().item()
    assert 0 < difference < 0.05, f"head weights differ by {difference:.4f}"
