"""Start scripts as forks of one process that has imported torch: importing it is what a short run costs.

    python tests/fork_scripts.py <path of a Unix socket>

A request is a JSON line, {"folder": ..., "command": [script, flag, ...], "environment": {...}}, with two file
descriptors, of stdout and of stderr. The answers are lines: the process id and, once the run has ended, its status as
waitpid gives it. The server ends with its standard input, so that none stays behind.
"""
import atexit
import json
import os
import runpy
import select
import signal
import socket
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
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run(folder, command, environment, outputs):
    """Become the run: a session of its own, as `subprocess` would start it.  Does not return."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, output in zip((1, 2), outputs):
        os.dup2(output, number)
        os.close(output)
    sys.argv = [str(ROOT / command[0]), *command[1:]]
    sys.path[0] = str(ROOT / Path(command[0]).parent)
    status = status_of(sys.argv[0])
    threading._shutdown()  # what the interpreter does at its end, and os._exit does not
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve(connection):
    """In a process of its own: start what one connection asks for, and report how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by whatever was started in the background
    message, outputs, *_ = socket.recv_fds(connection, 1 << 20, 2)
    while not message.endswith(b"\n"):
        message += connection.recv(1 << 20)
    request = json.loads(message)
    child = os.fork()
    if child == 0:
        connection.close()
        run(request["folder"], request["command"], request["environment"], outputs)
    for output in outputs:
        os.close(output)
    connection.sendall(f"{child}\n".encode())
    connection.sendall(f"{os.waitpid(child, 0)[1]}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    # All that the scripts import, torch above all.
    from models import timm_nets  # noqa: F401
    from src import eval, segment, train  # noqa: F401
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that serve
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(sys.argv[1])
        listening.listen(64)
        while listening in select.select([listening, sys.stdin], [], [])[0]:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                serve(connection)
            connection.close()
