"""OpenAI's /v1/completions. Source: OpenAI's API reference, "Completions (legacy)"."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from llama.answer import Completion, Query
from llama.generation import Llama
from llama.service.call import Call, Endpoint
from llama.service.fields import Ignored, Prompts, Unserved
from llama.service.frames import Delta, json_line
from llama.service.openai import (
    OpenAIFrames,
    StreamOptions,
    TextOffsets,
    Usage,
    head,
    logprob_entries,
    text_logprobs,
    text_offsets,
)
from llama.service.refusal import Refusal
from llama.service.shape import ShapedBody
from llama.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # where a body gives none
MOST_PROMPTS = 2048


class CompletionRequest(ShapedBody):
    prompt: Prompts
    logprobs: int | None = None
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: str = ""
    return_token_ids: bool = False  # vLLM's; with logprobs their entries too, as chats have them
    best_of: int | None = None
    suffix: Unserved = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None

    def own_params(self) -> dict[str, Any]:
        return {
            **super().own_params(),
            "logprobs": self.logprobs,
            "prompt_logprobs": self.logprobs if self.echo else None,
            "echo": self.echo,
            "max_tokens": DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens,
        }


def completion_queries(llm: Llama, body: CompletionRequest) -> list[Query]:
    if body.stream_options is not None and not body.stream:
        raise Refusal("stream_options are given without stream: set stream to true", param="stream_options")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise Refusal(
            f"best_of is {body.best_of}: this is not served, every answer is given; leave it out",
            param="best_of",
            code="unsupported_parameter",
        )
    params = body.params().resolve(llm.defaults)
    salt = body.cache_salt.encode()
    return [Query(tokens, params, salt=salt) for tokens in prompt_tokens(llm, "prompt", body.prompt)]


def prompt_tokens(llm: Llama, field: str, prompts: Prompts) -> list[list[int]]:
    """The ids of a text, of token ids, or of each in a list of either."""
    if prompts == []:
        raise Refusal(f"{field} is empty: give a text, token ids, or a list of either", param=field)
    single = isinstance(prompts, str) or isinstance(prompts[0], int)
    if not single and len(prompts) > MOST_PROMPTS:
        raise Refusal(f"{field} holds {len(prompts)} texts: give at most {MOST_PROMPTS}", param=field)
    return llm.prompt_tokens([prompts] if single else prompts)


def completion_response(llm: Llama, call: Call, completions: Sequence[Completion]) -> dict[str, Any]:
    with_ids = call.body.return_token_ids
    choices = [
        {
            "index": index,
            "text": completion.text,
            "logprobs": completion_logprobs(completion, llm.tokenizer, with_ids),
            "finish_reason": completion.finish_reason,
            **({"token_ids": completion.tokens} if with_ids else {}),
        }
        for index, completion in enumerate(completions)
    ]
    return {
        **head(call, "cmpl", "text_completion"),
        "choices": choices,
        "usage": Usage.of(call.queries, completions).to_json(),
    }


def completion_logprobs(completion: Completion, tokenizer: Tokenizer, with_ids: bool = False) -> dict[str, Any] | None:
    """Of all its tokens, an echoed prompt's among them."""
    if completion.logprobs is None:
        return None
    entries = [*(completion.prompt_logprobs or ()), *completion.logprobs]
    offsets = text_offsets(completion, tokenizer)
    found = {**text_logprobs(entries, completion.tokens, tokenizer), "text_offset": offsets}
    return {**found, "content": logprob_entries(entries, tokenizer)} if with_ids else found


class CompletionFrames(OpenAIFrames):
    """What each choice says, with its end; then the usage, if that is wanted. Answers are counted prompt by prompt."""

    def __init__(self, llm: Llama, call: Call):
        super().__init__(call, "cmpl", "text_completion")
        self._tokenizer = llm.tokenizer
        self._queries = call.queries
        self._with_ids = call.body.return_token_ids
        self._offsets: dict[int, TextOffsets] = defaultdict(lambda: TextOffsets(llm.tokenizer))

    def frame(self, delta: Delta) -> str:
        params = self._queries[delta.place].params
        is_whole = params.echo and params.logprobs is not None  # the prompt's are known at the end only
        says_something = delta.says_something or (self._with_ids and delta.tokens)
        if not says_something or (is_whole and delta.completion is None):
            return ""
        index = delta.place * params.n + delta.index
        text = delta.completion.text if is_whole else delta.text
        logprobs = "null"
        if is_whole:
            logprobs = json_line(completion_logprobs(delta.completion, self._tokenizer, self._with_ids))
        elif params.logprobs is not None:
            found = text_logprobs(delta.logprobs, delta.tokens, self._tokenizer)
            found["text_offset"] = self._offsets[index].take(delta.tokens)
            if self._with_ids:
                found["content"] = logprob_entries(delta.logprobs, self._tokenizer)
            logprobs = json_line(found)
        ids = f',"token_ids":{json_line(delta.completion.tokens if is_whole else delta.tokens)}' * self._with_ids
        finish = json_line(delta.finish_reason)
        choice = f'{{"index":{index},"text":{json_line(text)},"logprobs":{logprobs},"finish_reason":{finish}{ids}}}'
        return self.chunk(choice)


COMPLETIONS = Endpoint(CompletionRequest, completion_queries, completion_response, CompletionFrames, needs_model=True)
