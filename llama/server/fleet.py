"""Replicas on Ray Serve, which places, watches and replaces them, and asks `PrefixRouter` who gets a request.

Serve's own HTTP proxy is not used: it hands requests on before their body is there, and answers 500 for what a lost
replica had not begun to answer.

Source: Ray's documentation, "Serve: custom request routers", "DeploymentHandle", "health checks".
"""

from __future__ import annotations

import asyncio
import io
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from ray.util.queue import Queue
from starlette.types import Message

from llama.checkpoint import DEFAULT_SETTINGS
from llama.cluster import ModelPlan, check_reachable, end_of_trace
from llama.generation import Llama
from llama.server.affinity import Affinity
from llama.server.front import ReplicaLost
from llama.server.replica import Forwarded, Replica
from llama.server.settings import ServerSettings
from llama.streams import tell

POLL = 0.2  # seconds between two looks at replicas that start
ASK_TIMEOUT = 5.0  # seconds for a question to all replicas
HEALTH_PERIOD, HEALTH_TIMEOUT = 2.0, 30.0  # seconds
BESIDE_QUEUE = 64  # requests beyond those that a replica's own limit is for: what costs no step
MOST_LOST = 3  # times in a row that the cluster's head is not to be reached; it may begin again
PLACING = 30.0  # seconds for replicas to be placed on a cluster, before it is said that they wait
NAMESPACE = "llama"  # of Ray's, in which owners have names


class ServedReplica(Replica):
    """As Serve makes it. With `is_owned` the application ends with the actor of its name."""

    async def __init__(self, plan: ModelPlan, settings: ServerSettings, is_owned: bool = False):
        def build() -> Llama:
            llm = plan.build()
            if plan.model is None:
                llm.defaults = llm.defaults | DEFAULT_SETTINGS
            return llm

        super().__init__(build, settings, engine=str(serve.get_replica_context().rank.rank))
        await self.start()
        if is_owned:
            self._watching.append(asyncio.create_task(end_with_owner(serve.get_replica_context().app_name)))


async def end_with_owner(app: str) -> None:
    """Deletes an application as soon as its owner is gone, a queue that stays empty.

    Ray ends it with the process that made it, however that ends. Nobody else would where a command was killed.
    """
    try:
        owner = await asyncio.to_thread(ray.get_actor, app, NAMESPACE)
        await owner.get.remote()
    except (ValueError, RayActorError):
        await asyncio.to_thread(serve.delete, app)


