"""A whole run: which flags go where, what is skipped, resumed and refused, and how it stops."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from script_runs import MACHINE, ROOT, chain, copy, finish, mask_picture, read_json, start
from trees import make_folder, make_voc

from data.make_toy import make_toy
from utils.config import DataConfig
from utils.datasets import open_dataset
from utils.errors import UserError
from utils.files import write_json
from utils.store import Folder
from workflow import whole_run
from workflow.plan import make_plan
from workflow.steps import STEPS
from workflow.whole_run import RECORD, StepFailed, run_plan, score_rows, summary

CAM = ("--pretrained", "none")  # whose seed is the plain CAM, which is walked


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn") / "toy"
    make_toy(root, train=6, test=3, classes=3, size=48)
    return root


@pytest.fixture
def toy(drawn, tmp_path):
    """The root of a toy dataset of Pet's layout."""
    return copy(drawn, tmp_path / "toy")


def planned(root, *flags, **how):
    return make_plan(["--data_root", str(root), *map(str, flags)], str(root.parent / "run"), **how)


def steps_with(plan, *words):
    """The steps whose command holds the words, one after the other."""
    return [command.step for command in plan.commands
            if any(command.argv[i:i + len(words)] == words for i in range(len(command.argv)))]


# --- flags -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words, steps", [
    (("--batch_size", 3), ("--batch_size", "3"), [1, 2, 5]), (("--batch_size=3",), ("--batch_size=3",), [1, 2, 5]),
    (("--scales", 1, 2), ("--scales", "1", "2"), [1, 3, 4, 6]), (("--radius", 4), ("--radius", "4"), [2, 3, 4]),
    (("--no-crf",), ("--no-crf",), [3, 4, 6]), (("--limit", 2), ("--limit", "2"), [1, 2, 3, 4, 5, 6]),
    (("--split", "trainval"), ("--split", "trainval"), [1, 2, 3, 4, 5]), (("--labels", "gt"), ("--labels", "gt"),
                                                                         [1, 3, 4]),
    (("--step", 6, "--split", "test"), ("--split", "test"), [6]), ((), ("--pretrained", "none"), [1, 5]),
    (("--step", 5, "--epochs", 9, "--step", 2, "--epochs", 7), ("--epochs", "9"), [5]),
    (("--save_overlays",), ("--save_overlays",), [3, 6])])
def test_a_flag_goes_to_every_step_that_knows_it_or_to_the_one_it_is_meant_for(toy, flags, words, steps):
    found = steps_with(planned(toy, *CAM, *flags), *words)
    assert found == steps, f"{words} in steps {found}, expected {steps}"


def test_the_flags_of_one_step_come_after_those_of_all(toy):
    plan = planned(toy, *CAM, "--step", 2, "--epochs", 7, "--step", 5, "--epochs", 9, "--lr", 0.5)
    assert [command.options.get("epochs") for command in plan.commands] == [None, 7, None, None, 9, None]
    plan = make_plan(["--step", "1", "--epochs", "2", *CAM, "--data_root", str(toy)], until=1)
    assert plan.commands[0].options["epochs"] == 2 and plan.folder.as_posix() == "output/run_pet", plan


@pytest.mark.parametrize("flags, words", [
    (("--epoch", 3), "no step of this run knows --epoch; docs/flags.md"), (("3",), None),
    (("--step", 3, "--epochs", 3), "step 3 does not know --epochs; those that do: 1, 2, 5"),
    (("--lr", "fast"), "step 1: argument --lr: invalid number value: 'fast'"),
    (("--step", 5, "--lr", -1), "step 5: argument --lr: -1 is out of range"), (("--lr",), "step 1: argument --lr"),
    (("--cam_dir", "x"), "--cam_dir is set by the whole run; name the folder of all results with --output_dir"),
    (("--step", 5, "--mask_dir", "gt"), "--mask_dir is set by the whole run"), (("--resume",), "goes on by itself"),
    (("--step", 3, "--model_path", "x"), "--model_path of step 3 is set by the whole run"),
    (("--step", 7, "--lr", 1), "--step 7: name one step of 1, 2, 3, 4, 5, 6"), (("--step", "--lr", 1), "name one step"),
    (("--stage", 2), "steps go by --step N"), (("--split", "nowhere"), "nowhere")])
