"""From the flags of a whole run to the command of each step, all checked before any work."""
import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from src.submission import check_submission
from utils.config import DataConfig
from utils.datasets import DATASETS, open_dataset
from utils.errors import UserError
from utils.files import check_folder
from utils.options import Parser, default_method
from utils.store import BEST, MANIFEST
from workflow.steps import STEPS

# A whole run sets these itself.
FIXED = {**dict.fromkeys(("cam_dir", "mask_dir", "output_dir"), "name the folder of all results with --output_dir"),
         "stage": "steps go by --step N", "resume": "a training that was stopped goes on by itself",
         "images": "run run_inference.py or test_deeplab.py by themselves"}
NOT_IN = {6: ("split", "ids", "labels"),  # which say how masks of the training images are made
          2: ("pretrained",)}             # which starts from the classifier of step 1


@dataclass(frozen=True)
class Command:
    """One step of a whole run.

    argv: the script and its flags.  options: what they say, by flag.  out: its folder.  results: the files that are
    there when it is done.  after: the step whose results it reads.  scored: the split it scores, if it scores one.
    """
    step: int
    argv: tuple[str, ...]
    options: Mapping[str, object]
    out: Path
    results: tuple[Path, ...]
    after: int | None
    scored: DataConfig | None = None


@dataclass(frozen=True)
class Plan:
    """A whole run.  folder: of all results.  left_out: {step: why it is not run}.  overwrite: whether all is made anew.
    """
    folder: Path
    commands: tuple[Command, ...]
    left_out: Mapping[int, str]
    overwrite: bool = False


def make_plan(flags: Sequence[str], output_dir: str | None = None, walk: bool | None = None, until: int = 6) -> Plan:
    """Plan a whole run.

    flags: of the steps, as they are typed: each is passed to every step that knows it; those after "--step", "N" are
    for step N alone, and come after the others.  Without "--step", the flags of NOT_IN are for the other steps, and
    --model_path is for step 1.  output_dir: folder of all results, by default output/run_<dataset>.
    walk: whether to train AffinityNet (step 2) and walk along its affinities; None: unless the seed is the mixture's.
    until: the last step.
    UserError for a flag that no step knows, a value that a step refuses, and ground truth that is not complete.
    """
    return _Planner(flags, output_dir, walk, until).plan()


class _Planner:
    def __init__(self, flags: Sequence[str], output_dir: str | None, walk: bool | None, until: int):
        self.parsers = {number: step.parser() for number, step in STEPS.items() if number <= until}
        for number, parser in self.parsers.items():
            parser.error = lambda message, number=number: _refuse(f"step {number}: {message}")
        self.given = _by_step(flags, self.parsers)
        first = self.parse(1)
        self.data = _data(first, self.parsers[1])
        self.folder = Path(output_dir or Path("output") / f"run_{self.data.dataset}")
        self.adopted = None if first.model_path is None else _adopted(first.model_path)
        self.walk = walk if walk is not None else self.method(first) != "mixture"

    def plan(self) -> Plan:
        left_out = {} if self.walk or 2 not in self.parsers else {
            2: "the seed of the mixture needs no walk; --walk trains AffinityNet all the same"}
        if 4 in self.parsers and not self.scored(4):
            left_out[4] = f"{self.data.data_root} has no ground truth of the training images"
        if 6 in self.parsers:
            self.scored(6)
        self.check_extras()
        commands = tuple(self.command(number) for number in self.parsers if number not in left_out)
        return Plan(self.folder, commands, left_out, any(command.options.get("overwrite") for command in commands))

    def check_extras(self) -> None:
        """UserError for results that a late step could not write."""
        check_folder(self.folder, "--output_dir")
        if 3 in self.parsers and not self.walk and self.parse(3).save_walk:
            raise UserError("--save_walk shows the walk, which this run leaves out; pass --walk, or leave --save_walk "
                            "out")
        path = self.parse(6).submission if 6 in self.parsers else None
        if path is not None and not (Path(path).exists() and (self.folder / "deeplab_test/masks" / MANIFEST).is_file()):
            check_submission(path, self.scored_data(6))  # one that an earlier run of this folder wrote may stay

    def parse(self, number: int, own: Sequence[str] = ()) -> argparse.Namespace:
        """The flags of a step, `own` before those that were given."""
        return self.parsers[number].parse_args([*STEPS[number].script[1:], *own, *self.given[number]])

    def command(self, number: int) -> Command:
        """The command of a step, with its folders."""
        folder = self.folder
        out = folder / {1: "stage1", 2: "stage2", 3: "inference", 4: "eval", 5: "deeplab", 6: "deeplab_test"}[number]
        cams, masks, classifier = folder / "cams", folder / "inference", self.classifier()
        maker = str(folder / "stage2" / BEST) if self.walk else classifier
        more = {4: self.scored_split, 5: self.start_of_deeplab}.get(number, list)()
        own = {1: ("--cam_dir", cams), 2: ("--cam_dir", cams), 3: ("--model_path", maker, "--cam_dir", cams),
               4: ("--model_path", maker, "--cam_dir", cams), 5: ("--mask_dir", masks),
               6: ("--model_path", folder / "deeplab" / BEST)}[number]
        own = [*map(str, own), *more, "--output_dir", str(out)]
        results = {1: (cams / MANIFEST, Path(classifier)), 2: (out / BEST,), 3: (out / MANIFEST,),
                   4: (out / "scores.json",), 5: (out / BEST,), 6: (out / "masks" / MANIFEST,)}[number]
        args = {name: value for name, value in vars(self.parse(number, own)).items() if value is not None}
        after = {1: None, 2: 1, 3: 2 if self.walk else 1, 4: 2 if self.walk else 1, 5: 3, 6: 5}[number]
        return Command(number, (*STEPS[number].script, *own, *self.given[number]), args, out, results, after,
                       self.scored_data(number) if number in (4, 6) else None)

    def classifier(self) -> str:
        """Path of the checkpoint of step 1; one of ours that was given stays where it is."""
        if self.adopted is not None and self.adopted["ours"]:
            return str(self.parse(1).model_path)
        return str(self.folder / "stage1" / BEST)

    def method(self, first: argparse.Namespace) -> str | None:
        """The seed method that step 1 will settle on."""
        if self.adopted is not None:
            return self.adopted["method"]
        if first.method is not None:
            return first.method
        if first.pretrained is None:
            from models.backbone import find_backbone
            if find_backbone(first.backbone or self.parsers[1].flags["backbone"]).imagenet is None:
                return default_method("none")
        return default_method(first.pretrained or "imagenet")

    def start_of_deeplab(self) -> list[str]:
        """The flags that let DeepLab take the backbone of step 1, and start from its weights, where none say otherwise.

        resnet38, DeepLab's own default, has no weights to be fetched.
        """
        first, fifth = self.parse(1), self.parse(5)
        ours = first.backbone or self.parsers[1].flags["backbone"] if self.adopted is None else self.adopted["backbone"]
        flags = [] if fifth.backbone else ["--backbone", ours]
        return flags + (["--pretrained", self.classifier()] if fifth.pretrained is None
                        and fifth.backbone in (None, ours) else [])

    def scored_split(self) -> list[str]:
        """The flags that name the split whose masks are scored, where it is not that of the training."""
        split = DATASETS[self.data.dataset].scored_split
        return [] if split is None or self.data.split or self.data.ids else ["--split", split]

    def scored_data(self, number: int) -> DataConfig:
        """The images that step 4 or 6 scores."""
        data = dict(vars(self.data))
        if number == 6:
            split = DATASETS[self.data.dataset].tested(self.data.data_root)
            data.update(split=split, ids=None)
        given = self.parse(number, self.scored_split() if number == 4 else ())
        data.update({name: value for name, value in vars(given).items() if name in data and value is not None})
        return DataConfig(**{**data, "download": False})

    def scored(self, number: int) -> bool:
        """Whether the split of step 4 or 6 has ground truth; UserError if it is not complete."""
        data = self.scored_data(number)
        if self.data.download and not Path(data.data_root).is_dir():
            return True  # it is fetched with its ground truth
        dataset = open_dataset(data)
        if dataset.truth is None:
            return False
        dataset.check_truth()
        return True


