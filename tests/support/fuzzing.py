"""What is fuzzed: for each kind of input good samples, and what must hold of whatever is made of them.

A target's `check` raises for a finding alone: what people can cause must have become the error that its module
promises. `benchmarks/fuzz.py` runs all of them for as long as one likes, `tests/test_corpus.py` for some seconds.
"""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from llama import Llama, Tokenizer
from llama.chat.tools import TOOL_FORMATS, Spoken, ToolParser
from llama.checkpoint import CheckpointError, open_adapter, open_checkpoint
from llama.service import ENDPOINTS, Call, Refusal
from llama.tokenizer import TokenizerError
from support.checkpoints import sample, state, write_gguf, write_hf, write_meta
from support.hostile import fuzzed
from support.tiny import ByteTokenizer, tiny_args, tiny_model
from support.vocabularies import make_files

HEADER = 6000  # bytes at a file's beginning and end in which most changes fall: what lies between is numbers


class Target(ABC):
    """A kind of input; `folder` is its own, and may hold files."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)
        self.samples = list(self.make())

    @abstractmethod
    def make(self) -> Iterator[bytes]:
        """Good inputs."""

    @abstractmethod
    def check(self, data: bytes) -> None:
        """Raises where something is wrong about how `data` is handled."""

    def inputs(self, chance: random.Random) -> Iterator[bytes]:
        """Damaged inputs, without end; one in fifty is cut off."""
        while True:
            data = chance.choice(self.samples)
            if chance.random() < 0.02:
                yield data[: chance.randrange(len(data))]
            else:
                yield from fuzzed(data, places(len(data)), 1, chance)


def places(length: int) -> list[int]:
    if length <= 2 * HEADER:
        return list(range(length))
    return [*range(HEADER), *range(length - HEADER, length)]


def one_line(error: Exception) -> None:
    assert "\n" not in str(error), f"an error of several lines: {error}"


class FileTarget(Target):
    """A file of a checkpoint, which is opened and read whole."""

    def check(self, data: bytes) -> None:
        self.file.write_bytes(data)
        try:
            state(open_checkpoint(self.path))
        except (CheckpointError, FileNotFoundError) as error:
            one_line(error)

    def tiny(self) -> tuple:
        return sample(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=24, hidden_dim=20, head_dim=8)


class GGUF(FileTarget):
    def make(self) -> Iterator[bytes]:
        self.path = self.file = write_gguf(self.folder / "model.gguf", *self.tiny())
        yield self.file.read_bytes()


class Safetensors(FileTarget):
    def make(self) -> Iterator[bytes]:
        self.path = write_hf(self.folder / "model", *self.tiny(), head_dim=8)
        self.file = self.path / "model.safetensors"
        yield self.file.read_bytes()


class TorchZip(FileTarget):
    def make(self) -> Iterator[bytes]:
        self.path = write_meta(self.folder / "model", *self.tiny(), hidden_dim=20, head_dim=8)
        self.file = self.path / "consolidated.00.pth"
        yield self.file.read_bytes()


class Config(FileTarget):
    def make(self) -> Iterator[bytes]:
        self.path = write_hf(self.folder / "model", *self.tiny(), head_dim=8)
        self.file = self.path / "config.json"
        yield self.file.read_bytes()


class Params(FileTarget):
    def make(self) -> Iterator[bytes]:
        self.path = write_meta(self.folder / "model", *self.tiny(), hidden_dim=20, head_dim=8)
        self.file = self.path / "params.json"
        yield self.file.read_bytes()


class Tokenizers(Target):
    """Vocabularies of every kind."""

    def make(self) -> Iterator[bytes]:
        for path in make_files(self.folder).values():
            yield path.read_bytes()
        self.file = self.folder / "fuzzed"

    def check(self, data: bytes) -> None:
        self.file.write_bytes(data)
        try:
            tokenizer = Tokenizer(self.file)
            tokenizer.decode(tokenizer.encode("a b 1\u00e9", bos=False, eos=False))
        except (TokenizerError, ValueError) as error:
            one_line(error)


ADAPTER_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}


class Adapters(Target):
    """Both files of a PEFT directory; a byte in front says which one `data` is."""

    def make(self) -> Iterator[bytes]:
        import torch
        from safetensors.torch import save

        self.args, _ = sample(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=24, hidden_dim=20, head_dim=8)
        name = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": torch.ones(16, 2)}
        self.good = {
            b"c": ("adapter_config.json", json.dumps(ADAPTER_CONFIG).encode()),
            b"t": ("adapter_model.safetensors", save(tensors)),
        }
        for kind, (_, data) in self.good.items():
            yield kind + data

    def check(self, data: bytes) -> None:
        for kind, (name, good) in self.good.items():
            (self.folder / name).write_bytes(data[1:] if data[:1] == kind else good)
        try:
            for low_rank in open_adapter(self.folder).fitted(self.args).low_rank.values():
                low_rank.delta()
        except (CheckpointError, FileNotFoundError) as error:
            one_line(error)


BODIES = {
    "/v1/chat/completions": {
        "model": "m", "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": [
            {"type": "text", "text": "hi"}]}], "temperature": 0.5, "n": 1, "stop": ["a"], "logit_bias": {"5": -1.5},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "integer"}}},
    },
    "/v1/completions": {"model": "m", "prompt": ["a", "b"], "max_tokens": 3, "logprobs": 2, "echo": True, "seed": 1},
    "/v1/embeddings": {"model": "m", "input": [[5, 6], [7]], "encoding_format": "base64"},
    "/v1/messages": {"model": "m", "max_tokens": 5, "system": "s", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"model": "m", "input": [{"role": "user", "content": "hi"}], "text": {"format": {"type": "text"}}},
}  # fmt: skip


class HTTPBodies(Target):
    """Bodies of every API: a line with the path, then JSON, damaged as bytes or, more often, as values."""

    def make(self) -> Iterator[bytes]:
        self.llm = Llama(tiny_model(tiny_args()), ByteTokenizer(), chat_format="alpaca")
        for path, body in BODIES.items():
            yield f"{path}\n{json.dumps(body)}".encode()

    def inputs(self, chance: random.Random) -> Iterator[bytes]:
        bytewise = super().inputs(chance)
        while True:
            if chance.random() < 0.3:
                yield next(bytewise)
            else:
                path, body = chance.choice(list(BODIES.items()))
                yield f"{path}\n{json.dumps(mutated(chance, body))}".encode()

    def check(self, data: bytes) -> None:
        path, _, content = data.partition(b"\n")
        endpoint = ENDPOINTS.get(path.decode(errors="replace"))
        if endpoint is None:
            return
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):  # the server's own parser answers these: tests/server/test_hostile.py
            return
        try:
            Call.open(self.llm, endpoint, body)
        except Refusal as refusal:
            one_line(refusal)


ODD = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 1e308, 0.1, "", "x", "\x00", "\ud800", "a" * 300,
    [], {}, [[]], {"a": {}},
)  # fmt: skip


def mutated(chance: random.Random, value: object, depth: int = 0) -> object:
    """A copy in which something is odd, gone, doubled, or deep."""
    if depth and chance.random() < 0.12:
        return chance.choice(ODD) if chance.random() < 0.9 else nested(chance.randrange(1, 60))
    if isinstance(value, dict):
        changed = {key: mutated(chance, one, depth + 1) for key, one in value.items() if chance.random() > 0.04}
        if chance.random() < 0.1:
            changed[chance.choice(["n", "stop", "stream", "tool_choice", "seed", "x", "min_tokens"])] = chance.choice(
                ODD
            )
        return changed
    if isinstance(value, list):
        changed = [mutated(chance, one, depth + 1) for one in value]
        return changed * 2 if chance.random() < 0.05 else changed
    return value


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


CALLS = (
    '<tool_call>\n{"name": "f", "arguments": {"a": [1, {"b": "}\\""}]}}\n</tool_call>',
    'text <tool_call>{"name": "f"}</tool_call> more',
    '{"name": "f", "parameters": {"a": "\\u00e9"}}; {"name": "f", "parameters": {}}',
    "[f(a='x', n=[1, (2, None)]), f(b=True)]",
    '<|python_tag|>f.call(query="the ) sea")',
    '[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "123456789"}]',
    '[TOOL_CALLS]f[ARGS]{"a": 1}',
    '<function=f>{"a": 1}</function>',
)


class ToolCalls(Target):
    """What a model writes, cut at any places: nothing raises, and the pieces say what the whole does."""

    def make(self) -> Iterator[bytes]:
        for format in TOOL_FORMATS:
            for text in CALLS:
                yield f"{format}\n{text}".encode()

    def check(self, data: bytes) -> None:
        name, _, text = data.decode(errors="replace").partition("\n")
        if name not in TOOL_FORMATS:
            return
        cuts = random.Random(len(text))
        pieces, rest = [], text
        while rest:
            size = cuts.randint(1, 9)
            pieces.append(rest[:size])
            rest = rest[size:]
        assert self.said(name, [text]) == self.said(name, pieces), "pieces say something else than the whole"

    def said(self, name: str, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
        parser = ToolParser(TOOL_FORMATS[name](), ["f"])
        spoken = Spoken.of([one for piece in pieces for one in parser.push(piece)] + parser.end())
        return spoken.content, [(call.name, call.arguments) for call in spoken.calls]


TARGETS: dict[str, type[Target]] = {
    "gguf": GGUF,
    "safetensors": Safetensors,
    "torch zip": TorchZip,
    "config.json": Config,
    "params.json": Params,
    "tokenizers": Tokenizers,
    "adapters": Adapters,
    "HTTP bodies": HTTPBodies,
    "tool calls": ToolCalls,
}
