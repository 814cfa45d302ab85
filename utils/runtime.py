"""How every script runs: memory and threads set up before torch is loaded, and errors told in one line."""
import ctypes
import os
import re
import sys
import time
import traceback

from utils import distributed
from utils.errors import UserError

GRACE = 3  # seconds
# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_memory():
    """Tell glibc to serve blocks up to 1 GiB from its heap and to keep up to 2 GiB of freed memory.

    By default a large tensor is mapped anew and its pages are faulted in again: on two CPU cores that was
    39 % of a training step.  Elsewhere than on glibc, or on failure, nothing changes.  Returns whether it took effect.
    """
    return set_memory(2**30, 2**31 - 1, 256 << 20)


def set_memory(mmap_threshold, trim_threshold, top_pad):
    """Set thresholds of glibc's allocator in bytes, see mallopt(3); returns whether they took effect."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl and others
        return False
    return all([mallopt(M_MMAP_THRESHOLD, mmap_threshold), mallopt(M_TRIM_THRESHOLD, trim_threshold),
                mallopt(M_TOP_PAD, top_pad)])


def wait_quietly():
    """Let OpenMP threads sleep while they wait for each other; must be called before torch is imported.

    Spinning threads are a little faster alone, but on cores shared with data workers they were 2 to 10 times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def one_line(error):
    """An error's message in one line; of one that a DataLoader's worker sent with its traceback, the message alone."""
    return " ".join(re.split(r"^[\w.]*Error: ", str(error), flags=re.MULTILINE)[-1].split())


def run_main(main):
    """Call a script's main(); turn what a user can mend into one line on stderr and a non-zero exit status.

    Under torchrun, whichever process fails ends at once, and torchrun ends the others.
    """
    wait_quietly()
    keep_memory()
    try:
        distributed.start()
        status = main()
        distributed.stop()
    except KeyboardInterrupt as error:
        _end(128 + getattr(error, "number", 2), "Interrupted.")
    except (UserError, OSError) as error:
        _end(1, f"Error: {one_line(error)}")
    except Exception as error:
        if distributed.world() == 1:
            raise
        if lost_process(error):
            _end(1, "Error: another process has ended; its error above says why")
        traceback.print_exc(file=sys.__stderr__)
        os._exit(1)
    sys.exit(status)


def lost_process(error):
    """Whether an error says that the connection to another process broke, rather than what was wrong there."""
    broken = r"gloo|NCCL|Connection (closed|reset)"
    return isinstance(error, RuntimeError) and (type(error).__name__.startswith("Dist") or
                                                re.search(broken, str(error)) is not None)


def _end(status, line):
    """End with a status and a last line.  One of several processes does not wait for the others on its way out."""
    if distributed.world() == 1:
        print(line, file=sys.stderr)
        sys.exit(status)
    if not distributed.is_main():
        time.sleep(GRACE)  # rank 0 often fails alike, and then torchrun ends this process before it says so again
        if status == 1:
            print(f"Rank {distributed.rank()}: {line}", file=sys.__stderr__, flush=True)
    else:
        print(line, file=sys.stderr, flush=True)
    os._exit(status)
