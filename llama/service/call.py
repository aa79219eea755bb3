"""A request on its way: what its body asks of the model, and what is answered.

Whoever takes requests, from a file or over a network, opens a call, has its queries run and lets it respond:

    call = Call.open(llm, "/v1/completions", {"prompt": "Ships", "max_tokens": 9})
    call.respond(llm, list(llm.run(call.queries)))

An answer that is sent as it comes is made by the call's frames instead:

    frames = call.frames(llm)
    for events in ...:  # those of the queries, each step's
        send(frames.push(events))
    send(frames.end())
"""

from __future__ import annotations

import reprlib
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from llama.answer import Completion, PromptTooLong, Query, answered
from llama.chat import ToolError
from llama.generation import Llama
from llama.lora import UnknownAdapter
from llama.sampling_params import SamplingError
from llama.service.fields import Body, parse
from llama.service.frames import Frames
from llama.service.refusal import Refusal


@dataclass(frozen=True)
class Endpoint:
    """One row: the body, what it asks of the model, and the answer made of what came back."""

    body: type[Body]
    prepare: Callable[[Llama, Any], list[Query]]  # raises ValueError
    respond: Callable[[Llama, Call, Sequence[Completion]], dict[str, Any]]
    frames: type[Frames] | None = None  # made of (llm, call); None: it is answered in one piece only
    error_json: Callable[[Refusal], dict[str, Any]] = Refusal.to_json
    prompt: str = "prompt"  # the field that holds it
    needs_model: bool = False  # over HTTP, where a client has to name one


def adapter_named(llm: Llama, body: Body) -> str | None:
    """The adapter whose name a body gives as its model; None: the model itself. Raises Refusal."""
    if getattr(body, "lora", None) is not None:
        raise Refusal("lora: numbers of adapters are known to a server alone; name one as the model", param="lora")
    return body.model if body.model in llm.adapters else None


@dataclass(frozen=True)
class Call:
    """A request that can be answered: what to run for it, and how to respond."""

    endpoint: Endpoint
    body: Body
    queries: list[Query]
    model: str  # by which the answer calls it
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))  # seconds
    opened: int = field(default_factory=time.perf_counter_ns)  # when it was understood

    @classmethod
    def open(
        cls,
        llm: Llama,
        endpoint: Endpoint,
        body: object,
        *,
        model: str | None = None,
        salt: bytes = b"",
        can_stream: bool = False,
        ignore_unknown: bool = False,
        adapter_of: Callable[[Llama, Body], str | None] = adapter_named,
    ) -> Call:
        """Raises Refusal, in one line, for what can never be answered.

        model: the name to answer under (None: the body's). salt: prefixes in the cache are shared only with requests
        of the same one. can_stream: whether the caller can send an answer as it comes. adapter_of: with which of the
        model's adapters a body is answered.
        """
        parsed = parse(endpoint.body, body, ignore_unknown)
        if parsed.is_streamed and not can_stream:
            raise Refusal("stream: answers come in one piece here; leave it out", param="stream")
        try:
            adapter = adapter_of(llm, parsed)
            asked = endpoint.prepare(llm, parsed)
            queries = [replace(query, salt=salt + query.salt, adapter=adapter) for query in asked]
            for query in queries:
                llm.validate(query)
        except ValueError as error:
            raise refusal_for(error, endpoint, parsed) from error
        return cls(endpoint, parsed, queries, parsed.model if model is None else model)

    def refusal(self, error: ValueError) -> Refusal:
        """What is said of queries that were valid when the call was opened, and are not any more."""
        return refusal_for(error, self.endpoint, self.body)

    @property
    def num_completions(self) -> int:
        return sum(query.params.n for query in self.queries)

    def respond(self, llm: Llama, completions: Sequence[Completion]) -> dict[str, Any]:
        """The response's body, of all completions in any order. Raises RuntimeError where one of them failed."""
        ordered = answered(sorted(completions, key=attrgetter("place", "index")))
        return self.endpoint.respond(llm, self, ordered)

    def frames(self, llm: Llama) -> Frames:
        """What is sent of an answer as it comes."""
        assert self.endpoint.frames is not None, "only an endpoint with frames has a body that asks for them"
        return self.endpoint.frames(llm, self)


def refusal_for(error: ValueError, endpoint: Endpoint, body: Body) -> Refusal:
    """What a body is told of an error in what it asks."""
    match error:
        case Refusal():
            return error
        case SamplingError():
            return Refusal(str(error), param=body.word(error.param))
        case ToolError():
            return Refusal(str(error), param=error.param)
        case PromptTooLong():
            return Refusal(str(error), param=endpoint.prompt, code="context_length_exceeded")
        case UnknownAdapter():
            return Refusal(str(error), param="model", code="model_not_found", status=404)
    return Refusal(str(error), param=endpoint.prompt)


def find_endpoint(endpoints: Mapping[str, Endpoint], url: object) -> Endpoint:
    """The row of a path. Raises Refusal, which names those that there are."""
    endpoint = endpoints.get(url) if isinstance(url, str) else None
    if endpoint is None:
        raise Refusal(f"url is {reprlib.repr(url)}: give {', '.join(endpoints)}", param="url", status=404)
    return endpoint
