"""Every default by dataset or head names a flag of its step, with a value that the flag would take."""
import argparse

import pytest
import run_eval
import run_inference
import run_train
import test_deeplab
import train_deeplab

from utils import recipes
from utils.options import FLAGS, Parser, resolve

STEPS = {"stage 1": (run_train.NAMES[1], recipes.STAGE1), "stage 2": (run_train.NAMES[2], recipes.STAGE2),
         "inference": (run_inference.NAMES, recipes.MASKS), "evaluation": (run_eval.NAMES, recipes.MASKS),
         "training": (train_deeplab.NAMES, recipes.DEEPLAB), "test": (test_deeplab.NAMES, recipes.DEEPLAB),
         "training heads": (train_deeplab.NAMES, recipes.DEEPLAB_TRAINING),
         "test heads": (test_deeplab.NAMES, recipes.DEEPLAB_TEST)}


@pytest.mark.parametrize("step", STEPS)
def test_a_default_is_of_a_flag_that_its_step_has_and_within_its_range(step):
    names, table = STEPS[step]
    for key, recipe in table.items():
        unknown = set(recipe) - set(names)
        assert not unknown, f"{key}: no flags {unknown} in {step}"
        for name, value in recipe.items():
            flag = FLAGS[name]
            for one in value if isinstance(value, tuple) else (value,):
                assert flag.type is bool or flag.type(str(one)) == one, f"{key}: {name} {one!r}"
                assert flag.choices is None or one in flag.choices, f"{key}: {name} {one!r} of {flag.choices}"


def settled(capsys, flags=(), upstream=None):
    """(options, what was printed) of a small parser with two datasets."""
    parser = Parser("", ("dataset", "data_root", "split", "lr", "beta"),
                    {"pet": {"data_root": "pets"}, "voc": {"data_root": "vocs", "lr": 0.5}}, lr=0.25)
    args = resolve(parser, parser.parse_args(flags), upstream, "the record", ("dataset", "data_root", "split", "lr"))
    return argparse.Namespace(**vars(args)), capsys.readouterr().err


def test_a_flag_comes_before_the_record_the_record_before_the_dataset_and_the_dataset_before_the_rest(capsys):
    options, said = settled(capsys, ["--dataset", "voc", "--lr", "0.125"])
    assert (options.data_root, options.lr, options.beta) == ("vocs", 0.125, 8.0), options
    assert "Defaults of --dataset voc: data_root=vocs\n" in said, said
    options, said = settled(capsys, [], {"dataset": "voc", "lr": 2.0, "beta": 4.0})
    assert (options.dataset, options.data_root, options.lr, options.beta) == ("voc", "vocs", 2.0, 8.0), options
    assert "Inherited dataset=voc lr=2.0 from the record" in said, said
    options, said = settled(capsys)
    assert (options.dataset, options.data_root, options.lr) == ("pet", "pets", 0.25), options


def test_the_record_of_another_dataset_does_not_say_where_the_data_is(capsys):
    record = {"dataset": "pet", "data_root": "my_pets", "split": "trainval", "lr": 2.0}
    options, said = settled(capsys, ["--dataset", "voc"], record)
    assert (options.data_root, options.split, options.lr) == ("vocs", None, 2.0), options
    options, said = settled(capsys, ["--dataset", "pet"], record)
    assert (options.data_root, options.split) == ("my_pets", "trainval"), options
