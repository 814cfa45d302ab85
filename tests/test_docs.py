"""Every link, picture, command and flag that a page names exists: README, CONTRIBUTING, docs/ and data/README.md."""
import argparse
import functools
import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "data/README.md"]
SCRIPTS = ("run_train.py --stage 1", "run_train.py --stage 2", "run_inference.py", "run_eval.py", "train_deeplab.py",
           "test_deeplab.py")
OF_OTHERS = {"--shm-size"}  # flags of Docker
PYTHON = re.compile(r"(?:^|[\s`])(?:[\w./]+/)?python3? +(?:-m +)?(?P<what>[\w./]+)(?P<rest>.*)")
TORCHRUN = re.compile(r"\btorchrun +.*?(?P<what>\b\w+\.py)(?P<rest>.*)")
MAKE = re.compile(r"^(?:\$ )?make +(?P<targets>[a-z][a-z -]*)")
END = re.compile(r" # | {2,}#| \(|\$\(|\|\||&&|\||`|\.\.\.| > |;")  # what may follow a command in its line
PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_,]*")


class Captured(Exception):
    """Carries the parser on which a script was about to call `parse_args`."""


# --- what a page says ------------------------------------------------------------------------------------------------

def code_lines(text: str) -> Iterator[str]:
    """Lines of fenced and indented code, continued ones joined, and code spans in the text, each as one line."""
    spans, block, fenced = [], [], False
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            block.append(line)
        else:
            spans.append(line)
    yield from (line.strip() for line in "\n".join(block).replace("\\\n", " ").split("\n"))
    yield from (span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", "\n".join(spans)))


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(script or module, its arguments) of every `python ...` and `torchrun ...` of a page."""
    for line in code_lines(text):
        for found in (PYTHON.search(line), TORCHRUN.search(line)):
            if found:
                rest = END.split(found["rest"] + " ")[0].replace("[", " ").replace("]", " ")
                yield found["what"], shlex.split(rest)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, folder: Path) -> list[str]:
    """Relative links and pictures of a page in `folder` whose file, or heading in it, does not exist."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        page = folder / path
        whole = page.read_text(encoding="utf-8") if path and page.is_file() and page.suffix == ".md" else text
        if not page.exists() or anchor and anchor not in anchors(whole):
            broken.append(target)
    return broken


# --- what there is ---------------------------------------------------------------------------------------------------

@functools.cache
def parser_of(what: str, stage: str = "1") -> argparse.ArgumentParser | None:
    """The parser of a script (run_eval.py) or module (models.weights); None if it takes no arguments.

    Its main() is run up to `parse_args`.  stage: of run_train.py.
    """
    name = what.removesuffix(".py")
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    if "parse_args" not in inspect.getsource(module):
        return None

    def capture(parser, *_, **__):
        raise Captured(parser)
    argv = [what, "--stage", stage] if name == "run_train" else [what]
    with mock.patch.object(sys, "argv", argv), mock.patch.object(argparse.ArgumentParser, "parse_args", capture):
        try:
            module.main()
        except Captured as found:
            return found.args[0]
    raise AssertionError(f"{what} did not parse its arguments")


def exists(what: str) -> bool:
    """Whether a script or one of this project's modules exists; modules of others (pip, venv) are not looked for."""
    if what.endswith(".py"):
        return (ROOT / what).is_file()
    path = ROOT / what.replace(".", "/")
    return not is_ours(what) or path.with_suffix(".py").is_file() or path.is_dir()


def is_ours(module: str) -> bool:
    return module.partition(".")[0] in {path.parent.name for path in ROOT.glob("*/*.py")}


def fault(what: str, arguments: list[str], capsys: pytest.CaptureFixture) -> str | None:
    """What is wrong with a command, or None.  Values are checked too, unless some are placeholders in capitals."""
    if not exists(what):
        return f"there is no {what}"
    if not what.endswith(".py") and not is_ours(what):
        return None
    flags = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    stage = arguments[arguments.index("--stage") + 1] if "--stage" in arguments else "1"
    parser = parser_of(what, stage if stage in ("1", "2") else "1") if arguments else None
    if parser is None:
        return f"{what} takes no arguments" if arguments else None
    known = parser._option_string_actions
    unknown = [flag for flag in flags if flag not in known]
    if unknown:
        return f"{what} does not know {' '.join(unknown)}"
    if not flags or any(PLACEHOLDER.fullmatch(argument) for argument in arguments):
        return None
    try:
        parser.parse_known_args(arguments)
    except SystemExit:
        return capsys.readouterr().err.strip()[-200:]
    return None


def known_flags() -> set[str]:
    """The flags of the scripts, and of every module that a page names in a command."""
    named = {what for page in PAGES for what, _ in commands(page.read_text(encoding="utf-8"))}
    parsers = [parser_of(*script.replace(" --stage", "").split()) for script in SCRIPTS]
    parsers += [parser_of(what) for what in sorted(named)
                if not what.endswith(".py") and is_ours(what) and exists(what)]
    return {flag for parser in parsers if parser is not None for flag in parser._option_string_actions}


# --- the tests -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_picture_exists(page):
    broken = broken_links(page.read_text(encoding="utf-8"), page.parent)
    assert not broken, f"{page.relative_to(ROOT)} links to what is not there: {', '.join(broken)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_names_a_script_and_flags_that_it_knows(page, capsys):
    found = [(what, fault(what, arguments, capsys)) for what, arguments in commands(page.read_text(encoding="utf-8"))]
    faults = [text for _, text in found if text]
    assert not faults, f"{page.relative_to(ROOT)}, {len(found)} commands: {'; '.join(faults)}"


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    for page in PAGES:
        for line in code_lines(page.read_text(encoding="utf-8")):
            found = MAKE.match(line)
            wrong = set(END.split(found["targets"])[0].split()) - targets if found else set()
            assert not wrong, f"{page.relative_to(ROOT)}: the Makefile has no target {', '.join(sorted(wrong))}"


def test_every_flag_in_the_text_is_known_to_a_script():
    known = known_flags() | OF_OTHERS
    assert len(known) > 100, f"only {len(known)} flags were found"
    for page in PAGES:
        text = re.sub(r"^ {4}.*$|^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        spans = [span for span in re.findall(r"`([^`]+)`", text) if "python" not in span and "torchrun" not in span]
        wrong = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z]\w+(?:-\w+)*", span)} - known
        assert not wrong, f"{page.relative_to(ROOT)} names flags that no script has: {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("text, said", [
    ("    python run_train.py --stage 2 --crf_presett psa", "--crf_presett"),
    ("    python run_train.py --stage 1 \\\n        --crf_preset psa", "--crf_preset"),
    ("    python run_train.py --stage 2 --crf_preset magic", "magic"),
    ("    OMP_NUM_THREADS=1 python -m benchmarks.no_such_thing", "no_such_thing"),
    ("    torchrun --nproc_per_node 8 run_tests.py --stage 1", "run_tests.py"),
    ("Text with `python train_deeplab.py --masks gt`.", "--masks"),
    ("```\npython run_eval.py --bg_alpha many  # a comment\n```", "many"),
])
def test_a_wrong_command_is_found(text, said, capsys):
    faults = [fault(what, arguments, capsys) for what, arguments in commands(text)]
    assert len(faults) == 1 and said in (faults[0] or ""), faults


