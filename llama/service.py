"""What a request means, once: for each endpoint of OpenAI's API, what its body asks of the model, and the answer.

Whoever takes requests, from a file or over a network, opens a call, has its queries run and lets it respond:

    call = Call.open(llm, "/v1/completions", {"prompt": "Ships", "max_tokens": 9})
    call.respond(llm, list(llm.run(call.queries)))
"""

from __future__ import annotations

import reprlib
import time
import uuid
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from llama.answer import Completion, Query
from llama.generation import Llama, answered, unit_vectors
from llama.protocol import Body, ChatRequest, CompletionRequest, EmbeddingRequest, Prompts, parse
from llama.sampling_params import SamplingParams
from llama.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Endpoint:
    """One row: the body, what it asks of the model, and the answer made of what came back."""

    body: type[Body]
    prepare: Callable[[Llama, Any], list[Query]]  # raises ValueError
    respond: Callable[[Llama, Any, Sequence[Query], Sequence[Completion]], dict[str, Any]]


@dataclass(frozen=True)
class Call:
    """A request that can be answered: what to run for it, and how to respond."""

    endpoint: Endpoint
    body: Body
    queries: list[Query]

    @classmethod
    def open(cls, llm: Llama, url: object, body: object) -> Call:
        """Raises ValueError, in one line, for what can never be answered."""
        endpoint = ENDPOINTS.get(url) if isinstance(url, str) else None
        if endpoint is None:
            raise ValueError(f"url is {reprlib.repr(url)}: give {', '.join(ENDPOINTS)}")
        parsed = parse(endpoint.body, body)
        queries = endpoint.prepare(llm, parsed)
        for query in queries:
            llm.validate(query)
        return cls(endpoint, parsed, queries)

    @property
    def num_completions(self) -> int:
        return sum(query.params.n for query in self.queries)

    def respond(self, llm: Llama, completions: Sequence[Completion]) -> dict[str, Any]:
        """The response's body, of all completions in any order. Raises RuntimeError where one of them failed."""
        ordered = answered(sorted(completions, key=attrgetter("place", "index")))
        return self.endpoint.respond(llm, self.body, self.queries, ordered)


# ---- what a body asks


def chat_queries(llm: Llama, body: ChatRequest) -> list[Query]:
    dialog = [{"role": message.role, "content": message.content} for message in body.messages]
    return [llm.chat_query(dialog, body.params().resolve(llm.defaults))]


def completion_queries(llm: Llama, body: CompletionRequest) -> list[Query]:
    params = body.params().resolve(llm.defaults)
    return [Query(tokens, params) for tokens in prompt_tokens(llm, "prompt", body.prompt)]


def embedding_queries(llm: Llama, body: EmbeddingRequest) -> list[Query]:
    params = SamplingParams().resolve()
    return [Query(tokens, params, "mean") for tokens in prompt_tokens(llm, "input", body.input)]


def prompt_tokens(llm: Llama, field: str, prompts: Prompts) -> list[list[int]]:
    """The ids of a text, of token ids, or of each in a list of either."""
    if not prompts:
        raise ValueError(f"{field} is empty: give a text, token ids, or a list of either")
    single = isinstance(prompts, str) or isinstance(prompts[0], int)
    return llm.prompt_tokens([prompts] if single else prompts)


# ---- what is answered


def chat_response(
    llm: Llama, body: ChatRequest, queries: Sequence[Query], completions: Sequence[Completion]
) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "message": dict(llm.chat_format.parse(completion.text)),
            "logprobs": chat_logprobs(completion, llm.tokenizer),
            "finish_reason": completion.finish_reason,
        }
        for index, completion in enumerate(completions)
    ]
    for choice, completion in zip(choices, completions, strict=True):
        if completion.refused:
            choice["message"]["refusal"] = completion.text
            choice["finish_reason"] = "content_filter"
    return {
        **head("chatcmpl", "chat.completion", body),
        "choices": choices,
        "usage": usage(queries, completions),
    }


def completion_response(
    llm: Llama, body: CompletionRequest, queries: Sequence[Query], completions: Sequence[Completion]
) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "text": completion.text,
            "logprobs": text_logprobs(completion, llm.tokenizer),
            "finish_reason": completion.finish_reason,
        }
        for index, completion in enumerate(completions)
    ]
    return {**head("cmpl", "text_completion", body), "choices": choices, "usage": usage(queries, completions)}


def embedding_response(
    llm: Llama, body: EmbeddingRequest, queries: Sequence[Query], completions: Sequence[Completion]
) -> dict[str, Any]:
    vectors = unit_vectors(completions).numpy().astype("<f4")
    is_base64 = body.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": b64encode(vector.tobytes()).decode() if is_base64 else vector.tolist(),
        }
        for index, vector in enumerate(vectors)
    ]
    counts = usage(queries, completions)
    del counts["completion_tokens"]
    return {"object": "list", "model": body.model, "data": data, "usage": counts}


def head(prefix: str, kind: str, body: Body) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": body.model,
    }


def usage(queries: Sequence[Query], completions: Sequence[Completion]) -> dict[str, int]:
    """An echoed prompt is in its completions' tokens, but nobody generated it."""
    num_prompt_tokens = sum(len(query.tokens) for query in queries)
    num_echoed = sum(len(query.tokens) * query.params.n for query in queries if query.params.echo)
    num_generated = sum(len(completion.tokens) for completion in completions) - num_echoed
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt_tokens + num_generated,
    }


def chat_logprobs(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None

    def entry(token: int, logprob: float) -> dict[str, Any]:
        content = token_bytes(token, tokenizer)
        return {"token": content.decode(errors="replace"), "logprob": logprob, "bytes": list(content)}

    return {
        "content": [
            {**entry(item.token, item.logprob), "top_logprobs": [entry(*pair) for pair in item.top]}
            for item in completion.logprobs
        ]
    }


def text_logprobs(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if completion.logprobs is None:
        return None

    def text(token: int) -> str:
        return token_bytes(token, tokenizer).decode(errors="replace")

    entries = [*(completion.prompt_logprobs or ()), *completion.logprobs]
    return {
        "tokens": [text(token) for token in completion.tokens],
        "token_logprobs": [entry and entry.logprob for entry in entries],
        "top_logprobs": [entry and {text(token): value for token, value in entry.top} for entry in entries],
        "text_offset": text_offsets(completion, tokenizer),
    }


def token_bytes(token: int, tokenizer: Tokenizer) -> bytes:
    """A model's table may be padded with ids that no tokenizer knows: they have no text."""
    return tokenizer.token_bytes(token) if token < tokenizer.n_words else b""


def text_offsets(completion: Completion, tokenizer: Tokenizer) -> list[int]:
    """Where in the completion's text each token begins.

    A token in the midst of a character begins where the character does, one behind a stop string at the end.
    """
    decoder = StreamDecoder(tokenizer)
    offsets, end = [], 0
    for token in completion.tokens:
        offsets.append(min(end, len(completion.text)))
        end += len(decoder.push(token)) if token < tokenizer.n_words else 0
    return offsets


ENDPOINTS = {
    "/v1/chat/completions": Endpoint(ChatRequest, chat_queries, chat_response),
    "/v1/completions": Endpoint(CompletionRequest, completion_queries, completion_response),
    "/v1/embeddings": Endpoint(EmbeddingRequest, embedding_queries, embedding_response),
}
