"""Run scripts one after the other in one of several processes, as torchrun would: joining and torch are paid for once.

    python tests/together.py <jobs.json>    [[script, flag, ...], ...]

Run in each process with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, or once without them.
"""
import json
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    from utils import distributed
    from utils.runtime import run_main

    def every_job():
        for script, *flags in json.loads(Path(sys.argv[1]).read_text()):
            if runpy.run_path(str(ROOT / script))["main"](flags):
                return 1
            distributed.barrier()
        return 0
    run_main(every_job)