def test_a_flag_that_cannot_be_meant_is_refused_before_any_work(toy, flags, words):
    if words is None:
        with pytest.raises(UserError, match="3 stands before any flag"):
            make_plan(["3"])
        return
    with pytest.raises(UserError) as caught:
        planned(toy, *CAM, *flags)
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


@pytest.mark.parametrize("flags, walk, steps", [
    (CAM, None, [1, 2, 3, 4, 5, 6]), (("--method", "mixture"), None, [1, 3, 4, 5, 6]), ((), None, [1, 3, 4, 5, 6]),
    (("--method", "common"), None, [1, 2, 3, 4, 5, 6]), (("--method", "mixture"), True, [1, 2, 3, 4, 5, 6]),
    (CAM, False, [1, 3, 4, 5, 6]), (("--backbone", "resnet38"), None, [1, 2, 3, 4, 5, 6])])
def test_the_walk_is_left_out_where_the_seed_is_the_mixtures(toy, flags, walk, steps):
    plan = planned(toy, *flags, walk=walk)
    assert [command.step for command in plan.commands] == steps
    maker = plan.folder / ("stage2" if 2 in steps else "stage1") / "model_best.pth.tar"
    assert steps_with(plan, "--model_path", str(maker)) == [3, 4], [command.argv for command in plan.commands]


@pytest.mark.parametrize("flags, backbone, pretrained", [
    (("--method", "cam"), "resnet50", "stage1"), (("--method", "cam", "--backbone", "resnet18"), "resnet18", "stage1"),
    (("--method", "cam", "--step", 5, "--backbone", "resnet38"), "resnet38", None),
    (("--method", "cam", "--pretrained", "imagenet"), "resnet50", "imagenet")])
def test_deeplab_starts_from_the_network_of_step_1_unless_flags_say_otherwise(toy, flags, backbone, pretrained):
    plan = planned(toy, *flags)
    found = plan.commands[4].options
    start = str(plan.folder / "stage1" / "model_best.pth.tar") if pretrained == "stage1" else pretrained
    assert (found["backbone"], found.get("pretrained")) == (backbone, start), found


def test_what_a_late_step_would_refuse_is_refused_before_the_first(toy, tmp_path):
    make_voc(tmp_path / "voc")
    for root, flags, words in (
            (toy, (*CAM, "--submission", "x.tgz"), "--submission is for the VOC server's splits"),
            (tmp_path / "voc", ("--dataset", "voc", *CAM, "--submission", "x.zip"), "server takes a compressed tar"),
            (toy, ("--method", "mixture", "--save_walk"), "pass --walk, or leave --save_walk out")):
        with pytest.raises(UserError, match=words):
            planned(root, *flags)
    planned(toy, "--method", "mixture", "--save_walk", walk=True)
    (toy.parent / "run").write_text("a file")
    with pytest.raises(UserError, match="--output_dir .*run is a file, not a folder; name another"):
        planned(toy, *CAM)


def test_scores_need_ground_truth_and_are_of_vocs_train_split(tmp_path):
    make_folder(tmp_path / "own")
    shutil.rmtree(tmp_path / "own/masks", ignore_errors=True)
    plan = planned(tmp_path / "own", "--dataset", "folder", *CAM)
    assert set(plan.left_out) == {4} and "no ground truth" in plan.left_out[4], plan.left_out
    make_voc(tmp_path / "voc")
    flags = ("--dataset", "voc", *CAM)
    assert steps_with(planned(tmp_path / "voc", *flags), "--split", "train") == [4]
    assert steps_with(planned(tmp_path / "voc", *flags, "--split", "val"), "--split", "val") == [1, 2, 3, 4, 5]


