"""One function over many items in several processes or threads, in order. No torch: every worker imports this file.

Each process is lent to one thread at a time, over a pipe of its own. It can be killed at any moment, by the system too,
without a queue that others read from being left in a broken state, as in the pools of concurrent.futures and joblib.
"""
import contextlib
import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import TypeVar

from utils.errors import UserError
from utils.log import progress, set_level, worker_level

IN_FLIGHT = 4  # items a worker may be ahead of the reader: enough to hide one slow item, few enough to hold in memory
GRACE = 5  # seconds for a stopped worker to leave what it is computing
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1")

Item, Result = TypeVar("Item"), TypeVar("Result")


class WorkError(UserError, RuntimeError):
    """A failure in a worker that a user can mend, told in one line."""


def map_parallel(function: Callable[[Item], Result], items: Iterable[Item], workers: int, description: str,
                 threads: bool = False) -> Iterator[Result]:
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
    items = itertools.chain(head, iterator)
    call = partial(_named_call, function, description)
    if workers <= 1 or len(head) < 3:
        results = (call(item) for item in items)
    else:
        workers = min(workers, total or workers)
        results = _pooled(_threads(call) if threads else _processes(function, workers, description), items, workers)
    return _with_bar(results, total, description)


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], threads: int
               ) -> Generator[Result, None, None]:
    """Apply a function that spends its time in torch to every item, several at once, which share torch's threads.

    One network on two images, a thread each, takes less time than on one after the other by two threads.
    Returns a generator of the results in the items' order, at most one item ahead of the threads.  threads: with 1, or
    with fewer items, one item after the other has all of torch's threads.
    """
    iterator = iter(items)
    head = list(itertools.islice(iterator, threads))
    items = itertools.chain(head, iterator)
    if threads <= 1 or len(head) < threads:
        return (function(item) for item in items)
    return _pooled(_threads(function, threads), items, threads, threads + 1)


def item_name(item: object) -> str:
    """Name an item in a message: the first entry of a tuple, str() of anything else."""
    return str(item[0] if isinstance(item, tuple) and item else item)


def _with_bar(results: Generator[Result, None, None], total: int | None, description: str) -> Iterator[Result]:
    with contextlib.closing(results):
        yield from progress(results, description, total)


def _named_call(function: Callable[[Item], Result], description: str, item: Item) -> Result:
    # Only exceptions of one argument, which always unpickle, cross from a worker to the parent.
    try:
        return function(item)
    except (UserError, OSError) as error:
        raise WorkError(f"{description}: {item_name(item)}: {error}") from error
    except Exception as error:
        raise RuntimeError(f"{description}: {item_name(item)}: {type(error).__name__}: {error}") from error


def _pooled(setting: contextlib.AbstractContextManager[Callable[[Item], Result]], items: Iterable[Item],
            workers: int, most: int | None = None) -> Generator[Result, None, None]:
    """The results in order, of at most `most` items at a time, by default IN_FLIGHT a worker.

    setting: what the workers need while they work; it gives the function that a thread calls for an item.
    """
    pool = ThreadPoolExecutor(workers)
    try:
        with setting as compute:
            futures = (pool.submit(compute, item) for item in items)
            waiting = deque(itertools.islice(futures, most or IN_FLIGHT * workers))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(itertools.islice(futures, 1))
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _threads(call: Callable[[Item], Result], sharing: int | None = None) -> Iterator[Callable[[Item], Result]]:
    """Let torch compute on one thread in each of the threads started inside, or on their part if so many share all."""
    import torch
    count = torch.get_num_threads()
    torch.set_num_threads(max(1, count // sharing) if sharing else 1)  # threads that have started keep theirs
    try:
        yield call
    finally:
        torch.set_num_threads(count)


@contextlib.contextmanager
def _processes(function: Callable[[Item], Result], workers: int,
               description: str) -> Iterator[Callable[[Item], Result]]:
    """Start processes that end with the block; gives a function that lets a free one compute an item."""
    context, free, processes = multiprocessing.get_context("spawn"), queue.SimpleQueue(), []

    def compute(item: Item) -> Result:
        pipe = free.get()
        try:
            pipe.send(item)
            result, error, trace = pipe.recv()
        except (EOFError, OSError):
            raise WorkError(
                f"{description}: the system ended a worker process at {item_name(item)}, most often because memory ran "
                f"out; run again with fewer --workers (now {workers}), or with more memory") from None
        finally:
            free.put(pipe)
        if error is not None:
            raise error from RuntimeError(f"in the worker\n{trace}")
        return result

    try:
        with _worker_birth():
            for _ in range(workers):
                ours, theirs = context.Pipe()
                processes.append(context.Process(target=_work, args=(function, description, worker_level(), theirs),
                                                 daemon=True))
                processes[-1].start()
                theirs.close()  # the worker has its own: once it ends, reading from `ours` does too
                free.put(ours)
        yield compute
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(GRACE)
            process.kill()
            process.join()


@contextlib.contextmanager
def _worker_birth() -> Iterator[None]:
    """Let the processes started inside inherit one thread each and a blocked Ctrl-C, both from their very first import.

    Setting them in the worker would be too late: it imports the script first, and numpy or torch with it.
    """
    saved = {name: os.environ.get(name) for name in ONE_THREAD}
    block = getattr(signal, "pthread_sigmask", None)  # not on Windows
    if block:
        resource_tracker.ensure_running()  # multiprocessing's own process, whose start would unblock Ctrl-C again
        mask = block(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ.update(ONE_THREAD)
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


def _work(function: Callable[[Item], Result], description: str, level: str, pipe: Connection) -> None:
    """What a worker does: receives items, and sends (result, None, None) or (None, error, its traceback as text)."""
    set_level(level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # an exception removes half-written files
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError):  # the parent has ended
        while True:
            item = pipe.recv()
            try:
                reply = _named_call(lambda item: pickle.dumps((function(item), None, None)), description, item)
            except RuntimeError as error:
                reply = pickle.dumps((None, error, traceback.format_exc()))
            pipe.send_bytes(reply)


def _end_with_parent() -> None:
    # A worker notices by itself only when it asks for its next item.
    multiprocessing.parent_process().join()
    os._exit(1)
