"""One optimiser step however it is divided, clipped or compiled; when the state is saved; what a step's line says."""
import signal

import pytest
import torch
from test_engine import BATCH, EPOCHS, OPTIONS, STEPS, Tiny, classify, different, interrupting, lines, run, tiny_task

from models.divided import PartDropout, Place, divide_dropout
from src.stepper import Stepper
from src.task import Task
from utils.checkpoint import load_checkpoint
from utils.interrupt import Interrupted
from utils.log import duration
from utils.runtime import run_main

CPU = torch.device("cpu")
IMAGES = 7


def stepped(count=3, **changes):
    """The numbers of some steps on one batch in float64, dropout included, and the network after them."""
    torch.manual_seed(0)
    network = Tiny().double().freeze(0, "frozen")
    task = Task("stage1", network, classify, None, IMAGES, None, None)
    stepper = Stepper(task, {**OPTIONS, **changes}, CPU)
    generator = torch.Generator().manual_seed(1)
    batch = {"image": torch.randn(IMAGES, 3, 17, 17, generator=generator, dtype=torch.float64),
             "labels": torch.eye(2)[torch.arange(IMAGES) % 2].double(), "index": torch.arange(IMAGES)}
    return [stepper.step(batch, (0, IMAGES, IMAGES), number, number / count) for number in range(count)], network


@pytest.mark.parametrize("parts", [2, 3, 7, 50])
def test_accumulated_parts_give_the_step_of_one_batch(parts, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)  # labels stay float64
    (one, whole), (parted, network) = stepped(), stepped(accumulate=parts)
    for a, b in zip(one, parted):
        assert b == pytest.approx(a, rel=1e-10), f"{parts} parts: {b}, one: {a}"
    gaps = {name: (tensor - network.state_dict()[name]).abs().max().item()
            for name, tensor in whole.state_dict().items()}
    assert max(gaps.values()) < 1e-12, f"{parts} parts: {gaps}"


def test_steps_and_schedule_are_counted_in_batches_whatever_the_parts(tmp_path):
    run(tmp_path, tiny_task(), accumulate=2)
    steps = [line for line in lines(tmp_path) if "grad_norm" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS * EPOCHS + 1))
    expected = [OPTIONS["lr"] * (1 - step / (STEPS * EPOCHS)) ** 0.9 for step in range(STEPS * EPOCHS)]
    assert [line["lr"] for line in steps] == pytest.approx(expected)


def test_dropout_in_parts_is_that_of_the_batch():
    images = torch.rand(5, 6, 4, 3)
    for kind in (torch.nn.Dropout, torch.nn.Dropout2d):
        for order in (torch.contiguous_format, torch.channels_last):
            x, place = images.contiguous(memory_format=order), Place()
            torch.manual_seed(2)
            whole = kind(0.4)(x)
            parted, place.images = PartDropout(kind(0.4), place), 5
            found = []
            for low, high in ((0, 2), (2, 5)):
                place.start = low
                torch.manual_seed(2)
                found.append(parted(x[low:high]))
            assert torch.equal(torch.cat(found), whole), f"{kind.__name__}, {order}"
            assert parted.eval()(x) is x


def test_dividing_dropout_renames_nothing():
    network = Tiny()
    names = list(network.state_dict())
    divide_dropout(network, Place())
    assert isinstance(network.dropout, PartDropout) and list(network.state_dict()) == names


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_clip_grad_shortens_long_gradients_alone(limit):
    (free, network), (clipped, other) = stepped(1), stepped(1, clip_grad=limit)
    assert clipped[0] == free[0], "the norm in the log is not that before clipping"
    same = not different(network, other)
    assert same == (limit > free[0]["grad_norm"]), f"norm {free[0]['grad_norm']}, limit {limit}: same is {same}"
    if not same:
        start = stepped(0)[1]
        moved = [(state["trunk.conv.weight"] - start.state_dict()["trunk.conv.weight"]).norm().item()
                 for state in (network.state_dict(), other.state_dict())]
        assert moved[1] < moved[0] / 10, f"steps of length {moved}"


def test_a_compiled_trunk_gives_the_losses_of_the_plain_one_and_validates(tmp_path):
    def validate(network):
        return {"score": network(torch.ones(1, 3, 23, 31))[0, 0].item()}
    for name in (False, True):
        run(tmp_path / str(name), tiny_task(validate=validate), compile=name, epochs=1)
    plain, compiled = ([(line["loss"], line["grad_norm"]) for line in lines(tmp_path / str(name)) if "loss" in line]
                       for name in (False, True))
    assert compiled == [pytest.approx(step, rel=1e-4) for step in plain], f"{compiled} instead of {plain}"
    state = load_checkpoint(tmp_path / "True" / "model_best.pth.tar")["networks"]["tiny"]["state"]
    assert list(state) == list(Tiny().state_dict()), "compiling renamed tensors"


# --- saving and stopping --------------------------------------------------------------------------------------------

def test_the_state_is_saved_within_an_epoch_after_so_many_minutes(tmp_path):
    positions = []

    def loss(network, batch, part):
        path = tmp_path / "checkpoint.pth.tar"
        positions.append(load_checkpoint(path)["step_in_epoch"] if path.is_file() else None)
        return classify(network, batch, part)
    run(tmp_path, tiny_task(loss), save_every=1e-9, epochs=1)
    assert positions == [None, 1, 2], positions


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_ends_with_128_and_the_signals_number(tmp_path, number, capsys):
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: run(tmp_path, tiny_task(interrupting(1, number))))
    said = capsys.readouterr().err
    assert ended.value.code == 128 + number, ended.value.code
    assert "with --resume goes on from there" in said and said.endswith("Interrupted.\n"), said


def test_a_checkpoint_holds_every_generator_and_restores_it(tmp_path):
    import random

    import numpy as np
    with pytest.raises(Interrupted):
        run(tmp_path, tiny_task(interrupting(2)))
    expected = [torch.rand(()).item(), np.random.rand(), random.random()]
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    from src.resume import set_generators
    set_generators(load_checkpoint(tmp_path / "checkpoint.pth.tar")["generators"])
    assert [torch.rand(()).item(), np.random.rand(), random.random()] == expected


def test_resuming_drops_what_was_logged_after_the_state_was_saved(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, tiny_task(interrupting(2)))
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"epoch": 1, "step": 4, "loss": 9, "grad_norm": 1}\n{"epoch": 1, "st')
    (tmp_path / ".checkpoint.pth.tar.x.tmp").write_bytes(b"half")
    run(tmp_path, tiny_task(), resume=True)
    assert [line["step"] for line in lines(tmp_path) if "grad_norm" in line] == list(range(1, STEPS * EPOCHS + 1))
    assert not list(tmp_path.glob(".*.tmp")), "what a killed run left is still there"


def test_a_step_is_logged_with_pace_time_left_memory_rates_and_gradient(tmp_path, capsys):
    run(tmp_path, tiny_task())
    steps = [line for line in lines(tmp_path) if "grad_norm" in line]
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


def test_the_last_batch_may_be_smaller_than_the_parts(tmp_path):
    run(tmp_path, tiny_task(), accumulate=BATCH)  # its last batch has two images
    assert len([line for line in lines(tmp_path) if "grad_norm" in line]) == STEPS * EPOCHS