# --- running ---------------------------------------------------------------------------------------------------------

class Fake:
    """Steps that only write the files a plan asks for.  fails: {step: exit status}; asked: [(step, its last flags)]."""

    def __init__(self, head_only=False):
        self.asked, self.fails, self.head_only = [], {}, head_only

    def __call__(self, argv):
        step = next(number for number, one in STEPS.items() if tuple(argv[:len(one.script)]) == one.script)
        args = STEPS[step].parser().parse_args(argv[1:])
        self.asked.append((step, [word for word in argv if word in ("--resume", "--overwrite")]))
        out = whole_run.Path(args.output_dir)
        if step in (1, 2, 5):
            for name in ("model_best.pth.tar", *(() if self.head_only else ("checkpoint.pth.tar",))):
                out.mkdir(parents=True, exist_ok=True)
                (out / name).write_text("weights")
        if step in self.fails:
            return self.fails[step]
        split = "test" if step == 6 else None
        options = {"dataset": args.dataset or "pet", "data_root": args.data_root, "split": args.split or split}
        folders = {1: (args.__dict__.get("cam_dir"), "cam", ".npz"), 3: (out, "mask", ".png"),
                   6: (out / "masks", "mask", ".png")}
        if step in folders:
            path, kind, suffix = folders[step]
            folder = Folder(path, kind, suffix, {"made": vars(args).get("bg_alpha")}, labels=step == 1, overwrite=True)
            dataset = open_dataset(DataConfig(**options))
            folder.begin(dataset)
            folder.finish(dataset, {"options": options})
        if step in (4, 6):
            entry = {"fixed": {"miou": 0.5, "fg_iou": 0.25, "image_fg_iou": None}}
            write_json(out / "scores.json", {"split": "val", "labels": "gt", "scores": {f"of {step}": entry}})
        return 0

    def steps(self):
        """The steps asked for since the last call."""
        asked, self.asked = [step for step, _ in self.asked], []
        return asked


def test_what_is_done_is_skipped_and_a_lost_result_made_again_with_what_follows_from_it(toy):
    plan, fake = planned(toy, *CAM), Fake()
    first = run_plan(plan, fake)
    assert fake.steps() == [1, 2, 3, 4, 5, 6] and all(isinstance(spent, float) for spent in first.values()), first
    assert set(run_plan(plan, fake).values()) == {None} and fake.steps() == []
    run_plan(planned(toy, *CAM, "--workers", 3, "--device", "cpu"), fake)
    assert fake.steps() == [], "flags that change nothing of the results"
    (plan.folder / "inference" / "manifest.json").unlink()
    run_plan(plan, fake)
    assert fake.steps() == [3, 5, 6]
    run_plan(planned(toy, *CAM, "--step", 4, "--bg_alpha", 3), fake)
    assert fake.steps() == [4]
    text = summary(plan, first)
    assert "of 4          val         gt           0.500   0.250          -" in text, text
    assert text.splitlines()[0] == "step 1  classifier and CAMs   0 s" and "\ntotal " in text, text


def test_changed_images_are_not_skipped(toy):
    plan, fake = planned(toy, *CAM), Fake()
    run_plan(plan, fake)
    fake.asked.clear()
    name = next(iter((toy / "annotations/test.txt").read_text().split()))
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(toy / "images" / f"{name}.jpg")
    run_plan(plan, fake)
    assert fake.steps() == [6], "an image of the test split"
    lines = (toy / "annotations/trainval.txt").read_text().splitlines()
    (toy / "annotations/trainval.txt").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(UserError, match="was trained on other masks"):
        run_plan(plan, fake)
    assert fake.steps() == [1, 2, 3, 4], "fewer images to train on"


def test_edited_ground_truth_is_scored_again(toy):
    plan, fake = planned(toy, *CAM), Fake()
    run_plan(plan, fake)
    fake.asked.clear()
    for name, step in (("trainval", 4), ("test", 6)):
        image_id = (toy / f"annotations/{name}.txt").read_text().split()[0]
        mask_picture(toy / "annotations/trimaps" / f"{image_id}.png", np.full((48, 48), 2))
        run_plan(plan, fake)
        assert fake.steps() == [step], f"a trimap of {name}"
        run_plan(plan, fake)
        assert fake.steps() == []


