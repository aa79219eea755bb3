"""What a server tells of its model: to OpenAI's clients, to vLLM's and llama.cpp's tools, to lm-eval."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from llama.chat import usable_formats
from llama.engine import EngineStats
from llama.generation import Llama
from llama.server.adapters import ServedAdapter, ServedAdapters
from llama.server.engine_thread import EngineThread
from llama.service.ollama_model import num_parameters
from llama.version import VERSION


@dataclass(frozen=True)
class ServedModel:
    """The model under the name that clients know it by."""

    llm: Llama
    name: str
    adapters: ServedAdapters
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, llm: Llama, name: str | None, thread: EngineThread) -> ServedModel:
        path = llm.checkpoint and Path(llm.checkpoint.path)
        own = path.resolve() if path else Path("model")
        return cls(llm, name or (own.stem if own.suffix == ".gguf" else own.name), ServedAdapters(llm, thread))

    @property
    def path(self) -> str:
        return str(self.llm.checkpoint.path) if self.llm.checkpoint else self.name

    @cached_property
    def num_parameters(self) -> int:
        return num_parameters(self.llm)

    def to_json(self) -> dict[str, Any]:
        """OpenAI's object, with vLLM's and llama.cpp's further keys."""
        args, parameters = self.llm.model.params, list(self.llm.model.parameters())
        buffers = list(self.llm.model.buffers())
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "llama",
            "root": self.name,
            "parent": None,
            "max_model_len": self.llm.max_seq_len,
            "permission": [],
            "status": {"value": "loaded"},
            "meta": {
                "n_ctx_train": args.max_seq_len,
                "n_vocab": args.vocab_size,
                "n_embd": args.dim,
                "n_params": self.num_parameters,
                "size": sum(t.numel() * t.element_size() for t in parameters + buffers),
            },
        }

    def adapter_json(self, adapter: ServedAdapter) -> dict[str, Any]:
        """OpenAI's object of one of its adapters, with vLLM's `parent`; `root` is the name of its file or directory."""
        return {
            "id": adapter.name,
            "object": "model",
            "created": adapter.created,
            "owned_by": "llama",
            "root": adapter.file_name,
            "parent": self.name,
            "max_model_len": self.llm.max_seq_len,
            "permission": [],
            "status": {"value": "loaded"},
        }

    def props(self, stats: EngineStats) -> dict[str, Any]:
        """llama.cpp's /props: what its clients look up before they ask."""
        tokenizer = self.llm.tokenizer
        return {
            "default_generation_settings": {"n_ctx": self.llm.max_seq_len},
            "total_slots": max(1, stats.num_running + stats.num_waiting),
            "model_alias": self.name,
            "model_path": self.name,
            "chat_template": tokenizer.chat_template or "",
            "bos_token": control_text(self.llm, tokenizer.bos_id),
            "eos_token": control_text(self.llm, tokenizer.eos_id),
            "modalities": {"vision": False, "audio": False},
            "stop": list(self.llm.chat_format.stop),  # ours, with the next: what ends an answer of a chat
            "stop_token_ids": sorted(self.llm.chat_format.stop_ids),
            "chat_formats": usable_formats(tokenizer),  # ours: the names that a chat's chat_template may be
            "build_info": f"llama-native {VERSION}",
        }

    def tokenizer_info(self) -> dict[str, Any]:
        """vLLM's /tokenizer_info, which lm-eval reads."""
        tokenizer = self.llm.tokenizer
        ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        return {
            "tokenizer_class": tokenizer.kind,
            "vocab_size": tokenizer.n_words,
            "model_max_length": self.llm.max_seq_len,
            "add_bos_token": tokenizer.add_bos,
            "chat_template": tokenizer.chat_template,
            **{f"{name}_token": control_text(self.llm, token) for name, token in ids.items()},
            **{f"{name}_token_id": token if token >= 0 else None for name, token in ids.items()},
        }


def unloaded(name: str, path: Path) -> dict[str, Any]:
    """OpenAI's object for a model that could be served instead, marked as llama.cpp marks it."""
    created = int(path.stat().st_mtime)
    return {"id": name, "object": "model", "created": created, "owned_by": "llama", "status": {"value": "unloaded"}}


def control_text(llm: Llama, token: int) -> str | None:
    """How a control token is written; None where there is no such token."""
    return next((text for text, id in llm.tokenizer.special_tokens.items() if id == token), None)


def slots(stats: EngineStats) -> list[dict[str, Any]]:
    """llama.cpp's /slots: as many as are at work, and one that is free."""
    return [{"id": i, "is_processing": i < stats.num_running} for i in range(stats.num_running + 1)]
