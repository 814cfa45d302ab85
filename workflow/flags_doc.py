"""`make docs`: write docs/flags.md, every flag of the six steps, from their parsers."""
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from src.seeds import SEED_FLAGS
from utils.datasets import DATASETS
from utils.files import atomic_path
from utils.options import FLAGS, GROUPS, Flag, Parser, typed
from workflow.steps import STEPS

PATH = Path(__file__).resolve().parents[1] / "docs" / "flags.md"
HEAD = """# Every flag

`make docs` writes this page from the parsers of the scripts; what is wrong here is mended there. `--help` of a script
shows the same.

{steps}

"steps" are those that take a flag. In a step marked with *, a flag that is left out takes the value that the record of
an earlier step has, and the run says so. Otherwise its default holds. "by `--dataset`", "by `--method`" and "by
`--head`" point to the tables at the end: a default of the seed method overrides one of the dataset, and both
override the flag's own. What is on or off is typed without a value: `--crf` or `--no-crf`.
"""
RECIPES = {"dataset": ("--dataset", "datasets"), "seed method": ("--method", "methods"),
           "DeepLab's head": ("--head", "heads")}
DEFAULT = re.compile(r"\s*\(default: (.*?)\)")
TYPES = {"point": "X,Y in pixels", "int": "whole number"}


def document() -> str:
    """The whole text of docs/flags.md."""
    parsers = {number: step.parser() for number, step in STEPS.items()}
    commands = _table(("step", "command", "what it makes"), [
        (str(number), f"`python {' '.join(step.script)}`", step.title) for number, step in STEPS.items()])
    parts = [HEAD.format(steps=commands)]
    for title, flags in _groups():
        rows = [_row(name, flag, parsers) for name, flag in flags.items()]
        parts.append(f"## {title}\n\n{_table(('flag', 'values', 'default', 'steps', 'meaning'), rows)}\n")
    for what, (flag, attribute) in RECIPES.items():
        by_step = {number: getattr(parser, attribute) for number, parser in parsers.items()}
        parts.append(f"## Defaults by {what}\n\n{_table((f'`{flag}`', 'steps', 'defaults'), _recipes(by_step))}\n")
    return "\n".join(parts)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows))


def _groups() -> Iterator[tuple[str, dict[str, Flag]]]:
    for title, members in GROUPS.items():
        yield title[0].upper() + title[1:], {name: FLAGS[name] for name in members}
    for method, own in SEED_FLAGS.items():
        yield f"`--method {method}`", own


def _row(name: str, flag: Flag, parsers: Mapping[int, Parser]) -> tuple[str, ...]:
    steps = {number: parser for number, parser in parsers.items() if name in parser.flags}
    marked = [f"{number}\\*" if name in STEPS[number].inherited else str(number) for number in steps]
    return (f"`--{name}`", _values(name, flag), _default(name, flag, steps), ", ".join(marked),
            _escaped(DEFAULT.sub("", flag.help)))


def _values(name: str, flag: Flag) -> str:
    """What a flag takes, in words: choices, type and range, how many."""
    if flag.type is bool:
        return "on, off"
    choices = tuple(DATASETS) if name == "dataset" else flag.choices
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    kind = flag.type.__name__
    what = "text" if kind == "str" else TYPES.get(kind, kind)
    if bounds := getattr(flag.type, "bounds", None):
        what += f", {bounds}"
    several = {None: "", "+": "one or more: "}.get(flag.nargs, f"{flag.nargs} of: ")
    return several + what


def _default(name: str, flag: Flag, parsers: Mapping[int, Parser]) -> str:
    """The default of a flag, with the steps that have it where these differ."""
    steps = {}
    for number, parser in parsers.items():
        steps.setdefault(_default_of(name, flag, parser), []).append(str(number))
    if len(steps) == 1:
        return next(iter(steps))
    return "; ".join(f"{told} ({', '.join(numbers)})" for told, numbers in steps.items())


def _default_of(name: str, flag: Flag, parser: Parser) -> str:
    """The default of a flag in one step: its own, and what it depends on."""
    own, words = parser.flags[name], DEFAULT.search(flag.help)
    depends = [f"by `{option}`" for option, attribute in RECIPES.values()
               if any(name in recipe for recipe in getattr(parser, attribute).values())]
    if flag.rule:
        told = flag.rule
    elif own is not None:
        told = f"`{typed(own)}`"
    elif words:
        told = _escaped(words[1])
    else:
        told = "" if depends else "chosen by the step"
    return ", ".join(filter(None, (told, *depends)))


def _recipes(by_step: Mapping[int, Mapping[str, Mapping[str, object]]]) -> list[tuple[str, ...]]:
    """Rows: a dataset, method or head, the steps, and their defaults as they are typed."""
    rows = {}
    for number, recipes in by_step.items():
        for name, recipe in recipes.items():
            if recipe:
                told = " ".join(_as_typed(flag, value) for flag, value in recipe.items())
                rows.setdefault((name, told), []).append(str(number))
    names = list(dict.fromkeys(name for name, _ in rows))
    return [(f"`{name}`", ", ".join(numbers), f"`{told}`") for (name, told), numbers in
            sorted(rows.items(), key=lambda row: names.index(row[0][0]))]


def _as_typed(flag: str, value: object) -> str:
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {typed(value)}"


def _escaped(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return re.sub(r"([|*\\])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;")


def main() -> None:
    with atomic_path(PATH) as temporary:
        temporary.write_text(document(), encoding="utf-8")
    print(f"Wrote {PATH}")


if __name__ == "__main__":
    main()
