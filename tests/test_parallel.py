"""map_parallel: order, bounded look-ahead, and one readable line when a worker fails, is killed or is interrupted."""
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest

from utils import log
from utils.errors import UserError
from utils.parallel import IN_FLIGHT, ONE_THREAD, in_threads, item_name, map_parallel

ROOT = Path(__file__).resolve().parent.parent
posix = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")


class Demanding(Exception):
    """Pickles, but does not unpickle: its constructor wants two arguments."""

    def __init__(self, code, detail):
        super().__init__(f"{code} {detail}")


def own_id(item):
    return os.getpid()


def slow_first(item):
    time.sleep(0.3 if item == 0 else 0)
    return item * item, os.getpid()


def fail_on_three(item):
    if item == 3:
        raise Demanding(3, "is wrong")
    return item


def fail_on_pair(item):
    raise FileNotFoundError(f"no CAM for {item[0]}")


def refuse(item):
    raise UserError("no CAM here; run: python run_train.py --stage 1")


def die_on_three(item):
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def make_a_lock(item):
    return threading.Lock()


def large(item):
    return os.urandom(2_000_000)


def loaded_torch(item):
    return "torch" in sys.modules


def blocked_signals(item):
    """The signals that reach this process later, as a mask of bits; inherited from its parent, before any import."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^SigBlk:\s*(\w+)$", status, re.MULTILINE)[1], 16)


def birth_environment(item):
    """The environment the process was started with, before its first import."""
    entries = Path("/proc/self/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def shown_level(item):
    return log.worker_level()


def test_workers_print_what_log_level_says_and_no_more():
    log.set_level("error")
    try:
        found = list(map_parallel(shown_level, range(2), 2, "levels"))
    finally:
        log.set_level("info")
    assert found == ["error"] * 2, found


def test_results_come_in_order_from_several_processes():
    results = list(map_parallel(slow_first, range(8), 2, "squares"))
    pids = {pid for _, pid in results}
    assert [value for value, _ in results] == [n * n for n in range(8)], f"{results}"
    assert len(pids) == 2 and os.getpid() not in pids, f"{len(pids)} processes"


@pytest.mark.parametrize("workers, items", [(0, 5), (1, 5), (-1, 5), (4, 2), (4, 1), (4, 0)])
def test_few_workers_or_items_stay_in_this_process(workers, items):
    results = list(map_parallel(slow_first, range(items), workers, "squares"))
    expected = [(n * n, os.getpid()) for n in range(items)]
    assert results == expected, f"{workers} workers, {items} items: {results}"


@pytest.mark.parametrize("threads", [False, True])
def test_the_number_of_items_in_flight_is_bounded(threads):
    taken = []
    stream = map_parallel(slow_first, (taken.append(n) or n for n in range(50)), 2, "squares", threads)
    for read in range(1, 4):
        next(stream)
        assert len(taken) <= IN_FLIGHT * 2 + read, f"{len(taken)} items taken after {read} were read"
    stream.close()


def test_threads_keep_the_order_stay_in_this_process_and_leave_torchs_threads_as_they_were():
    import torch
    results = list(map_parallel(slow_first, range(8), 2, "squares", threads=True))
    assert results == [(n * n, os.getpid()) for n in range(8)], results
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen = list(map_parallel(lambda item: (torch.get_num_threads(), threading.get_ident()), range(9), 2, "x", True))
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert {count for count, _ in seen} == {1} and threading.get_ident() not in {ident for _, ident in seen}, seen
    assert after == 3, f"{after} threads, 3 before"


def test_dropping_the_iterator_ends_the_threads():
    before = threading.active_count()
    stream = map_parallel(slow_first, iter(range(10**6)), 2, "squares", threads=True)
    next(stream)
    stream.close()
    assert threading.active_count() <= before + 1, threading.enumerate()  # 1: tqdm's monitor


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_names_the_item_and_the_cause(workers, threads):
    stream = map_parallel(fail_on_three, range(6), workers, "dense CRF", threads)
    assert [next(stream) for _ in range(3)] == [0, 1, 2], f"{workers} workers"
    with pytest.raises(RuntimeError, match="^dense CRF: 3: Demanding: 3 is wrong$") as caught:
        next(stream)
    assert not isinstance(caught.value, UserError), "a defect of the program must keep its traceback"
    told = "".join(traceback.format_exception(caught.value))
    assert "in fail_on_three" in told, f"where it failed is not told:\n{told}"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tuple_is_named_by_its_first_entry(workers):
    items = [("2007_000032", n) for n in range(3)]
    with pytest.raises(RuntimeError, match="^masks: 2007_000032: no CAM for 2007_000032$"):
        list(map_parallel(fail_on_pair, items, workers, "masks"))


def test_what_a_user_can_mend_stays_a_user_error():
    with pytest.raises(UserError, match="^masks: Abyssinian_1: no CAM here; run: python run_train.py --stage 1$"):
        list(map_parallel(refuse, ["Abyssinian_1"], 1, "masks"))


@pytest.mark.parametrize("item, name", [("a", "a"), (7, "7"), (("a", 1), "a"), ((), "()"), (Path("b"), "b")])
def test_item_names(item, name):
    assert item_name(item) == name, f"{item!r} is named {item_name(item)}"


def test_a_killed_worker_is_one_clear_line():
    with pytest.raises(RuntimeError, match=r"fewer --workers \(now 2\), or with more memory") as caught:
        list(map_parallel(die_on_three, range(12), 2, "dense CRF"))
    message = str(caught.value)
    assert isinstance(caught.value, UserError) and "\n" not in message and message.startswith("dense CRF: "), message


def test_what_cannot_be_sent_back_names_the_item():
    with pytest.raises(RuntimeError, match="^masks: 0: .*pickle"):
        list(map_parallel(make_a_lock, range(6), 2, "masks"))


@posix
def test_workers_are_born_with_one_thread_each_and_the_parent_is_unchanged(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    found = next(map_parallel(birth_environment, range(3), 2, "environment"))
    limits = {name: found.get(name) for name in ONE_THREAD}
    assert limits == ONE_THREAD and "OMP_NUM_THREADS" in limits, f"{limits}"
    assert os.environ["OMP_NUM_THREADS"] == "7" and "MKL_NUM_THREADS" not in os.environ, "the parent kept a limit"


@posix
def test_workers_are_born_with_ctrl_c_blocked_and_the_parent_is_not():
    found = next(map_parallel(blocked_signals, range(3), 2, "signals"))
    assert found & 1 << (signal.SIGINT - 1), f"mask {found:b}: an interrupted import would print a traceback"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ()), "Ctrl-C no longer reaches the parent"


def test_workers_do_not_load_torch():
    found = list(map_parallel(loaded_torch, range(4), 2, "imports"))
    assert not any(found), f"torch was imported: {found}"


SCRIPT = """
import os, sys, time
sys.path.insert(0, {root!r})
from utils.runtime import run_main
from utils.parallel import map_parallel