def test_a_file_of_weights_that_was_replaced_is_not_taken_for_the_one_before(toy):
    weights = toy.parent / "weights.pth"
    weights.write_text("some")
    flags = ("--method", "mixture", "--step", 1, "--pretrained", weights)
    fake = Fake(head_only=True)
    run_plan(planned(toy, *flags, until=3), fake)
    fake.asked.clear()
    weights.write_text("others")
    run_plan(planned(toy, *flags, until=3), fake)
    assert fake.steps() == [1, 3]
    fake.head_only, flags = False, ("--method", "cam", "--step", 1, "--pretrained", weights)
    run_plan(planned(toy, *flags, "--overwrite", until=1), fake)
    weights.write_text("yet others")
    with pytest.raises(UserError, match="stage1 was trained from another file than .*weights.pth is now; pass --over"):
        run_plan(planned(toy, *flags, "--no-overwrite", until=1), fake)


def test_a_record_without_stamps_of_files_is_believed(toy):
    plan, fake = planned(toy, *CAM, until=4), Fake()
    run_plan(plan, fake)
    fake.asked.clear()
    steps = read_json(plan.folder / RECORD)["steps"]
    write_json(plan.folder / RECORD, {"steps": {step: {key: value for key, value in entry.items()
                                                       if key not in ("files", "truth")}
                                                for step, entry in steps.items()}})
    run_plan(plan, fake)
    assert fake.steps() == []


def test_a_failing_step_ends_the_run_and_the_same_plan_goes_on_from_there(toy):
    plan, fake = planned(toy, *CAM), Fake()
    fake.fails = {2: 130}
    with pytest.raises(StepFailed, match=r"step 2 \(AffinityNet\) was stopped by signal 2; the same command") as caught:
        run_plan(plan, fake)
    assert caught.value.status == 130 and fake.steps() == [1, 2]
    fake.fails = {3: 1}
    with pytest.raises(StepFailed, match=r"step 3 \(masks\) ended with status 1; mend what it says above, and the"):
        run_plan(plan, fake)
    assert fake.asked == [(2, ["--resume"]), (3, [])], fake.asked
    fake.asked, fake.fails = [], {}
    run_plan(plan, fake)
    assert fake.steps() == [3, 4, 5, 6]


def test_a_head_that_was_stopped_while_it_was_fitted_is_resumed_for_the_same_flags_alone(toy):
    plan, fake = planned(toy, "--method", "mixture"), Fake(head_only=True)
    fake.fails = {1: 137}
    with pytest.raises(StepFailed):
        run_plan(plan, fake)
    with pytest.raises(StepFailed):
        run_plan(planned(toy, "--method", "mixture", "--seed", 1), fake)
    fake.fails = {}
    with pytest.raises(StepFailed):
        fake.fails = {1: 1}
        run_plan(planned(toy, "--method", "mixture", "--seed", 1), fake)
    assert fake.asked == [(1, []), (1, []), (1, ["--resume"])], fake.asked


def test_a_finished_deeplab_is_refused_for_other_masks_which_resuming_would_not_notice(toy):
    fake = Fake()
    run_plan(planned(toy, *CAM), fake)
    with pytest.raises(UserError, match="was trained on other masks than there are now in .*inference; pass --over"):
        run_plan(planned(toy, *CAM, "--step", 3, "--bg_alpha", 3), fake)
    fake.asked.clear()
    run_plan(planned(toy, *CAM, "--step", 3, "--bg_alpha", 3, "--step", 5, "--overwrite"), fake)
    assert fake.asked == [(step, ["--overwrite"] if step == 5 else []) for step in range(1, 7)], fake.asked


