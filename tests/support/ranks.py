"""Starting a script of this folder on several ranks: by torchrun, or by forking, which imports torch once."""

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parent.parent


def run(*command: object, timeout: float = 240) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def torchrun(ranks: int, script: str, *arguments: object) -> subprocess.CompletedProcess:
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
    return run(*launcher, SUPPORT / script, *arguments)


def forked(ranks: int, script: str, *arguments: object) -> subprocess.CompletedProcess:
    return run(SUPPORT / "forked_ranks.py", ranks, script, *arguments)
