"""Seconds and extra memory of a call, for the benchmarks that set ours beside a plain reference."""
import contextlib
import ctypes
import json
import time
from pathlib import Path

from utils.runtime import keep_memory, set_memory


def timed(call, repeats=3, clock=time.perf_counter):
    """(least seconds of so many calls by a clock, the last result)."""
    seconds = []
    for _ in range(repeats):
        started = clock()
        result = call()
        seconds.append(clock() - started)
    return min(seconds), result


def extra_mb(call):
    """MB by which a call raises this process's peak of resident memory; None where Linux's /proc is not to be had."""
    _give_back_freed_memory()
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        refs.write_text("5")  # sets the peak to what is resident now
    except OSError:
        return None
    before = _resident(status, "VmRSS")
    call()
    return round((_resident(status, "VmHWM") - before) / 1024, 1)


def _give_back_freed_memory():
    # What glibc keeps of freed memory would be taken again without any rise to be seen.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def usual_memory():
    """Undo `utils.runtime.keep_memory` in the block: the thresholds of glibc's allocator as they end up by themselves."""
    set_memory(32 << 20, 64 << 20, 128 << 10)
    try:
        yield
    finally:
        keep_memory()


def _resident(status, field):
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


class Table:
    """The cases of a benchmark: a line for each as soon as it is measured, and all as JSON lines at the end."""

    def __init__(self):
        self.rows = []
        print(f"{'case':<36}{'seconds':>12}{'reference':>12}{'ratio':>9}{'extra MB':>10}{'error':>9}")

    def add(self, case, seconds, reference_seconds, memory, error, **more):
        """seconds, reference_seconds: ours and those of the plain reference.  memory: MB, or None.  error: the largest
        difference of the results, or None.  more: what else belongs into the JSON line."""
        row = {"case": case, "seconds": round(seconds, 5), "reference_seconds": round(reference_seconds, 4),
               "ratio": round(reference_seconds / seconds, 2), "extra_mb": memory,
               "max_error": None if error is None else float(f"{error:.1e}"), **more}
        self.rows.append(row)
        shown = ["-" if row[name] is None else f"{row[name]:g}" for name in ("extra_mb", "max_error")]
        print(f"{case:<36}{row['seconds']:>12.4f}{row['reference_seconds']:>12.3f}{row['ratio']:>9.2f}"
              f"{shown[0]:>10}{shown[1]:>9}", flush=True)

    def finish(self):
        for row in self.rows:
            print(json.dumps(row))
