"""Ray, which begins processes on one machine or many, watches them and begins them again; asked for by the extra `ray`.

Source: Ray's documentation, "ray.init", "Configuring Ray".
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from llama.device import free_memory
from llama.generation import Llama
from llama.runner import MEMORY_SHARE

STORE_BYTES = 200 << 20  # of a local cluster's object store: requests and answers are small
REACH_TIMEOUT = 5.0  # seconds for a cluster's head to be reached


@dataclass(frozen=True)
class Share:
    """What each of several replicas gets of a cluster."""

    threads: int
    gpus: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """What Ray is to be told of a process, which gets OMP_NUM_THREADS from that."""
        return {"num_cpus": self.threads, "num_gpus": self.gpus}


@dataclass(frozen=True)
class ModelPlan:
    """How each of several replicas makes its model: plain data, since it travels.

    `model` and `load` are a checkpoint and parameters of `Llama.build`.
    """

    model: str | None
    load: dict[str, Any]
    num_replicas: int
    share: Share
    directory: str  # which paths begin at, where a machine has it

    def build(self) -> Llama:
        """The model, with a seed that it draws. Replicas on one machine share the memory that is free there."""
        if os.path.isdir(self.directory):
            os.chdir(self.directory)
        torch.set_num_threads(self.share.threads)
        load = self.load | {"seed": None}
        if "kv_cache_memory" not in load and not self.share.gpus:
            load["kv_cache_memory"] = int(MEMORY_SHARE * free_memory(torch.device("cpu")) / self.num_replicas)
        return Llama.build(self.model, **load)


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connected with the cluster whose head is at an address, or with one of this machine that ends with the block.

    This machine must be one of the cluster's. Raises RuntimeError where Ray, or the cluster, is not there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # tells nobody of what is done here
    if address is None:  # is read when Ray is imported; so its own machine's address is the loopback's, as on a Mac
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ModuleNotFoundError as error:
        raise RuntimeError("ray is missing: pip install 'llama-native[ray]'") from error
    options = {"address": address}
    if address is None:
        options = {"address": "local"}  # a new one, though there be another here
        options |= {"num_cpus": num_processors(), "object_store_memory": STORE_BYTES, "include_dashboard": False}
    elif address != "auto":
        check_reachable(address)
    try:
        ray.init(**options, logging_level="error", log_to_driver=False)
    except Exception as error:  # Ray's own have no common base
        reason = str(error).strip().partition("\n")[0][:200]
        if "InvalidAuthToken" in str(error.__cause__):
            reason = "it asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN unless ~/.ray/auth_token has it"
        what = "Ray does not start here" if address is None else f"no Ray cluster at {address} has this machine"
        raise RuntimeError(f"{what}: {reason}") from error
    try:
        yield
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"Ray: {end_of_trace(str(error))}") from error
    finally:
        ray.shutdown()


def end_of_trace(trace: str) -> str:
    """What a trace of another process ends with: the error without its type."""
    line = next((line.strip() for line in reversed(trace.splitlines()) if line.strip()), "no reason is known")
    return re.sub(r"^[\w.]+(Error|Exception): ", "", line)


def check_reachable(address: str) -> None:
    """Raises RuntimeError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_TIMEOUT).close()
    except (OSError, ValueError) as error:
        given = f"there is no Ray cluster at {address} ({error})"
        raise RuntimeError(f"{given}: give its head's address, as 10.0.0.1:6379, or auto") from error


def num_processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def planned(model: str | None, load: dict[str, Any], num_replicas: int, address: str | None) -> Iterator[ModelPlan]:
    """Replicas on a `cluster`, which share its processors, or its GPUs where there is one for each.

    OMP_NUM_THREADS, where it is set, is the number of threads of each. Raises RuntimeError where there is no cluster,
    ValueError where it is too small.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS", 0))
    if address is None:  # before a cluster is begun in vain
        divide(num_replicas, [num_processors()], num_replicas, load["device"], threads)
    with cluster(address):
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        processors = [int(node.get("CPU", 0)) for node in nodes]
        num_gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        each = divide(num_replicas, processors, num_gpus, load["device"], threads)
        yield ModelPlan(model, load, num_replicas, each, os.getcwd())


def divide(num_replicas: int, processors: Sequence[int], num_gpus: int, device: str, threads: int = 0) -> Share:
    """`processors` are those of each machine; `threads` are asked for, unless they are 0."""
    if num_replicas > sum(processors):
        raise ValueError(f"--replicas {num_replicas} is more than there are processors: give {sum(processors)} or less")
    if device.startswith("cuda") and num_replicas > num_gpus:
        raise ValueError(f"--replicas {num_replicas} is more than there are GPUs: give {num_gpus} or less")
    gpus = int(device in ("auto", "cuda") and num_replicas <= num_gpus)
    for most in range(threads or max(processors), 0, -1):
        if sum(own // most for own in processors) >= num_replicas:
            return Share(most, gpus)
        if threads:
            raise ValueError(f"{num_replicas} replicas of OMP_NUM_THREADS={threads} are more than there are processors")
    raise AssertionError
