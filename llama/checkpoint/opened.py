"""An opened checkpoint, and what every reader ends with to make one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..files.errors import CheckpointError
from ..files.gguf import GGUFFile
from ..model import ModelArgs
from ..tokenizer import Tokenizer
from .inventory import BIASES, module_of
from .settings import Settings
from .weight import Weight

NO_HEAD = "this format cannot say that there is no output layer: the embedding will be taken for one"
_LAYER = re.compile(r"layers\.(\d{1,6})\.")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its shape and settings are parsed, its weights are headers only until they are read."""

    path: Path
    format: str
    """"meta", "hf" or "gguf"."""
    args: ModelArgs
    """`max_seq_len` is the model's context where the checkpoint or its family tells it."""
    weights: Callable[[], Iterator[Weight]]
    """A new iterator over all weights, in canonical names and rotary order."""
    dtype: torch.dtype | None
    """The type that most stored bytes have; None where low-bit blocks dominate."""
    plain_dtype: torch.dtype | None = None
    """What the weights beside the blocks have, where that is what the model computed in before it was packed."""
    tokenizer_path: Path | None = None
    header: GGUFFile | None = None
    """The open file that holds the tokenizer beside the weights, for GGUF."""
    generation_defaults: dict[str, float] = field(default_factory=dict)
    """`temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty`, as far as the checkpoint gives them."""
    stop_ids: tuple[int, ...] = ()
    unknown_keys: tuple[str, ...] = ()
    """Settings that nothing here reads, for the loader to print."""
    warnings: tuple[str, ...] = ()
    """What was found and not used, one line each, for the loader to print."""
    has_head: bool = True
    """Whether there is an output layer; without one the model embeds, and cannot generate."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The parsed header as it was found: params.json, config.json or scalar GGUF metadata."""

    @property
    def digest(self) -> str:
        """Of what its weights are, by their headers: names, shapes and stored types, and not one value."""
        said = sorted((weight.name, tuple(weight.shape), weight.stored) for weight in self.weights())
        return hashlib.sha256(repr(said).encode()).hexdigest()[:32]

    def open_tokenizer(self, given: str | Path | None = None, chat_template: str | None = None) -> Tokenizer:
        """The tokenizer in the file `given`, else the one that was found with the checkpoint.

        Raises FileNotFoundError where there is none, TokenizerError for a damaged one.
        """
        if given is not None:
            return Tokenizer(given, chat_template)
        if self.tokenizer_path is None:
            raise FileNotFoundError(
                f"no tokenizer in {self.path}, beside it or one directory above: give tokenizer_path"
            )
        return Tokenizer(self.header or self.tokenizer_path, chat_template)


def assemble(
    path: Path,
    format: str,
    args: ModelArgs,
    weights: Sequence[Weight],
    settings: Settings,
    *,
    tied: bool,
    **more: Any,
) -> Checkpoint:
    """A checkpoint of weights under canonical names, once their number and the config agree.

    The weights say which biases there are, and whether the output layer is the embedding; where there is no output
    layer, `tied` does. Raises CheckpointError for weights that occur twice and layers that are not stored.
    """
    validate_layers(args, weights, settings.file)
    by_name = {weight.name: weight for weight in weights}
    for weight in weights:
        if by_name[weight.name] is not weight:
            raise CheckpointError(f"{weight.file}: {weight.name}: occurs twice")
        if module_of(weight.name) and not (weight.dtype.is_floating_point and weight.dtype.itemsize > 1):
            raise CheckpointError(
                f"{weight.file}: {weight.name}: holds {weight.stored}, and the settings do not say what that means"
            )
    if "output.weight" in by_name:
        tied = is_tied(by_name)
    if tied:
        by_name.pop("output.weight", None)
    biases, without_effect = split_biases(weights)
    for name in without_effect:
        del by_name[name]
    args = replace(args, tie_word_embeddings=tied, **{field: field in biases for field in BIASES})
    return Checkpoint(
        path,
        format,
        args,
        weights=lambda: iter(by_name.values()),
        dtype=dominant_dtype(by_name.values()),
        unknown_keys=settings.unknown,
        settings=settings.values,
        **more,
    )


def validate_layers(args: ModelArgs, weights: Sequence[Weight], file: Path) -> None:
    """Raises CheckpointError if the config says more layers than weights are stored for.

    It is the one number that decides how much is built before any weight is looked at.
    """
    found = (_LAYER.match(weight.name) for weight in weights)
    stored = max((int(match[1]) + 1 for match in found if match), default=0)
    if args.n_layers > stored:
        raise CheckpointError(f"{file}: the config says {args.n_layers} layers, but {stored} are stored")


def is_tied(weights: dict[str, Weight]) -> bool:
    """Whether the stored output layer has the values of the embedding."""
    output, embedding = weights["output.weight"], weights.get("tok_embeddings.weight")
    if embedding is None or (output.shape, output.stored) != (embedding.shape, embedding.stored):
        return False
    few = min(16, output.shape[0])
    return torch.equal(output.read(0, 0, few), embedding.read(0, 0, few)) and torch.equal(
        output.read(), embedding.read()
    )


def split_biases(weights: Sequence[Weight]) -> tuple[set[str], list[str]]:
    """The fields of ModelArgs that the stored biases set, and the names of those that only add zeros.

    Some programs write biases for every layer of a model that has none.
    """
    used: set[str] = set()
    zeros: list[tuple[str | None, str]] = []
    for weight in weights:
        module = module_of(weight.name)
        field = module.bias if module else None
        if not weight.name.endswith(".bias") or field in used:
            continue
        if not weight.read().any():
            zeros.append((field, weight.name))
        elif field is not None:
            used.add(field)
    return used, [name for field, name in zeros if field not in used]


def dominant_dtype(weights: Iterable[Weight]) -> torch.dtype | None:
    """The torch type holding most of the stored bytes; None for low-bit blocks."""
    totals: dict[str, int] = {}
    for weight in weights:
        totals[weight.stored] = totals.get(weight.stored, 0) + weight.nbytes
    most = max(totals, key=lambda stored: totals[stored], default="float32")
    dtype = getattr(torch, most, None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None
