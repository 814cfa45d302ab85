"""Ctrl-C and SIGTERM, handled between two training steps, where the state can be saved."""
from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from utils import distributed


class Interrupted(KeyboardInterrupt):
    """Raised after a signal, once the state is saved.  number: of the signal; the exit status is 128 + number."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class Interrupt:
    """Records SIGINT and SIGTERM while its block runs, so that the current step is finished and the state saved.

    A second signal ends the step at once.  `torchrun` forwards a signal to all ranks, which get it at different times;
    `seen` returns the same number on all of them, so that none waits for another that has stopped.
    """

    def __enter__(self) -> Interrupt:
        self.number, self.process = 0, os.getpid()
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def seen(self) -> int:
        """Number of the signal that any rank got, 0 if none did.  A collective: all ranks must call it."""
        return distributed.all_reduce_max(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a data worker, forked with this handler; Ctrl-C reaches it too
            return
        if self.number and distributed.world() == 1:
            raise KeyboardInterrupt
        if not self.number:
            print("\nInterrupted: finishing this step, then saving.", file=sys.stderr)
        self.number = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
