"""The six steps: their scripts, parsers and what each inherits.  No torch.

This package lies above the scripts, as benchmarks do: it asks their parsers and starts them, and nothing imports it.
"""
from collections.abc import Callable
from dataclasses import dataclass

import run_eval
import run_inference
import run_train
import test_deeplab
import train_deeplab
from utils.options import Parser


@dataclass(frozen=True)
class Step:
    """One step.  script: with the words that choose it.  parser: makes its parser.  inherited: the flags that, left
    out, are taken from the record of an earlier step."""
    title: str
    script: tuple[str, ...]
    parser: Callable[[], Parser]
    inherited: tuple[str, ...] = ()


STEPS = {
    1: Step("classifier and CAMs", ("run_train.py", "--stage", "1"), lambda: run_train.parser_for(["--stage", "1"])),
    2: Step("AffinityNet", ("run_train.py", "--stage", "2"), lambda: run_train.parser_for(["--stage", "2"]),
            run_train.INHERITED),
    3: Step("masks", ("run_inference.py",), run_inference.build_parser, run_inference.INHERITED),
    4: Step("scores of the masks", ("run_eval.py",), run_eval.build_parser, run_eval.INHERITED),
    5: Step("DeepLab training", ("train_deeplab.py",), train_deeplab.build_parser, train_deeplab.INHERITED),
    6: Step("DeepLab test", ("test_deeplab.py",), test_deeplab.build_parser, test_deeplab.INHERITED),
}