def test_the_record_names_each_steps_command_flags_and_seconds(toy):
    plan = planned(toy, *CAM, "--limit", 4, until=2)
    run_plan(plan, Fake())
    steps = read_json(plan.folder / RECORD)["steps"]
    assert set(steps) == {"1", "2"} and steps["2"]["state"] == "done" and steps["2"]["seconds"] >= 0, steps
    assert steps["1"]["command"] == list(plan.commands[0].argv) and steps["1"]["flags"]["limit"] == 4, steps["1"]


@pytest.mark.parametrize("content", [[], {}, {"steps": []}, {"steps": {"1": {}}}, {"steps": {"1": "done"}}])
def test_a_record_of_another_program_is_refused_with_the_remedy(toy, content):
    plan = planned(toy, *CAM, until=2)
    write_json(plan.folder / RECORD, content)
    with pytest.raises(UserError, match=f"{RECORD} .*delete it, and .* with it, to start anew"):
        run_plan(plan, Fake())


@pytest.mark.parametrize("content", [[], {}, {"split": "val", "labels": "gt", "scores": {"of 4": {}}}])
def test_scores_of_another_program_are_refused_with_the_remedy(tmp_path, content):
    write_json(tmp_path / "scores.json", content)
    with pytest.raises(UserError, match="scores.json .*; delete it and run again"):
        score_rows(tmp_path)


# --- the command -----------------------------------------------------------------------------------------------------

def test_a_dry_run_prints_the_commands_and_writes_nothing(toy, capsys, monkeypatch):
    monkeypatch.chdir(toy.parent)
    assert whole_run.main(["--data_root", "toy", "--method", "mixture", "--limit", "4", "--dry_run"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) == 5 and lines[0].startswith("python ") and "run_train.py --stage 1 " in lines[0], said.out
    assert "step 2 is left out: the seed of the mixture" in said.err and not (toy.parent / "output").exists(), said.err


CHILD = "import sys, time; print('started', flush=True); time.sleep(30)"
PARENT = f"import sys; from workflow.whole_run import run_script; sys.exit(run_script(('-c', {CHILD!r})))"


@pytest.mark.parametrize("number, everyone", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_ends_the_step_and_its_status_is_the_runs(number, everyone):
    """Ctrl-C reaches the whole process group; SIGTERM the run alone, which passes it on."""
    process = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.DEVNULL, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while "started" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.2)  # for the child's handler, or its default, to be what it stays
    (os.killpg if everyone else os.kill)(process.pid, number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number, f"status {process.returncode}"


# --- the real steps --------------------------------------------------------------------------------------------------

@chain
def whole(folder, get):
    """Whole runs of the real scripts: of the first four steps, of all, and of all again."""
    make_toy(folder / "toy", train=8, test=3, classes=3, size=48)
    flags = ["--data_root", str(folder / "toy"), "--backbone", "resnet18", *CAM, *MACHINE, "--crop_size", "65",
             "--epochs", "1", "--batch_size", "4", "--scales", "1"]
    runs = []

    def run(argv):
        runs.append(finish(start(folder, *argv)))
        return runs[-1].returncode
    plans = [make_plan(flags, str(folder / "run"), until=until) for until in (4, 6, 6)]
    return SimpleNamespace(runs=runs, plan=plans[-1], seconds=[run_plan(plan, run) for plan in plans])


def test_the_real_steps_take_their_flags_and_are_skipped_once_they_are_done(whole):
    assert all(done.returncode == 0 for done in whole.runs), [done.stderr[-500:] for done in whole.runs]
    done = [[step for step, spent in seconds.items() if spent is not None] for seconds in whole.seconds]
    assert done == [[1, 2, 3, 4], [5, 6], []], f"steps of each run: {done}"
    text = summary(whole.plan, whole.seconds[1])
    for name in ("walk", "mask", "+ CRF"):
        assert re.search(rf"^{re.escape(name)} .* 0\.\d{{3}} ", text, re.MULTILINE), f"no scores of {name}: {text}"
    assert "step 4  scores of the masks   done before" in text, text