class PrefixRouter(RequestRouter):
    """Serve's question, answered by an `Affinity`; it lives in the process that asks."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._affinity = Affinity()
        self._num_open: Counter[str] = Counter()  # by the replica's name

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The one that knows the beginning, then all the others."""
        if not candidate_replicas:
            return []
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        num_open = {name: self._num_open[name] for name in by_name}
        first = by_name.pop(self._affinity.choose(begins_of(pending_request), num_open))
        return [[first], list(by_name.values())]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._affinity.record(begins_of(pending_request), replica_id.unique_id)

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """At once, not when the replica has taken it: others are chosen for meanwhile."""
        super().on_send_request(replica_id)
        self._num_open[replica_id.unique_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._num_open[replica_id.unique_id] = max(0, self._num_open[replica_id.unique_id] - 1)  # it may not have left


def begins_of(request: PendingRequest | None) -> list[bytes]:
    """What `Forwarded` says, where that is what is asked for."""
    return next((arg.begins for arg in request.args if isinstance(arg, Forwarded)), []) if request else []


def deployed(plan: ModelPlan, settings: ServerSettings, is_owned: bool = False) -> serve.Application:
    """The replicas, as Serve is to make them; keys stay where they are asked for. `is_owned`: see `ServedReplica`."""
    deployment = serve.deployment(ServedReplica).options(
        name="replica",
        num_replicas=plan.num_replicas,
        max_ongoing_requests=settings.max_queue + BESIDE_QUEUE,
        graceful_shutdown_timeout_s=settings.shutdown_timeout,
        health_check_period_s=HEALTH_PERIOD,
        health_check_timeout_s=HEALTH_TIMEOUT,
        max_constructor_retry_count=1,
        request_router_config=RequestRouterConfig(request_router_class="llama.server.fleet.PrefixRouter"),
        ray_actor_options=plan.share.options,
    )
    return deployment.bind(plan, replace(settings, api_key=None, api_key_file=None), is_owned)


class HandleFleet:
    """Replicas that run already, behind Serve's handle."""

    def __init__(self, handle: DeploymentHandle):
        self._handle = handle
        self._answers = handle.options(method_name="answer", stream=True)

    async def start(self) -> str:
        return await self._handle.name.remote()

    async def answer(self, request: Forwarded) -> AsyncGenerator[list[Message]]:
        response = self._answers.remote(request)
        try:
            async for messages in response:
                yield messages
        except (RayActorError, DeploymentUnavailableError) as error:
            raise ReplicaLost(str(error).partition("\n")[0]) from error
        finally:
            response.cancel()

    async def ask(self, method: str, *args: Any) -> list[Any]:
        response = self._handle.broadcast(method, *args)
        try:
            results = await response.results_async(timeout_s=ASK_TIMEOUT, return_exceptions=True)
        except DeploymentUnavailableError:  # there is none
            return []
        return [result for result in results if not isinstance(result, RayActorError)]

    async def watch(self) -> None:
        await asyncio.Event().wait()  # the cluster's end would be this process', too

    async def close(self) -> None:
        """They are somebody else's."""


class ServeFleet(HandleFleet):
    """The replicas of a plan, which run from `start` to `close`, or to the end of the cluster."""

    def __init__(self, plan: ModelPlan, settings: ServerSettings, is_guest: bool = False):
        self.plan = plan
        self.settings = settings
        self.is_guest = is_guest  # of a cluster that goes on
        self._is_lost = False
        self.app = f"llama-{uuid.uuid4().hex[:8]}"  # others may run on the same cluster

    async def start(self) -> str:
        super().__init__(await asyncio.to_thread(self._run))
        begun, is_patient = time.monotonic(), True
        while (status := await asyncio.to_thread(lambda: serve.status().applications[self.app])).status != "RUNNING":
            if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise RuntimeError(f"the replicas do not start: {end_of_trace(told(status))}")
            if is_patient and time.monotonic() > begun + PLACING and (waiting := told(status).strip()):
                is_patient = False
                tell(f"llama: the replicas wait for the cluster: {end_of_trace(waiting)}")
            await asyncio.sleep(POLL)
        return await super().start()

    async def watch(self) -> None:
        """Ray itself would look for its head for a minute, and then end this process; requests would wait meanwhile."""
        address, num_lost = ray.get_runtime_context().gcs_address, 0
        while num_lost < MOST_LOST:
            await asyncio.sleep(HEALTH_PERIOD)
            try:
                await asyncio.to_thread(check_reachable, address)
                num_lost = 0
            except RuntimeError:
                num_lost += 1
        self._is_lost = True
        raise RuntimeError(f"the Ray cluster at {address} has ended")

    async def close(self) -> None:
        if self.is_guest and not self._is_lost:
            await asyncio.to_thread(self._leave)

    def _run(self) -> DeploymentHandle:
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        if self.is_guest:
            self._owner = Queue(actor_options={"name": self.app, "namespace": NAMESPACE, "num_cpus": 0})
        serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False, "log_level": "ERROR"})
        [handle] = serve.run_many(
            [serve.RunTarget(deployed(self.plan, self.settings, self.is_guest), name=self.app, route_prefix=None)],
            wait_for_applications_running=False,
        )
        return handle

    def _leave(self) -> None:
        with redirect_stdout(io.StringIO()):  # there Ray would tell that it has killed Serve's own actors
            serve.delete(self.app)
            if not serve.status().applications:
                serve.shutdown()


def told(status: Any) -> str:
    """What Serve tells of an application and its deployments, traces of what has failed among it."""
    return "\n".join([status.message, *(deployment.message for deployment in status.deployments.values())])
