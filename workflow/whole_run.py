"""A whole run: the six steps one after the other, as their own scripts; done ones are skipped, stopped ones go on.

    python -m workflow.whole_run --dataset voc --data_root data/VOCdevkit/VOC2012 --seed 1 --step 5 --epochs 30

Takes the flags of all steps (docs/flags.md) and passes each to every step that knows it; flags after --step N are for
step N alone. --split, --ids and --labels say how masks are made, so that without --step 6 they leave the test alone;
--pretrained is for steps 1 and 5, which start from such weights. DeepLab takes the backbone of step 1 and starts from
its weights, unless flags say otherwise. Reads what the steps read; writes all their folders, and whole_run.json, below
--output_dir. The same command goes on after Ctrl-C, SIGTERM or a failure.
"""
import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from utils.config import DataConfig
from utils.datasets import open_dataset
from utils.errors import UserError
from utils.files import check_record, file_stamp, read_record, short_hash, write_json
from utils.log import duration
from utils.options import RESUME_FREE
from utils.runtime import run_main
from utils.store import BEST, MANIFEST, NEWEST, check_data, load_manifest
from workflow.plan import Command, Plan, make_plan
from workflow.steps import STEPS

ROOT = Path(__file__).resolve().parents[1]
RECORD = "whole_run.json"
TRAININGS = (1, 2, 5)
SCORES = ("miou", "fg_iou", "image_fg_iou")
Runner = Callable[[Sequence[str]], int]  # (script, flag, ...) -> exit status
Sources = Mapping[str, object]


class StepFailed(UserError):
    """A step ended with another status than 0; `status` is it."""

    def __init__(self, step: int, status: int):
        ended = f"was stopped by signal {status - 128};" if status > 128 else \
            f"ended with status {status}; mend what it says above, and"
        super().__init__(f"step {step} ({STEPS[step].title}) {ended} the same command goes on from there")
        self.status = status


# --- one script ------------------------------------------------------------------------------------------------------

def run_script(argv: Sequence[str]) -> int:
    """Run a script of the project in the working directory.  Returns its exit status, 128 + the signal's number if it
    was stopped by one.

    Ctrl-C reaches the script by itself: it saves and ends, and this waits for it. SIGTERM is passed on to it.
    """
    print(f"\n$ {told(argv)}", flush=True)
    stopped, process = [], None

    def note(number: int, _: object) -> None:
        stopped.append(number)
        if number == signal.SIGTERM and process is not None:
            process.terminate()
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process = subprocess.Popen([sys.executable, *_located(argv)])
        if signal.SIGTERM in stopped:  # before there was a process to pass it on to
            process.terminate()
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status < 0:
        return 128 - status
    return 128 + stopped[0] if stopped and status == 0 else status


def _located(argv: Sequence[str]) -> list[str]:
    """The command with the script's path; -m and others stay."""
    return [str(ROOT / argv[0]), *argv[1:]] if argv[0].endswith(".py") else list(argv)


def told(argv: Sequence[str]) -> str:
    """A command as a shell takes it."""
    words = _located(argv)
    if argv[0].endswith(".py"):
        words[0] = os.path.relpath(words[0])
    return shlex.join(["python", *words])


# --- the run ---------------------------------------------------------------------------------------------------------

def run_plan(plan: Plan, run: Runner = run_script) -> dict[int, float | None]:
    """Go through the steps of a plan.  Returns {step: seconds, None for one that was done before}.

    run: runs one command.  StepFailed at the first one that fails; what was done stays, and the same plan goes on.
    """
    record, seconds = _Record(plan.folder / RECORD), {}
    for command in plan.commands:
        fresh = seconds.get(command.after) is None  # what it reads is as it was
        sources = _sources(command, plan.folder)
        if not plan.overwrite and fresh and record.done(command, sources):
            seconds[command.step] = None
            continue
        argv = command.argv if plan.overwrite else (*command.argv, *record.continued(command, sources))
        record.note(command, sources, "started")
        started = time.monotonic()
        status = run(argv)
        if status:
            raise StepFailed(command.step, status)
        seconds[command.step] = round(time.monotonic() - started, 1)
        record.note(command, sources, "done", seconds[command.step])
    return seconds


