"""What a run prints on stderr: by level, and its progress where stderr is a file."""
import io
import os
import re
import subprocess
import sys
import termios

import pytest
from script_runs import ROOT

import run_inference
from utils import log
from utils.errors import UserError
from utils.runtime import run_main


@pytest.fixture(autouse=True)
def level():
    yield
    log.set_level("info")


@pytest.mark.parametrize("flags, shown", [((), ["told", "warned"]), (("--log_level", "debug"), ["told", "warned"]),
                                          (("--log_level", "warning"), ["warned"]), (("--log_level", "error"), [])])
def test_a_level_holds_from_the_parsing_of_the_flags_on(capsys, flags, shown):
    run_inference.build_parser().parse_args(flags)
    log.say("told")
    log.warn("warned")
    assert list(log.progress(range(3), "bar")) == [0, 1, 2]
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if not line.startswith("bar: 3/3 images")]
    assert lines == shown and said.out == "" and ("bar" in said.err) == ("told" in shown), said.err


@pytest.mark.parametrize("level", log.LEVELS)
def test_an_error_is_one_line_at_every_level_and_debug_says_where_it_arose(capsys, level):
    def fail():
        log.set_level(level)
        raise UserError("no such thing; pass another")
    with pytest.raises(SystemExit) as ended:
        run_main(fail)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.endswith("Error: no such thing; pass another\n"), said
    assert ("Traceback" in said) == (level == "debug") and (said.count("\n") == 1) != (level == "debug"), said


def ticking(monkeypatch, seconds):
    """Let each look at the clock take so many seconds more."""
    now = iter(range(0, 10**6, seconds))
    monkeypatch.setattr(log.time, "monotonic", lambda: next(now))


def test_progress_in_a_file_is_whole_lines_with_count_rate_and_time_left(monkeypatch, capsys):
    ticking(monkeypatch, 12)
    bar = log.progress(iter("abcdefgh"), "masks", 8)
    for item in bar:
        bar.set_postfix_str(f"at {item}", refresh=False)
    lines = capsys.readouterr().err.split("\n")
    assert lines == ["masks: 3/8 images, 12.0 s each, 60 s left | at c",
                     "masks: 6/8 images, 12.0 s each, 24 s left | at f",
                     "masks: 8/8 images, 13.5 s each, 2 min | at h", ""], lines


@pytest.mark.parametrize("total, expected", [(None, "masks: 40 images, 20.0 images/s, 2 s"),
                                             (40, "masks: 40/40 images, 20.0 images/s, 2 s")])
def test_a_short_loop_is_one_line_and_an_empty_one_none(monkeypatch, capsys, total, expected):
    now = iter([0.0, *[1.0] * 40, 2.0])
    monkeypatch.setattr(log.time, "monotonic", lambda: next(now))
    assert list(log.progress(iter(range(40)), "masks", total)) == list(range(40))
    assert capsys.readouterr().err == f"{expected}\n"
    monkeypatch.undo()
    assert list(log.progress([], "masks")) == [] and capsys.readouterr().err == ""


def test_what_an_interrupted_loop_did_is_not_told_as_done(capsys):
    for item in log.progress([1, 2, 3], "masks"):
        if item == 2:
            break
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar_and_a_file_no_carriage_return():
    code = "from utils.log import progress; [None for _ in progress(range(3), 'masks')]"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert b"\r" not in done.stderr and re.fullmatch(rb"masks: 3/3 images, .*\n", done.stderr), done.stderr
    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, (24, 80))
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=writer, check=True)
    os.close(writer)
    assert b"masks: 100%|" in os.read(reader, 1 << 16)
    os.close(reader)


def test_an_unencodable_stream_takes_progress_lines(monkeypatch):
    """A C locale's stderr: nothing but ASCII is in them."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    assert len(list(log.progress(range(2), "masks"))) == 2
