"""/tokenize, /detokenize and /apply-template, as clients of vLLM, llama.cpp and lm-eval ask; no model is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from llama.answer import Completion, Query
from llama.chat import ChatFormatError, DialogError, Prompt
from llama.generation import Llama
from llama.service.call import Call, Endpoint
from llama.service.chat import ChatMessage, PromptFields
from llama.service.fields import Body, Ids
from llama.service.openai import token_bytes
from llama.service.refusal import Refusal

_T = TypeVar("_T")


class TokenizeRequest(Body, PromptFields):
    prompt: str | None = None
    content: str | None = None  # llama.cpp's name of it
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True
    add_special: bool | None = None  # llama.cpp's name of it
    with_pieces: bool = False


class ApplyTemplateRequest(Body, PromptFields):
    messages: list[ChatMessage]


class DetokenizeRequest(Body):
    tokens: Ids


def no_queries(llm: Llama, body: Body) -> list[Query]:
    """For what is answered without the model."""
    return []


def tokenize_response(llm: Llama, call: Call, completions: Sequence[Completion]) -> dict[str, Any]:
    body = call.body
    given = [text for text in (body.prompt, body.content) if text is not None]
    if len(given) + (body.messages is not None) != 1:
        raise Refusal("give one of prompt, content and messages", param="prompt")
    if body.messages is not None:
        llm = body.speaking(llm)
        tokens = formatted(llm.chat_format.encode, partial(body.chat_prompt, body.messages))
    else:
        special = body.add_special_tokens if body.add_special is None else body.add_special
        tokens = llm.tokenizer.encode(given[0], bos=special and llm.tokenizer.add_bos, eos=False)
    if body.with_pieces:
        pieces = [{"id": token, "piece": piece(token_bytes(token, llm.tokenizer))} for token in tokens]
        return {"tokens": pieces, "count": len(tokens), "max_model_len": llm.max_seq_len}
    return {"tokens": tokens, "count": len(tokens), "max_model_len": llm.max_seq_len}


def apply_template_response(llm: Llama, call: Call, completions: Sequence[Completion]) -> dict[str, Any]:
    llm = call.body.speaking(llm)
    return {"prompt": formatted(llm.chat_format.text, partial(call.body.chat_prompt, call.body.messages))}


def formatted(write: Callable[[Prompt], _T], chat_prompt: Callable[[], Prompt]) -> _T:
    """What a chat format makes of a body's messages. Raises Refusal."""
    try:
        return write(chat_prompt())
    except (DialogError, ChatFormatError) as error:
        raise Refusal(str(error), param="messages") from error


def piece(content: bytes) -> str | list[int]:
    """A token's text, or its bytes where they are no text by themselves."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return list(content)


def detokenize_response(llm: Llama, call: Call, completions: Sequence[Completion]) -> dict[str, Any]:
    num_words = llm.tokenizer.n_words
    outside = next((token for token in call.body.tokens if not 0 <= token < num_words), None)
    if outside is not None:
        raise Refusal(f"tokens holds {outside}: ids run from 0 to {num_words - 1}", param="tokens")
    text = llm.tokenizer.decode(call.body.tokens)
    return {"prompt": text, "content": text}


APPLY_TEMPLATE = Endpoint(ApplyTemplateRequest, no_queries, apply_template_response, prompt="messages")
TOKENIZE = Endpoint(TokenizeRequest, no_queries, tokenize_response)
DETOKENIZE = Endpoint(DetokenizeRequest, no_queries, detokenize_response, prompt="tokens")
