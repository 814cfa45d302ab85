"""Ctrl-C and SIGTERM, handled between two training steps, where the state can be saved."""
from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from types import FrameType

from utils import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 2.0  # seconds from the second signal to the end of the process, if one operation of the step lasts longer


class Interrupted(KeyboardInterrupt):
    """Raised after a signal, once the state is saved.  number: of the signal; the exit status is 128 + number."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Interrupt:
    """Records SIGINT and SIGTERM while its block runs, so that the current step is finished and the state saved.

    A second signal ends the step at once, with KeyboardInterrupt. Python runs signal handlers only between two
    operations, and one of a large network may last minutes: a thread reads the signals too, says at once what will
    happen, and ends the process if GRACE seconds after the second one the block still runs. What was saved is whole.
    `torchrun` forwards a signal to all ranks, which get it at different times; `seen` returns the same number on all of
    them, so that none waits for another that has stopped.
    """

    def __enter__(self) -> Interrupt:
        self.number, self.process, self.ended = 0, os.getpid(), threading.Event()
        self.previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        self.received, self.sent = socket.socketpair()
        self.sent.setblocking(False)
        self.previous_fd = signal.set_wakeup_fd(self.sent.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        os.register_at_fork(after_in_child=self._leave_to_parent)
        return self

    def seen(self) -> int:
        """Number of the signal that any rank got, 0 if none did.  A collective: all ranks must call it."""
        return distributed.all_reduce_max(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a data worker, forked with this handler; Ctrl-C reaches it too
            return
        if self.number and distributed.world() == 1:
            raise KeyboardInterrupt
        self.number = self.number or number

    def _watch(self) -> None:
        """The thread: every signal of the process arrives here as a byte, in the midst of an operation too."""
        count = 0
        while byte := self.received.recv(1):
            if byte[0] not in SIGNALS:
                continue
            count += 1
            if count == 1:
                again = "; a second signal stops at once" if distributed.world() == 1 else ""
                print(f"\nInterrupted: finishing this step, then saving{again}.", file=sys.stderr, flush=True)
            elif distributed.world() == 1 and not self.ended.wait(GRACE):
                print("\nStopped in the midst of a step; --resume goes on from what was saved last.", file=sys.stderr,
                      flush=True)
                os._exit(128 + byte[0])

    def _leave_to_parent(self) -> None:
        """In a forked data worker: its signals are none of the training's."""
        if not self.ended.is_set():
            signal.set_wakeup_fd(-1)

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        signal.set_wakeup_fd(self.previous_fd)
        self.sent.close()  # ends the thread
        for number, handler in self.previous.items():
            signal.signal(number, handler)
