"""How every script runs: memory and threads set up before torch is loaded, and errors told in one line."""
import ctypes
import os
import re
import sys

from utils.errors import UserError

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
    """Call a script's main(); turn what a user can mend into one line on stderr and a non-zero exit status."""
    wait_quietly()
    keep_memory()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:
        print(f"Error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