def wait(item):
    os.write(1, b"working %d\\n" % os.getpid())  # in one piece: both workers write to the same pipe
    time.sleep(60)

def main():
    list(map_parallel(wait, range(8), 2, "waiting"))

if __name__ == "__main__":
    run_main(main)
"""


def heed_ctrl_c():
    """Undo what a shell does to jobs it starts in the background, the tests perhaps among them: they ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start_waiting(folder):
    """Start a script of its own process group whose two workers sleep; return it and their process ids."""
    script = folder / "waiting.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=heed_ctrl_c)
    return process, [int(process.stdout.readline().split()[1]) for _ in range(2)]


def gone(pids, seconds):
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@posix
def test_ctrl_c_stops_at_once_without_tracebacks(tmp_path):
    process, pids = start_waiting(tmp_path)
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: parent and workers alike
    _, errors = process.communicate(timeout=30)
    seconds = time.monotonic() - start
    assert process.returncode == 130 and seconds < 10, f"status {process.returncode} after {seconds:.1f} s"
    assert "Traceback" not in errors, errors
    assert gone(pids, 5), f"workers {pids} are still there"


@posix
def test_workers_end_with_a_killed_parent(tmp_path):
    process, pids = start_waiting(tmp_path)
    process.kill()
    process.wait()
    process.stdout.close(), process.stderr.close()
    assert gone(pids, 10), f"workers {pids} outlived their parent"


@posix
def test_a_dropped_iterator_leaves_no_process_and_no_thread_behind():
    before = set(threading.enumerate())
    results = map_parallel(own_id, range(50), 2, "dropped")
    pid = next(results)
    results.close()
    left = [thread for thread in set(threading.enumerate()) - before if "Monitor" not in type(thread).__name__]
    assert not left, f"still running: {left}"  # tqdm keeps a monitor
    assert not Path(f"/proc/{pid}").exists() and not multiprocessing.active_children(), f"{pid} is still there"


@pytest.mark.parametrize("size", [10, 2_000_000])
def test_dropping_the_iterator_does_not_hang_in_the_midst_of_large_items_and_results(size):
    # Beyond what a pipe holds, 64 KB, somebody is in the midst of writing it when the worker is killed.
    for _ in range(3):
        results = map_parallel(large, [os.urandom(size) for _ in range(12)], 2, "large")
        next(results)
        closing = threading.Thread(target=results.close, daemon=True)
        closing.start()
        closing.join(30)
        assert not closing.is_alive() and not multiprocessing.active_children(), f"items of {size} bytes: it hangs"


def test_dropping_one_of_two_iterators_leaves_the_other():
    first = map_parallel(slow_first, range(12), 2, "first")
    found = [next(first)]
    second = map_parallel(slow_first, range(12), 2, "second")
    next(second)
    second.close()
    found += first
    assert [value for value, _ in found] == [n * n for n in range(12)], found


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_share_torch_keep_the_order_and_run_little_ahead(threads):
    import torch
    before, taken = torch.get_num_threads(), []
    torch.set_num_threads(4)
    try:
        found = in_threads(lambda item: (item, torch.get_num_threads(), threading.get_ident()),
                           (taken.append(n) or n for n in range(20)), threads)
        first = next(found)
        ahead, results = len(taken), [first, *found]
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert [item for item, _, _ in results] == list(range(20)) and after == 4, results
    assert {count for _, count, _ in results} == {4 // threads}, results
    assert ahead <= threads + 1 and (threading.get_ident() in {ident for _, _, ident in results}) == (threads == 1)


def test_fewer_items_than_threads_have_all_of_torchs_threads_one_after_the_other():
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = list(in_threads(lambda item: (torch.get_num_threads(), threading.get_ident()), range(2), 3))
    finally:
        torch.set_num_threads(before)
    assert found == [(4, threading.get_ident())] * 2, found
