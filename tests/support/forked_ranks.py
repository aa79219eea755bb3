"""Starts ranks as torchrun does, by its own launcher, but as forks of one process that has imported everything.

    python forked_ranks.py NUM_RANKS SCRIPT ARGUMENT ...

SCRIPT is a module of this folder; every rank calls its `main` with the arguments.
"""

import importlib
import sys
import uuid

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import llama  # noqa: F401 (so that no rank imports it again)


def launch(num_ranks: int, script: str, *arguments: str) -> None:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, importlib.import_module(script.removesuffix(".py")).main)(*arguments)


if __name__ == "__main__":
    launch(int(sys.argv[1]), *sys.argv[2:])
