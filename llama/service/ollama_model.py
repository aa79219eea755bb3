"""What Ollama tells of a model: /api/show, which is asked by POST, and what /api/tags, /api/ps and /api/version list.

Source: Ollama's docs/api.md. Editors look for the architecture, the context's length and the capabilities.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from llama.answer import Completion
from llama.generation import Llama
from llama.service.call import Call, Endpoint
from llama.service.fields import Body, Ignored
from llama.service.ollama import ollama_error
from llama.service.refusal import Refusal
from llama.service.tokens import no_queries

OLLAMA_VERSION = "0.18.3"  # the one whose API this is; editors refuse older ones
NEVER = "9999-12-31T00:00:00Z"  # a served model stays in memory
STORED_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class ShowRequest(Body):
    name: str | None = None  # the older name of `model`
    verbose: Ignored = None


def show_response(llm: Llama, call: Call, completions: Sequence[Completion]) -> dict[str, Any]:
    name = call.body.model or call.body.name
    if not name:
        raise Refusal("model: give the model's name", param="model")
    args = llm.model.params
    tokenizer = llm.tokenizer
    return {
        "license": "",
        "modelfile": "",
        "parameters": "",
        "template": tokenizer.chat_template or "",
        "details": details(llm),
        "model_info": {
            "general.architecture": "llama",
            "general.parameter_count": num_parameters(llm),
            "llama.context_length": llm.max_seq_len,
            "llama.embedding_length": args.dim,
            "llama.block_count": args.n_layers,
            "llama.attention.head_count": args.n_heads,
            "llama.attention.head_count_kv": args.n_kv_heads or args.n_heads,
            "llama.rope.freq_base": args.rope_theta,
            "llama.vocab_size": args.vocab_size,
            "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
            "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        },
        "capabilities": ["completion", "tools", "embedding"] if llm.engine.can_generate else ["embedding"],
        "modified_at": modified_at(llm),
    }


def ollama_tags(llm: Llama, name: str, adapters: Sequence[str] = ()) -> dict[str, Any]:
    """/api/tags: the models that there are; an adapter is one."""
    return {"models": [entry(llm, name), *(entry(llm, adapter, name) for adapter in adapters)]}


def ollama_running(llm: Llama, name: str) -> dict[str, Any]:
    """/api/ps: the models in memory."""
    told = entry(llm, name)
    is_on_gpu = next(llm.model.parameters()).device.type != "cpu"
    memory = {"size_vram": told["size"] if is_on_gpu else 0, "context_length": llm.max_seq_len}
    return {"models": [told | memory | {"expires_at": NEVER}]}


def entry(llm: Llama, name: str, parent: str = "") -> dict[str, Any]:
    tensors = [*llm.model.parameters(), *llm.model.buffers()]
    known = "\n".join([name, str(num_parameters(llm)), modified_at(llm)])
    return {
        "name": name,
        "model": name,
        "modified_at": modified_at(llm),
        "size": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "digest": sha256(known.encode()).hexdigest(),  # of what is known at once: reading the weights takes minutes
        "details": details(llm, parent),
    }


def details(llm: Llama, parent: str = "") -> dict[str, Any]:
    return {
        "parent_model": parent,
        "format": llm.checkpoint.format if llm.checkpoint else "",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": in_words(num_parameters(llm)),
        "quantization_level": quantization_level(llm),
    }


def quantization_level(llm: Llama) -> str:
    """The type that most of the weights have in memory, as Ollama writes it: F16, Q4_0."""
    if llm.quantization not in (None, "none"):
        return llm.quantization.upper()
    sizes: Counter[str] = Counter()
    for weight in llm.checkpoint.weights() if llm.checkpoint else ():
        sizes[weight.stored] += weight.nbytes
    stored = max(sizes, key=sizes.__getitem__, default="float32")
    return STORED_NAMES.get(stored, stored.upper())


def num_parameters(llm: Llama) -> int:
    """Of the checkpoint: a packed model holds bytes."""
    if llm.checkpoint:
        return sum(weight.numel for weight in llm.checkpoint.weights())
    return sum(parameter.numel() for parameter in llm.model.parameters())


def in_words(count: int) -> str:
    """135M, 6.7B."""
    if count >= 10**9:
        return f"{count / 10**9:.1f}B"
    return f"{count / 10**6:.0f}M" if count >= 10**6 else f"{count / 10**3:.0f}K"


def modified_at(llm: Llama) -> str:
    seconds = llm.checkpoint.path.stat().st_mtime if llm.checkpoint else 0
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


OLLAMA_SHOW = Endpoint(ShowRequest, no_queries, show_response, error_json=ollama_error)