class _Record:
    """whole_run.json: which steps were started and done, with which flags, from which masks and other files.

    sources: of a step, from `_sources`.
    """

    def __init__(self, path: Path):
        self.path = path
        remedy = f"delete it, and {path.parent} with it, to start anew"
        self.steps = read_record(path, remedy, {"steps": dict})["steps"] if path.is_file() else {}
        for step, entry in self.steps.items():
            if not isinstance(entry, dict) or not {"state", "flags", "masks"} <= entry.keys():
                raise UserError(f"{path} is damaged: step {step} has no state, flags and masks; {remedy}")

    def note(self, command: Command, sources: Sources, state: str, seconds: float | None = None) -> None:
        """Remember how far a step is."""
        entry = {"state": state, "flags": _flags(command), **sources, "command": list(command.argv)}
        self.steps[str(command.step)] = {**entry, **({} if seconds is None else {"seconds": seconds})}
        write_json(self.path, {"steps": self.steps})

    def done(self, command: Command, sources: Sources) -> bool:
        """Whether a step is done with the same flags, from the same data, and its results are there."""
        return (self._same(command, sources) and self.steps[str(command.step)]["state"] == "done"
                and all(path.is_file() for path in command.results)
                and all(_unchanged(path) for path in command.results if path.name == MANIFEST))

    def _same(self, command: Command, sources: Sources) -> bool:
        entry = self.steps.get(str(command.step), {})  # an older record names fewer sources
        return entry.get("flags") == _flags(command) and all(entry.get(name, now) == now
                                                             for name, now in sources.items())

    def continued(self, command: Command, sources: Sources) -> list[str]:
        """What a step that is not done needs besides its flags, to go on where it was stopped.

        UserError, with the remedy for a whole run, if a network was trained on other masks, or from another file of
        weights, than there are now.
        """
        entry = self.steps.get(str(command.step))
        if command.step not in TRAININGS or entry is None:
            return []
        if (command.out / NEWEST).is_file():
            if entry["masks"] != sources["masks"]:
                raise UserError(f"the DeepLab in {command.out} was trained on other masks than there are now in "
                                f"{command.options['mask_dir']}; pass --overwrite to make all anew, or delete that "
                                "folder of DeepLab")
            before = entry.get("files", sources["files"])
            if any(before.get(path, stamp) != stamp for path, stamp in sources["files"].items()):
                raise UserError(f"the network in {command.out} was trained from another file than "
                                f"{' and '.join(sources['files'])} is now; pass --overwrite to make all anew, or put "
                                "the file of before back")
            return ["--resume"]
        # A head that is fitted in one pass has no other state.
        return ["--resume"] * (self._same(command, sources) and entry["state"] == "started"
                               and (command.out / BEST).is_file())


def _sources(command: Command, folder: Path) -> Sources:
    """What a step is made from besides its flags and images: tells whether it is still the same.

    files: {path: size and time of change} of the checkpoints that flags name, but for those of the run itself, in
    `folder`, which change with their step.  truth: of the ground truth that the step scores with.
    """
    named = (command.options.get(flag) for flag in ("model_path", "pretrained"))
    files = {path: list(file_stamp(path)[1:]) for path in named if path and Path(path).is_file()
             and not Path(path).resolve().is_relative_to(folder.resolve())}
    truth = None if command.scored is None else open_dataset(command.scored).truth_stamp()
    return {"masks": _masks(command), "files": files, "truth": truth}


def _flags(command: Command) -> dict[str, object]:
    """The flags of a step that decide what it makes, as JSON reads them back.

    --data_root is one of them here: a step that runs compares the images, and one that is skipped does not.
    """
    free = {*RESUME_FREE} - {"data_root"}
    return json.loads(json.dumps({name: value for name, value in command.options.items() if name not in free}))


def _masks(command: Command) -> str | None:
    """A hash of what the masks that DeepLab learns from were made of; None for other steps."""
    path = Path(command.options.get("mask_dir") or "") / MANIFEST
    if command.step != 5 or not path.is_file():
        return None
    manifest = load_manifest(path.parent, f"delete {path.parent} and run step 3 again")
    return short_hash(json.dumps([manifest.get("identity"), manifest.get("stamps")], sort_keys=True).encode())


