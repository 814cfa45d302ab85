"""Run a script in a Python whose worker processes start by another method than the system's own.

    python tests/start_method.py {fork,spawn,forkserver} <script> [flag ...]

The script is named relative to the repository.  Workers import this file too, and must find nothing to do in it.
"""
import multiprocessing
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    ROOT = Path(__file__).resolve().parents[1]
    method, script, *flags = sys.argv[1:]
    multiprocessing.set_start_method(method)
    multiprocessing.set_forkserver_preload(["torch"])  # for speed: imported once for all workers
    sys.path[0], sys.argv = str(ROOT), [str(ROOT / script), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")
