"""The weights that a model has, kept once: their names in every format, where ranks cut them, how their rows lie.

Canonical are Meta's names and Meta's rotary order: in each head of `wq` and `wk`, rows 2i and 2i+1 rotate together.
Hugging Face's order puts the even rows of a head first and the odd ones after. GGUF files of the llama family keep
Meta's order (llama.cpp's converter restores it).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from ..model import ModelArgs, Transformer


@dataclass(frozen=True)
class Module:
    """A module that has a weight, by its name in Meta's, Hugging Face's and GGUF's words; N stands for the layer."""

    name: str
    hf: str
    gguf: str
    split: int | None = None
    """The dimension along which ranks cut its matrix; None: every rank has all of it."""
    bias: str | None = None
    """The field of ModelArgs that says whether it has a bias; None: it never has."""
    is_rotary: bool = False
    """Whether its rows have a rotary order."""

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer: every matrix but the embedding."""
        return self.split is not None and self.name != "tok_embeddings"


QKV, OUT, MLP = BIASES = ("attention_bias", "attention_output_bias", "mlp_bias")
MODULES = (
    # the vocabulary is cut for embedding and output layer alike, so that tied weights stay one tensor
    Module("tok_embeddings", "model.embed_tokens", "token_embd", 0),
    Module("layers.N.attention_norm", "model.layers.N.input_layernorm", "blk.N.attn_norm"),
    Module("layers.N.attention.wq", "model.layers.N.self_attn.q_proj", "blk.N.attn_q", 0, QKV, is_rotary=True),
    Module("layers.N.attention.wk", "model.layers.N.self_attn.k_proj", "blk.N.attn_k", 0, QKV, is_rotary=True),
    Module("layers.N.attention.wv", "model.layers.N.self_attn.v_proj", "blk.N.attn_v", 0, QKV),
    Module("layers.N.attention.wo", "model.layers.N.self_attn.o_proj", "blk.N.attn_output", 1, OUT),
    Module("layers.N.ffn_norm", "model.layers.N.post_attention_layernorm", "blk.N.ffn_norm"),
    Module("layers.N.feed_forward.w1", "model.layers.N.mlp.gate_proj", "blk.N.ffn_gate", 0, MLP),
    Module("layers.N.feed_forward.w2", "model.layers.N.mlp.down_proj", "blk.N.ffn_down", 1, MLP),
    Module("layers.N.feed_forward.w3", "model.layers.N.mlp.up_proj", "blk.N.ffn_up", 0, MLP),
    Module("norm", "model.norm", "output_norm"),
    Module("output", "lm_head", "output", 0),
)
EMBEDDING = "tok_embeddings.weight"
OUTPUT = "output.weight"
FROM_HF = {module.hf: module.name for module in MODULES}
FROM_GGUF = {module.gguf: module.name for module in MODULES}
TO_HF = {module.name: module.hf for module in MODULES}
TO_GGUF = {module.name: module.gguf for module in MODULES}

_BY_NAME = {module.name: module for module in MODULES}
_LAYER = re.compile(r"\.(0|[1-9]\d{0,5})\.")


def rename(name: str, table: dict[str, str]) -> str | None:
    """`name` in another format's words, weight or bias alike; None where the table does not know it."""
    module, _, kind = name.rpartition(".")
    layer = _LAYER.search(module)
    pattern = _LAYER.sub(".N.", module, count=1)
    if kind not in ("weight", "bias") or pattern not in table:
        return None
    renamed = table[pattern]
    return f"{renamed.replace('.N.', f'.{layer[1]}.') if layer else renamed}.{kind}"


def module_of(name: str) -> Module | None:
    """The module that a weight or bias of this canonical name belongs to; None for a name that no model has."""
    return _BY_NAME.get(_LAYER.sub(".N.", name.rpartition(".")[0], count=1))


def split_dim(name: str) -> int | None:
    """The dimension along which this weight or bias is cut over ranks; None: every rank has it whole."""
    module = module_of(name)
    if module is None or (name.endswith(".bias") and module.split == 1):
        return None
    return module.split


def is_held(name: str, rank: int) -> bool:
    """Whether this rank has any of this weight: a bias after a cut along columns is rank 0's alone to add."""
    module = module_of(name)
    return rank == 0 or module is None or not (name.endswith(".bias") and module.split == 1)


def is_linear(name: str) -> bool:
    """Whether this is the matrix of a linear layer."""
    module = module_of(name)
    return name.endswith(".weight") and module is not None and module.is_linear


def is_rotary(name: str) -> bool:
    """Whether the rows of this weight or bias have a rotary order."""
    module = module_of(name)
    return module is not None and module.is_rotary


def expected_shapes(args: ModelArgs) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Canonical name and whole shape of every weight that a model of this shape has."""
    with torch.device("meta"):
        model = Transformer(replace(args, n_layers=1))  # layers are all alike, and each takes a while to make
    for in_layer, weights in groupby(model.named_parameters(), lambda weight: weight[0].startswith("layers.")):
        shapes = [(name.removeprefix("layers.0."), tuple(parameter.shape)) for name, parameter in weights]
        for prefix in (f"layers.{number}." for number in range(args.n_layers)) if in_layer else ("",):
            yield from ((prefix + name, shape) for name, shape in shapes)


def interleave(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads in Hugging Face's order, as a view (heads, head_dim / 2, 2, ...) in Meta's."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2)


def deinterleave(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads in Meta's order, as a view (heads, 2, head_dim / 2, ...) in Hugging Face's."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2)