def _refuse(message: str) -> None:
    raise UserError(message)


def _by_step(flags: Sequence[str], parsers: Mapping[int, Parser]) -> dict[int, list[str]]:
    """{step: its flags}; UserError for a flag that none of the steps knows, or that a whole run sets itself."""
    common, own = {number: [] for number in parsers}, {number: [] for number in parsers}
    for section, words in _sections(flags, parsers):
        option = words[0].partition("=")[0]
        name = option.removeprefix("--")
        if name in FIXED:
            raise UserError(f"{option} is set by the whole run; {FIXED[name]}")
        knowing = [number for number, parser in parsers.items() if option in parser._option_string_actions]
        if section is None:
            chosen = [number for number in knowing if name not in NOT_IN.get(number, ())
                      and (name != "model_path" or number == 1)]
        else:
            if name == "model_path" and section != 1:
                raise UserError(f"{option} of step {section} is set by the whole run; leave it out")
            chosen = [number for number in knowing if number == section]
        if not chosen:
            where = "no step of this run knows" if section is None else f"step {section} does not know"
            others = f"; those that do: {', '.join(map(str, knowing))}" if knowing else ""
            raise UserError(f"{where} {option}{others}; docs/flags.md has all flags")
        for number in chosen:
            (common if section is None else own)[number] += words
    return {number: common[number] + own[number] for number in parsers}


def _sections(flags: Sequence[str], parsers: Mapping[int, Parser]) -> Iterator[tuple[int | None, list[str]]]:
    """(step, or None for all; a flag with its values) one after the other."""
    groups = []
    for word in map(str, flags):
        if word.startswith("--"):
            groups.append([word])
        elif groups:
            groups[-1].append(word)
        else:
            raise UserError(f"{word} stands before any flag; flags begin with --")
    section = None
    for words in groups:
        option, _, value = words[0].partition("=")
        if option != "--step":
            yield section, words
            continue
        values = [value] * bool(value) + words[1:]
        if len(values) != 1 or values[0] not in map(str, parsers):
            raise UserError(f"--step {' '.join(values)}: name one step of {', '.join(map(str, parsers))}; the flags "
                            "after it are for that step alone")
        section = int(values[0])


def _data(first: argparse.Namespace, parser: Parser) -> DataConfig:
    """Which images step 1 will work on."""
    dataset = first.dataset or parser.flags["dataset"]
    return DataConfig.of({**vars(first), "dataset": dataset, "download": bool(first.download),
                          "data_root": first.data_root or parser.datasets[dataset]["data_root"],
                          "difficult": True if first.difficult is None else first.difficult})


def _adopted(path: str) -> dict[str, object]:
    """What a plan needs to know of the classifier that is taken instead of training one."""
    from models.weights import load_model
    from utils.checkpoint import is_checkpoint
    payload = load_model(path, steps=("stage1",))
    record = payload["networks"]["classifier"]
    return {"ours": is_checkpoint(payload), "backbone": record["backbone"],
            "method": (record.get("seed") or {"name": "cam"})["name"]}
