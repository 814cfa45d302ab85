"""Ctrl-C and SIGTERM, taken up where the work can be left: between two training steps."""
import os
import signal
import sys

from utils import distributed


class Interrupted(KeyboardInterrupt):
    """The work was left in order after a signal.  number: of the signal; the exit status is 128 + number."""

    def __init__(self, number):
        super().__init__(number)
        self.number = number


class Interrupt:
    """Remembers SIGINT and SIGTERM while its block runs, so that the running step is finished and the state saved.

    A second signal ends the step at once.  `torchrun` sends its processes what it gets; each remembers it for itself,
    and `seen` tells all of them alike, so that none waits for another that has stopped.
    """

    def __enter__(self):
        self.number, self.process = 0, os.getpid()
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def seen(self):
        """The number of the signal that any of the processes got, 0 if none did.  All of them must ask together."""
        return distributed.most(self.number)

    def _note(self, number, frame):
        if os.getpid() != self.process:  # a data worker, forked with this handler; Ctrl-C reaches it too
            return
        if self.number and distributed.world() == 1:
            raise KeyboardInterrupt
        if not self.number:
            print("\nInterrupted: finishing this step, then saving.", file=sys.stderr)
        self.number = number

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
