"""Options: defaults by dataset and head, what comes before what, values out of range, devices."""
import argparse

import pytest
import torch

import run_eval
import run_inference
import run_train
import test_deeplab
import train_deeplab
from src.seeds import SEEDS
from utils import distributed, options, recipes
from utils.config import BackboneConfig, DataConfig, MapConfig, TrainConfig, WalkConfig
from utils.datasets import DATASETS, Layout
from utils.errors import UserError
from utils.options import FLAGS, GROUPS, Parser, number, pick_device, point, resolve

STEPS = {"stage1": [run_train.NAMES[1]], "stage2": [run_train.NAMES[2]], "masks": [run_inference.NAMES, run_eval.NAMES],
         "deeplab": [train_deeplab.NAMES, test_deeplab.NAMES]}
HEADS = {"training": (recipes.DEEPLAB_TRAINING, [train_deeplab.NAMES]), "test": (recipes.DEEPLAB_TEST,
                                                                               [test_deeplab.NAMES])}


def check_recipe(where, recipe, scripts):
    """Each default is of a flag that the scripts have, with a value that the flag would take."""
    for names in scripts:
        unknown = set(recipe) - set(names)
        assert not unknown, f"{where}: no flags {unknown}"
    for name, value in recipe.items():
        flag = FLAGS[name]
        for one in value if isinstance(value, tuple) else (value,):
            assert flag.type is bool or flag.type(str(one)) == one, f"{where}: {name} {one!r}"
            assert flag.choices is None or one in flag.choices, f"{where}: {name} {one!r} of {flag.choices}"


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_datasets_defaults_are_of_flags_that_their_steps_have_and_within_range(dataset):
    defaults = DATASETS[dataset].defaults
    assert set(defaults) == set(STEPS), f"steps {set(defaults)}"
    for step, recipe in defaults.items():
        check_recipe(f"{dataset}, {step}", recipe, STEPS[step])


@pytest.mark.parametrize("what", HEADS)
def test_a_heads_defaults_are_of_flags_that_their_step_has_and_within_range(what):
    table, scripts = HEADS[what]
    assert set(table) == set(FLAGS["head"].choices), set(table)
    for head, recipe in table.items():
        check_recipe(f"{what} of {head}", recipe, scripts)


@pytest.mark.parametrize("method", recipes.METHODS)
def test_a_methods_defaults_are_of_flags_that_their_steps_have_and_come_before_the_datasets(method, capsys):
    assert method in SEEDS, f"{method} is no seed method"
    for step, recipe in recipes.METHODS[method].items():
        check_recipe(f"{method}, {step}", recipe, STEPS[step])
    parser = Parser("", run_inference.NAMES, "masks")
    own, published = recipes.METHODS[method]["masks"], recipes.PUBLISHED["masks"]
    for upstream, expected in (({"method": method}, {**published, **own}), ({}, published)):
        args = resolve(parser, parser.parse_args(["--dataset", "voc"]), upstream, "a record")
        found = {name: getattr(args, name) for name in expected}
        assert found == expected, f"after {upstream}: {found}"
    assert f"Defaults of --method {method}: bg_alpha=6.0" in capsys.readouterr().err
    given = resolve(parser, parser.parse_args(["--dataset", "voc", "--bg_alpha", "3"]), {"method": method}, "a record")
    assert given.bg_alpha == 3, f"--bg_alpha 3 became {given.bg_alpha}"


@pytest.mark.parametrize("name", [name for name, flag in FLAGS.items() if flag.default is not None])
def test_a_flags_own_default_is_one_that_it_takes(name):
    flag = FLAGS[name]
    for one in flag.default if isinstance(flag.default, tuple) else (flag.default,):
        assert flag.type is bool and isinstance(one, bool) or flag.type is not bool and flag.type(str(one)) == one, one
        assert flag.choices is None or one in flag.choices, f"{one!r} of {flag.choices}"


def test_every_flag_is_in_one_group():
    members = [name for names in GROUPS.values() for name in names]
    assert sorted(members) == sorted(FLAGS), set(members) ^ set(FLAGS)


@pytest.mark.parametrize("config", [DataConfig, BackboneConfig, TrainConfig, MapConfig, WalkConfig])
def test_the_fields_of_a_config_are_names_of_flags(config):
    unknown = set(config.__dataclass_fields__) - set(FLAGS)
    assert not unknown, f"fields that no flag fills: {unknown}"


# --- what comes before what ------------------------------------------------------------------------------------------

@pytest.fixture
def settled(capsys, monkeypatch):
    """Function (flags, upstream record): (options, what was printed) of a small parser with two datasets."""
    monkeypatch.setattr(options, "DATASETS", {
        "pet": Layout(open=None, data_root="pets", defaults={}),
        "voc": Layout(open=None, data_root="vocs", defaults={"masks": {"lr": 0.5, "epochs": 9}})})

    def settle(flags=(), upstream=None):
        parser = Parser("", ("dataset", "data_root", "split", "lr", "beta", "scales"), "masks", lr=0.25)
        args = resolve(parser, parser.parse_args(flags), upstream, "the record",
                       ("dataset", "data_root", "split", "lr"))
        return argparse.Namespace(**vars(args)), capsys.readouterr().err
    return settle