def _unchanged(path: Path) -> bool:
    """Whether the manifest of a finished folder names the images, and was made of the data, that there are now."""
    remedy = f"delete {path.parent} and run the step again"
    manifest = load_manifest(path.parent, remedy)
    if not manifest.get("complete"):
        return False
    check_record(manifest, path, remedy, {"options": dict, "images": list})
    dataset = open_dataset(DataConfig.of({**manifest["options"], "download": False}))
    if set(dataset.ids) != {*manifest["images"], *(entry["image"] for entry in manifest["failures"])}:
        return False
    try:
        check_data(dataset, manifest, path.parent)
    except UserError:
        return False
    return True


# --- what came out ---------------------------------------------------------------------------------------------------

def score_rows(folder: Path) -> list[tuple[str, str, str, list[float]]]:
    """(stage, split, labels, scores at the fixed threshold by SCORES) of a folder with scores.json."""
    path = folder / "scores.json"
    remedy = "delete it and run again"
    record = read_record(path, remedy, {"scores": dict})
    try:
        return [(name, record["split"], record["labels"], [entry["fixed"][score] for score in SCORES])
                for name, entry in record["scores"].items()]
    except (KeyError, TypeError):
        raise UserError(f"{path} is no record of this project, or damaged: without all scores; {remedy}") from None


def score_table(rows: Sequence[tuple[str, str, str, Sequence[float | None]]]) -> str:
    """A table of the rows of `score_rows`."""
    lines = [f"{'':<14}{'split':<12}{'labels':<11}{'mIoU':>7}{'fg IoU':>8}{'per image':>11}"]
    for name, split, labels, values in rows:
        numbers = ["-" if value is None else f"{value:.3f}" for value in values]
        lines.append(f"{name:<14}{split:<12}{labels:<11}{numbers[0]:>7}{numbers[1]:>8}{numbers[2]:>11}")
    return "\n".join(lines)


def summary(plan: Plan, seconds: Mapping[int, float | None]) -> str:
    """One line a step, the total, the scores and where they lie."""
    lines, steps = [], {command.step for command in plan.commands}
    for number in sorted({*steps, *plan.left_out}):
        if number in plan.left_out:
            spent = f"left out: {plan.left_out[number]}"
        else:
            spent = "done before" if seconds[number] is None else duration(seconds[number])
        lines.append(f"step {number}  {STEPS[number].title:<20}  {spent}")
    lines.append(f"total   {'':<20}  {duration(sum(filter(None, seconds.values())))}")
    scored = [command.out for command in plan.commands if (command.out / "scores.json").is_file()
              and command.step in (4, 6)]
    rows = [row for out in scored for row in score_rows(out)]
    if rows:
        lines += ["", score_table(rows), ""] + [f"scores, plots and panels: {out}" for out in scored]
    return "\n".join(lines)


# --- the command -----------------------------------------------------------------------------------------------------

def build_parser() -> argparse.ArgumentParser:
    """The parser of the flags that are the whole run's own."""
    parser = argparse.ArgumentParser(prog="python -m workflow.whole_run", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s [--output_dir DIR] [--walk | --no-walk] [--until N] [--dry_run] "
                                           "[flags of the steps] [--step N flags of step N] ...")
    parser.add_argument("--output_dir", metavar="DIR", help="folder of all results (default: output/run_<dataset>)")
    parser.add_argument("--walk", action=argparse.BooleanOptionalAction,
                        help="train AffinityNet (step 2) and walk along its affinities (default: unless the seed is "
                             "the mixture's, whose masks are better without)")
    parser.add_argument("--until", type=int, choices=tuple(STEPS), default=6,
                        help="the last step (default: %(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="check the flags, print the commands and stop "
                                                               "(default: off)")
    return parser


def main(argv: list[str] | None = None) -> int:
    own, flags = build_parser().parse_known_args(argv)
    plan = make_plan(flags, own.output_dir, own.walk, own.until)
    if own.dry_run:
        for number, reason in plan.left_out.items():
            print(f"step {number} is left out: {reason}", file=sys.stderr)
        print("\n".join(told(command.argv) for command in plan.commands))
        return 0
    try:
        seconds = run_plan(plan)
    except StepFailed as failed:
        print(f"Error: {failed}", file=sys.stderr)
        return failed.status
    print(f"\n{summary(plan, seconds)}")
    return 0


if __name__ == "__main__":
    run_main(main)
