"""How every script runs: memory and threads are set up before torch is imported, and errors printed in one line."""
import contextlib
import ctypes
import gc
import os
import re
import sys
import time
import traceback
from collections.abc import Callable

from utils import distributed, log
from utils.errors import UserError

GRACE = 3  # seconds that ranks above 0 wait before they print an error
# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_memory() -> bool:
    """Tell glibc to serve blocks up to 1 GiB from its heap and to keep up to 2 GiB of freed memory.

    By default a large tensor is mapped anew and its pages are faulted in again: on two CPU cores that was
    39 % of a training step.  Without glibc, or on failure, nothing changes.  Returns whether it took effect.
    """
    return set_memory(2**30, 2**31 - 1, 256 << 20)


def release_memory() -> None:
    """Give freed memory back to the system: between stages of a run whose tensors do not fit into each other's place.

    What `keep_memory` keeps would otherwise add to the next stage's.  Without glibc nothing happens.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # musl and others
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def set_memory(mmap_threshold: int, trim_threshold: int, top_pad: int) -> bool:
    """Set thresholds of glibc's allocator in bytes, see mallopt(3).  Returns whether they took effect."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl and others
        return False
    return all([mallopt(M_MMAP_THRESHOLD, mmap_threshold), mallopt(M_TRIM_THRESHOLD, trim_threshold),
                mallopt(M_TOP_PAD, top_pad)])


def wait_quietly() -> None:
    """Let OpenMP threads sleep, not spin, while they wait for each other; must be called before torch is imported.

    Spinning is slightly faster on idle cores; on cores shared with data workers it was 2 to 10 times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def remember_shapes() -> None:
    """Let oneDNN keep the code that it compiles for each shape of a layer; must be called before torch is imported.

    By default it keeps 1,024 layers, some 16 image sizes of EfficientNet-Lite2. 240 views in 59 sizes took 11 %
    less processor time with all kept, and 100 MB more.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")


def one_line(error: BaseException) -> str:
    """An error's message in one line, without the traceback that a DataLoader worker puts before it."""
    return " ".join(re.split(r"^[\w.]*Error: ", str(error), flags=re.MULTILINE)[-1].split())


def run_main(main: Callable[[], int | None]) -> None:
    """Call a script's main() and exit with its status; print a UserError or OSError as one line on stderr, status 1.

    Ctrl-C and SIGTERM exit with 128 + the signal's number.  Under torchrun, a rank that fails exits at once, and
    torchrun then ends the others.
    """
    wait_quietly()
    remember_shapes()
    keep_memory()
    for stream in (sys.stdout, sys.stderr):  # a class name that the terminal cannot show must not end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        distributed.start()
        status = main()
        distributed.stop()
        gc.freeze()  # Python's last collection would walk over all of torch: more than a second
    except KeyboardInterrupt as error:
        _end(128 + getattr(error, "number", 2), "Interrupted.")
    except (UserError, OSError) as error:
        if log.shows("debug"):
            traceback.print_exc()
        _end(1, f"Error: {one_line(error)}")
    except Exception as error:
        if distributed.world() == 1:
            raise
        if lost_connection(error):
            _end(1, "Error: another process has ended; its error above says why")
        traceback.print_exc(file=sys.__stderr__)
        os._exit(1)
    sys.exit(status)


def lost_connection(error: BaseException) -> bool:
    """Whether an error only says that the connection to another rank broke; that rank's own error says why."""
    broken = r"gloo|NCCL|Connection (closed|reset)"
    return isinstance(error, RuntimeError) and (type(error).__name__.startswith("Dist") or
                                                re.search(broken, str(error)) is not None)


def _end(status: int, line: str) -> None:
    """Print a last line and exit; one of several ranks exits without waiting for the others."""
    if distributed.world() == 1:
        print(line, file=sys.stderr)
        sys.exit(status)
    if not distributed.is_main():
        time.sleep(GRACE)  # rank 0 often has the same error, and then torchrun ends this rank before it repeats it
        if status == 1:
            print(f"Rank {distributed.rank()}: {line}", file=sys.__stderr__, flush=True)
    else:
        print(line, file=sys.stderr, flush=True)
    os._exit(status)