@pytest.mark.parametrize("text", [
    "    python run_train.py --stage 1 --seed K --data_root DATA", "`python -m venv .venv`",
    "    python run_inference.py --images FOLDER [--crf] ...", "    python -m models.weights FILE",
])
def test_placeholders_and_other_peoples_modules_are_allowed(text, capsys):
    faults = [fault(what, arguments, capsys) for what, arguments in commands(text)]
    assert faults == [None], faults


def test_a_broken_link_and_a_missing_heading_are_found():
    text = "# A b, c\n[x](docs/none.md) [y](#a-b-c) [z](#b) [w](https://example.org/none) ![p](docs/demo.png)"
    assert broken_links(text, ROOT) == ["docs/none.md", "#b"]


def test_the_pictures_of_the_method_are_drawn_small_from_any_toy_checkpoint(tmp_path, monkeypatch):
    import torch

    from docs.make_pictures import PANELS, draw, save
    from models.weights import build_network, pack
    from src.pipeline import Pipeline
    from utils.config import Machine, MapConfig, WalkConfig
    monkeypatch.setattr("docs.make_pictures.SIZE", 48)
    torch.manual_seed(0)
    how = {"backbone": "resnet18", "classes": 2}
    networks = {"classifier": pack(build_network("classifier", **how), kind="classifier", **how, seed={"name": "cam"}),
                "affinity": pack(build_network("affinity", backbone="resnet18"), kind="affinity", backbone="resnet18")}
    payload = {"networks": networks, "classes": ["bullseye_hound", "Tabby_cat"]}
    pipeline = Pipeline(payload, MapConfig((1.0,)), WalkConfig(walk_steps=8), Machine(torch.device("cpu")), "psa")
    drawings = draw(pipeline.classes, [0, 1])
    assert [one.breed for one in drawings] == payload["classes"]
    assert [sorted({*one.truth.flat} - {0, 255}) for one in drawings] == [[1], [2]]
    for name, row in PANELS.items():
        save(tmp_path / f"{name}.png", [row(pipeline, one) for one in drawings])
        size = (tmp_path / f"{name}.png").stat().st_size
        assert 5_000 < size < 150_000, f"{name}.png has {size} bytes"


def test_pictures_of_the_method_refuse_classes_that_are_no_toy_breeds():
    from docs.make_pictures import draw
    with pytest.raises(UserError, match="not toy breeds.*make demo"):
        draw(["cat", "dog"], [0])


def test_pictures_in_docs_are_small():
    for path in ROOT.glob("docs/**/method-*.png"):
        assert path.stat().st_size < 150_000, f"{path.name} has {path.stat().st_size} bytes"
