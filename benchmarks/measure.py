"""Seconds and extra memory of a call, for the benchmarks that set ours beside a plain reference."""
import contextlib
import ctypes
import json
import time
from pathlib import Path


def timed(call, repeats=3):
    """(least seconds of so many calls, the last result)."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - started)
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


def _resident(status, field):
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def report(case, seconds, reference_seconds, memory, error, **more):
    """Print a case's figures as a JSON line and return them."""
    row = {"case": case, "seconds": round(seconds, 5), "reference_seconds": round(reference_seconds, 4),
           "ratio": round(reference_seconds / seconds, 1), "extra_mb": memory, "max_error": error, **more}
    print(json.dumps(row), flush=True)
    return row
