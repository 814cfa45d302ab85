"""Run scripts in forks of one process that has imported torch: where runs are many and short, importing it is the cost.

    python tests/fork_scripts.py <jobs.json>    [[folder, [script, flag, ...], path of the output without suffix], ...]

Prints the exit statuses as a JSON list; what each run said goes to <path>.out and <path>.err.
"""
import atexit
import json
import os
import runpy
import sys
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def status_of(script):
    """Run a script as __main__.  Returns its exit status, as the interpreter would set it."""
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(folder, command, output):
    """Run a command in a child process.  Returns its exit status."""
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        for number, suffix in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(output + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = [str(ROOT / command[0]), *command[1:]]
        status = status_of(sys.argv[0])
        threading._shutdown()  # what the interpreter does at its end, and os._exit does not
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    from src import eval, segment, train  # noqa: F401  all that the scripts import, torch above all
    print(json.dumps([fork(*job) for job in json.loads(Path(sys.argv[1]).read_text())]))
