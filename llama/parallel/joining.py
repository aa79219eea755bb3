"""How the processes that `torchrun` started become the ranks of models."""

from __future__ import annotations

import os
import secrets
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .group import SINGLE, ModelParallel
from .heartbeat import Heartbeat

IDLE_TIMEOUT = timedelta(days=3650)  # waiting for the next request is not a failure

_joined: dict[tuple[int, int], tuple[Any, ModelParallel]] = {}
"""By the size and number of stages, with the world that it is of: models share its groups."""

_own_world: Any = None  # the process group that was made here


def num_launched() -> int:
    """How many processes `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start(
    model_parallel_size: int | None = None, device: str | None = None, pipeline_parallel_size: int | None = None
) -> ModelParallel:
    """Joins the ranks that `torchrun` started into models of `pipeline_parallel_size` stages (1, if None).

    Each stage has `model_parallel_size` ranks (as many as there are, if None). With one process nothing is
    initialised; a second model shares the first one's groups. A process group or a model-parallel group that the host
    program made is used as it is, and what becomes of its ranks is that program's to watch; else a `Heartbeat` ends all
    ranks where a machine vanishes. Raises ValueError where the sizes do not fit.
    """
    global _own_world
    world_size = dist.get_world_size() if dist.is_initialized() else num_launched()
    num_stages = pipeline_parallel_size or 1
    if num_stages < 1 or world_size % num_stages:
        raise ValueError(
            f"pipeline_parallel_size is {num_stages}, but {world_size} process(es) run: it must divide their number; "
            f"start with torchrun --nproc_per_node {max(num_stages, 1)}"
        )
    stage_size = model_parallel_size or world_size // num_stages
    size = stage_size * num_stages
    if size > world_size or world_size % size:
        stages = f" in each of {num_stages} stages" if num_stages > 1 else ""
        raise ValueError(
            f"model_parallel_size is {stage_size}{stages}, but {world_size} process(es) run: it must divide their "
            f"number; start with torchrun --nproc_per_node {size}"
        )
    if size == 1:
        return SINGLE
    found = _joined.get((size, num_stages))
    if dist.is_initialized() and found is not None and found[0] is dist.group.WORLD:
        return found[1]
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend)
        _own_world = dist.group.WORLD
    if stage_size > 1:
        _start_fairscale(stage_size, num_stages)
    control = None
    for first in range(0, world_size, size):  # every process takes part in making every group
        group = dist.new_group(list(range(first, first + size)), timeout=IDLE_TIMEOUT, backend="gloo")
        if first <= dist.get_rank() < first + size:
            control = group
    rank = dist.get_rank() % size
    joined = ModelParallel(rank, size, dist.get_rank() - rank, control, num_stages)
    if dist.group.WORLD is _own_world:
        name = joined.broadcast_json(secrets.token_hex(8))
        joined = replace(joined, heartbeat=Heartbeat.of_job(rank, size, name))
    _joined[size, num_stages] = dist.group.WORLD, joined
    return joined


def _start_fairscale(stage_size: int, num_stages: int) -> None:
    """Has fairscale know which ranks make a stage."""
    from fairscale.nn.model_parallel import initialize

    if not initialize.model_parallel_is_initialized():
        initialize.initialize_model_parallel(stage_size, num_stages)
    if initialize.get_model_parallel_world_size() != stage_size:
        raise ValueError(
            f"model_parallel_size is {stage_size}, but this program initialised fairscale with "
            f"{initialize.get_model_parallel_world_size()}: use that size"
        )
