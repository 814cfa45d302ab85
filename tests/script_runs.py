"""Running the real scripts as a user's shell does, and chains of such runs, which several tests look at."""
import atexit
import functools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
MACHINE = ("--device", "cpu", "--workers", "0", "--precision", "fp32")  # on every CPU alike
SMALL = ("--backbone", "resnet18", "--pretrained", "none", "--epochs", "1", *MACHINE)
DATA = "data/oxford-iiit-pet"  # the scripts' default, in the working directory
STAGE2 = "output/stage2_resnet18/model_best.pth.tar"


def chain(build):
    """Make a session fixture of a function that runs scripts: (empty folder, get) -> result.

    get: function: name of another chain -> its result.
    """
    @pytest.fixture(scope="session", name=build.__name__)
    def made(chain_home, request):
        folder = Path(tempfile.mkdtemp(prefix=f"{build.__name__}-", dir=chain_home))
        return build(folder, request.getfixturevalue)
    return made


def environment(folder):
    """One thread a process, as several run at once; no downloads: a refused proxy fails at once, everywhere alike."""
    nowhere = "http://127.0.0.1:9"
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
            "TORCH_HOME": str(folder / "torch_home"), "http_proxy": nowhere,
            "https_proxy": nowhere, "HTTPS_PROXY": nowhere}


class Server:
    """A process that has imported torch and forks for each run (tests/fork_scripts.py).  env: more of its environment.
    """

    def __init__(self, env=()):
        self._home = tempfile.TemporaryDirectory(prefix="wsss-forks-")
        self._path = os.path.join(self._home.name, "socket")
        self._process = subprocess.Popen([sys.executable, str(ROOT / "tests/fork_scripts.py"), self._path],
                                         env={**environment(Path(self._home.name)), **dict(env)},
                                         stdin=subprocess.PIPE, start_new_session=True)

    def connect(self):
        deadline = time.monotonic() + 120
        while not os.path.exists(self._path):
            assert self._process.poll() is None and time.monotonic() < deadline, "the server of forks did not start"
            time.sleep(0.05)
        connection = socket.socket(socket.AF_UNIX)
        while connection.connect_ex(self._path):  # bound, and not yet listening
            assert self._process.poll() is None and time.monotonic() < deadline, "the server of forks does not answer"
            time.sleep(0.05)
        return connection

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._home.cleanup()


class Fork:
    """A run started by a server, with what tests use of `subprocess.Popen`."""

    def __init__(self, server, folder, command, env):
        self.args, self.returncode = command, None
        self._outputs = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        request = {"folder": str(folder), "command": command, "environment": env}
        self._connection = server.connect()
        socket.send_fds(self._connection, [json.dumps(request).encode() + b"\n"],
                        [output.fileno() for output in self._outputs])
        self._answers = self._connection.makefile()
        self.pid = int(self._answers.readline())

    def poll(self, timeout=0):
        if self.returncode is None and select.select([self._connection], [], [], timeout)[0]:
            self.returncode = os.waitstatus_to_exitcode(int(self._answers.readline()))
            self._answers.close(), self._connection.close()
        return self.returncode

    def communicate(self, timeout=None):
        if self.poll(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        texts = []
        for output in self._outputs:
            output.seek(0)
            texts.append(output.read().decode())
            output.close()
        return texts

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)


@functools.cache
def warm_server():
    server = Server()
    atexit.register(server.close)
    return server


def start(folder, script, *flags, server=None):
    """Start a script in a folder, in a process group of its own, as a shell would, but with torch imported already.

    server: another one than that of all tests.
    """
    return Fork(server or warm_server(), folder, [str(script), *map(str, flags)], environment(folder))


def start_cold(folder, script, *flags):
    """Start a script as `start` does, in an interpreter of its own."""
    return subprocess.Popen([sys.executable, str(ROOT / script), *map(str, flags)], cwd=folder, text=True,
                            env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True)


def finish(process, timeout=120):
    """Wait for a started script.  Returns a CompletedProcess."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout} s: {process.args}\n{err[-2000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def interrupt(process, log, lines):
    """Press Ctrl-C, which reaches the whole process group, once the log has so many lines."""
    return interrupt_when(process, lambda: log.is_file() and len(log.read_text().splitlines()) >= lines)


def interrupt_when(process, ready):
    """Press Ctrl-C once `ready()` holds."""
    deadline = time.monotonic() + 90
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, finish(process).stderr
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    return finish(process)


def fork(folder, jobs, env=()):
    """Run (folder, command) jobs one after the other.  Returns a CompletedProcess of each.  env: of a server of theirs.
    """
    server = Server(env) if env else None
    try:
        return [finish(start(home, *command, server=server)) for home, command in jobs]
    finally:
        if server:
            server.close()


def run(folder, script, *flags, timeout=120, start=start):
    """Run a script that must end well."""
    done = finish(start(folder, script, *flags), timeout)
    command = " ".join(map(str, (script, *flags)))
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stderr[-3000:]}"
    return done


def random_weights(folder, path, layout, seed=0, **how):
    """Write random weights to a file of a folder (see tests/random_weights.py).  Returns its path."""
    run(folder, "tests/random_weights.py", path, layout, json.dumps(how), seed)
    return folder / path


def imagenet_weights(folder, name):
    """Random weights of a ResNet where torchvision's cache looks for its ImageNet weights in the runs of a folder."""
    url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
    return random_weights(folder, f"torch_home/hub/checkpoints/{url.rpartition('/')[2]}", "torchvision", name=name)


def copy(source, target, without=()):
    """Copy a working directory; checkpoints, which are only ever replaced whole, become hard links."""
    def one(src, dst):
        return os.link(src, dst) if src.endswith(".tar") else shutil.copy2(src, dst)
    shutil.copytree(source, target, copy_function=one, ignore=shutil.ignore_patterns(*without), dirs_exist_ok=True)
    return target


def files(folder):
    """Every file below a folder -> when it was last written."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in found}


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def checkpoint(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def picture(path, height=50, width=61, mode="RGB", file_format="JPEG"):
    """Draw a bright ellipse on noise: an image outside any dataset."""
    y, x = np.mgrid[:height, :width]
    inside = ((y - height / 2) / height) ** 2 + ((x - width / 2) / width) ** 2 < 0.09
    pixels = np.random.default_rng(0).integers(0, 90, (height, width, len(mode))) + 150 * inside[..., None]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8).squeeze()).save(path, format=file_format)  # the mode follows from the shape
    return path


def mask_picture(path, values):
    """Write a grey 8-bit picture of the given values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)