def test_a_flag_comes_before_the_record_the_record_before_the_dataset_and_the_dataset_before_the_rest(settled):
    found, said = settled(["--dataset", "voc", "--lr", "0.125"])
    assert (found.data_root, found.lr, found.beta, found.scales) == ("vocs", 0.125, 8.0, [0.5, 1.0, 1.5]), found
    assert "Defaults of --dataset voc: data_root=vocs\n" in said and not hasattr(found, "epochs"), said
    found, said = settled(["--dataset", "voc"])
    assert found.lr == 0.5 and "Defaults of --dataset voc: data_root=vocs lr=0.5\n" in said, said
    found, said = settled([], {"dataset": "voc", "lr": 2.0, "beta": 4.0})
    assert (found.dataset, found.data_root, found.lr, found.beta) == ("voc", "vocs", 2.0, 8.0), found
    assert "Inherited dataset=voc lr=2.0 from the record" in said, said
    found, said = settled()
    assert (found.dataset, found.data_root, found.lr) == ("pet", "pets", 0.25), found


def test_the_record_of_another_dataset_does_not_say_where_the_data_is(settled):
    record = {"dataset": "pet", "data_root": "my_pets", "split": "trainval", "lr": 2.0}
    found, said = settled(["--dataset", "voc"], record)
    assert (found.data_root, found.split, found.lr) == ("vocs", None, 2.0), found
    found, said = settled(["--dataset", "pet"], record)
    assert (found.data_root, found.split) == ("my_pets", "trainval"), found


def test_the_record_of_a_dataset_that_is_not_registered_here_is_refused(settled):
    with pytest.raises(UserError, match="the record was made from --dataset mars, which is not registered here"):
        settled([], {"dataset": "mars"})


# --- values ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, low, high, above, good, bad", [
    (int, 1, float("inf"), False, ("1", "1000000"), ("0", "-1", "1.5", "many")),
    (float, 0, float("inf"), True, ("1e-9", "3"), ("0", "-0.1", "nan")),
    (float, 0, 1, False, ("0", "0.5", "1"), ("1.01", "-0.01", "nan", "inf")),
])
def test_a_number_is_taken_within_its_bounds_alone(kind, low, high, above, good, bad):
    convert = number(kind, low, high, above)
    assert [convert(text) for text in good] == [kind(text) for text in good]
    for text in bad:
        with pytest.raises((ValueError, argparse.ArgumentTypeError)):
            convert(text)


@pytest.mark.parametrize("name, good, bad", [
    ("scales", ("0.5", "8"), ("0", "-1", "8.1", "1e9", "inf", "nan")),
    ("seed", ("0", str(2 ** 32 - 1)), ("-1", str(2 ** 32), str(2 ** 64 - 1)))])
def test_scales_and_seeds_that_overflow_later_are_out_of_range(name, good, bad):
    assert [FLAGS[name].type(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="out of range; it must be .* and at most"):
            FLAGS[name].type(text)


@pytest.mark.parametrize("text, found", [("120,80", (120, 80)), ("0, 7", (0, 7))])
def test_a_pixel_is_two_whole_numbers(text, found):
    assert point(text) == found
    for wrong in ("120", "1,2,3", "1.5,2", "-1,2", "a,b", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="no pixel; pass two whole numbers"):
            point(wrong)


# --- devices ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def gpus(monkeypatch):
    """Function: let PyTorch see so many GPUs, and this be rank `rank` of `world` of a machine."""
    def see(count, rank=0, world=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(distributed, "world", lambda: world)
        monkeypatch.setattr(distributed, "local_rank", lambda: rank)
    return see


@pytest.mark.parametrize("count, name, found", [(0, "cpu", "cpu"), (0, "auto", "cpu"), (1, "auto", "cuda"),
                                                (2, "cuda", "cuda"), (2, "cuda:1", "cuda:1"), (2, "cpu", "cpu")])
def test_a_device_is_the_one_that_was_named(gpus, count, name, found):
    gpus(count)
    assert pick_device(name) == torch.device(found)


@pytest.mark.parametrize("count, name, words", [
    (0, "cuda", "--device cuda but PyTorch sees no GPU; pass --device cpu"),
    (0, "cuda:0", "--device cuda:0 but PyTorch sees no GPU; pass --device cpu"),
    (1, "cuda:1", "--device cuda:1 but PyTorch sees 1 GPUs; pass --device cpu, or one that there is"),
    (8, "cuda:99", "--device cuda:99 but PyTorch sees 8 GPUs"),
    *((1, name, f"no device {name!r} here; pass --device cpu, cuda or cuda:N") for name in
      ("mps", "xpu", "meta", "cuda:x", "cuda:-1", "cuda:128", "cuda:256", "cuda:99999999999999999999", "gpu",
       "fast one", "")),
])
def test_a_device_that_is_not_there_is_refused_in_one_line(gpus, count, name, words):
    gpus(count)
    with pytest.raises(UserError) as caught:
        pick_device(name)
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def test_each_rank_of_a_machine_gets_a_gpu_of_its_own_or_is_refused(gpus):
    for rank in range(2):
        gpus(2, rank, world=3)
        assert pick_device("cuda") == pick_device("auto") == torch.device(f"cuda:{rank}")
    gpus(2, 2, world=3)
    with pytest.raises(UserError, match="process 2 of this machine has no GPU of its own among 2; start as many"):
        pick_device("auto")
    gpus(0, 1, world=2)
    assert pick_device("auto") == torch.device("cpu")
