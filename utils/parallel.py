"""One function over many items in several processes or threads, in order. No torch: every worker imports this file."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

from tqdm import tqdm

from utils.errors import UserError

IN_FLIGHT = 4  # items a worker may be ahead of the reader: enough to hide one slow item, few enough to hold in memory
MANAGER_SECONDS = 5  # the most to wait for a stopped pool's thread
THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class WorkError(UserError, RuntimeError):
    """A failure in a worker that a user can mend, told in one line."""


def map_parallel(function, items, workers, description, threads=False):
    """Apply a function to every item in worker processes, with a progress bar.

    function: a function of one item, importable by name (or a functools.partial of one); what it takes and returns is
    pickled. Workers import its module and the running script anew: keep heavy imports out of their top level.
    items: any iterable; a tuple is named in messages by its first entry, anything else by str().
    workers: processes. With 0 or 1, or with no more than two items, the work is done in this process.
    description: the bar's label and the start of every message.
    threads: work in threads of this process: for functions that spend their time in torch, whose operations let other
    threads run; a process of its own would take seconds, and a GPU's memory, to load it.
    Returns an iterator over the results in the items' order. At most 4 items a worker are held at a time. Workers
    compute on one thread each. Ctrl-C, or dropping the iterator, stops them.
    Raises RuntimeError naming the item if the function fails on it, or if the system ends a worker. What a user can
    mend (a UserError or OSError in the function, an ended worker) is a WorkError, which the scripts print as one line.
    """
    total = len(items) if hasattr(items, "__len__") else None
    iterator = iter(items)
    head = list(itertools.islice(iterator, 3))
    call = partial(_named_call, function, description)
    everything = itertools.chain(head, iterator)
    if workers <= 1 or len(head) < 3:
        return _with_bar((call(item) for item in everything), total, description)
    pooled = _threaded(call, everything, workers) if threads else _pooled(call, everything, workers, description)
    return _with_bar(pooled, total, description)


def item_name(item):
    """Name an item in a message: the first entry of a tuple, str() of anything else."""
    return str(item[0] if isinstance(item, tuple) and item else item)


def _with_bar(results, total, description):
    # A log file gets a line each half minute, not ten a second.
    pause = 0.1 if sys.stderr.isatty() else 30
    bar = tqdm(total=total, desc=description, unit="image", mininterval=pause)
    with contextlib.closing(results), bar:
        for result in results:
            bar.update()
            yield result


def _named_call(function, description, item):
    # Wrapped in the worker, so that only exceptions of one argument, which always unpickle, cross to the parent.
    try:
        return function(item)
    except (UserError, OSError) as error:
        raise WorkError(f"{description}: {item_name(item)}: {error}") from error
    except Exception as error:
        raise RuntimeError(f"{description}: {item_name(item)}: {type(error).__name__}: {error}") from error


def _pooled(call, items, workers, description):
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    waiting = deque()  # (item name, future), oldest first
    try:
        for item in items:
            with _spawning():
                waiting.append((item_name(item), pool.submit(call, item)))
            if len(waiting) >= IN_FLIGHT * workers:
                yield waiting[0][1].result()
                waiting.popleft()
        while waiting:
            yield waiting[0][1].result()
            waiting.popleft()
        pool.shutdown()
    except BrokenProcessPool:
        raise WorkError(_killed_message(description, waiting, workers)) from None
    finally:
        _stop(pool)


def _threaded(call, items, workers):
    import torch
    count = torch.get_num_threads()
    torch.set_num_threads(1)  # what threads started from now on compute with
    pool, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) >= IN_FLIGHT * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(count)


def _killed_message(description, waiting, workers):
    near = f" at or after {waiting[0][0]}" if waiting else ""
    return (
        f"{description}: the system ended a worker process{near}, most often because memory ran out; "
        f"run again with fewer --workers (now {workers}), or with more memory"
    )


@contextlib.contextmanager
def _spawning():
    """Let the processes started inside inherit one thread each and a blocked Ctrl-C, both from their very first import.

    An initializer comes too late for either: by then the worker has imported the script, and numpy or torch with it.
    """
    saved = {name: os.environ.get(name) for name in THREAD_LIMITS}
    block = getattr(signal, "pthread_sigmask", None)  # not on Windows
    mask = block(signal.SIG_BLOCK, {signal.SIGINT}) if block else None
    os.environ.update(dict.fromkeys(THREAD_LIMITS, "1"))
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if block:
            block(signal.SIG_SETMASK, mask)


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    # A pool's worker would wait for work for ever if its parent were killed.
    multiprocessing.parent_process().join()
    os._exit(1)


def _stop(pool):
    # Stopped here only if the work is not finished. The processes are public only since Python 3.14, the thread never.
    running, manager = list((pool._processes or {}).values()), pool._executor_manager_thread
    pool.shutdown(wait=False, cancel_futures=True)
    for process in running:
        process.terminate()
    # The thread closes its pipe when it sees its workers end; a program that ends meanwhile writes to a closed pipe.
    if manager is not None:
        manager.join(MANAGER_SECONDS)
