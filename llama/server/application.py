"""A Serve application for clusters where nobody runs a command, as KubeRay's: Serve's own proxy has the network.

    importPath: llama.server.application:application
    args: {model: /models/llama-3.1-8b, replicas: 2, threads: 8, host: 0.0.0.0}

Source: Ray's documentation, "Serve: pass arguments to applications"; KubeRay's, "RayService".
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from llama.cluster import ModelPlan, Share
from llama.options import MODEL
from llama.server.fleet import HandleFleet, deployed
from llama.server.front import Front
from llama.server.run import surrounded
from llama.server.settings import SERVER, ServerSettings

OWN = ("model", "replicas", "threads", "gpus")
OF_COMMAND = {"port", "ssl_certfile", "ssl_keyfile", "admin_key", "model_dir"}  # which are not for replicas, or here
OF_COMMAND |= {"rank_timeout", "pipeline_parallel_size"}


@serve.deployment(name="front", num_replicas=1, ray_actor_options={"num_cpus": 0})
@serve.ingress()
class FrontDeployment:
    """A `Front` behind Serve's proxy, which begins by the protocol's lifespan."""

    async def __init__(self, replicas: DeploymentHandle, settings: ServerSettings):
        self._front = Front(HandleFleet(replicas), settings)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return surrounded(self._front, self._front)


def application(args: dict[str, Any]) -> serve.Application:
    """The application of these arguments: those in OWN, and options of `llama serve`, by the names that --config takes.

    Each replica gets `threads` processors and `gpus` GPUs (one and none if left out). Raises ValueError for a name that
    there is not.
    """
    known = {option.name: option for option in (*MODEL, *SERVER) if option.name not in OF_COMMAND}
    if unknown := args.keys() - known.keys() - {*OWN}:
        raise ValueError(
            f"{', '.join(sorted(unknown))}: no such argument; there are {', '.join(sorted({*known, *OWN}))}"
        )
    given = {name: Path(args[name]) if known[name].type == Path | None else args[name] for name in args.keys() - {*OWN}}
    settings = ServerSettings(**{option.name: given[option.name] for option in SERVER if option.name in given})
    load = {option.name: given[option.name] for option in MODEL if option.name in given}
    share = Share(args.get("threads", 1), args.get("gpus", 0))
    plan = ModelPlan(args.get("model"), load, args.get("replicas", 1), share, os.getcwd())
    return FrontDeployment.bind(deployed(plan, settings), settings)
