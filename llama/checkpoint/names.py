"""One table of the names that formats give a weight, and the two rotary orders.

Canonical are Meta's names and Meta's rotary order: in each head of `wq` and `wk`, rows 2i and 2i+1 rotate together.
Hugging Face's order puts the even rows of a head first and the odd ones after. GGUF files of the llama family keep
Meta's order (llama.cpp's converter restores it).
"""

from __future__ import annotations

import re

from torch import Tensor

MODULES = (
    # canonical, Hugging Face, GGUF; N stands for the layer
    ("tok_embeddings", "model.embed_tokens", "token_embd"),
    ("layers.N.attention_norm", "model.layers.N.input_layernorm", "blk.N.attn_norm"),
    ("layers.N.attention.wq", "model.layers.N.self_attn.q_proj", "blk.N.attn_q"),
    ("layers.N.attention.wk", "model.layers.N.self_attn.k_proj", "blk.N.attn_k"),
    ("layers.N.attention.wv", "model.layers.N.self_attn.v_proj", "blk.N.attn_v"),
    ("layers.N.attention.wo", "model.layers.N.self_attn.o_proj", "blk.N.attn_output"),
    ("layers.N.ffn_norm", "model.layers.N.post_attention_layernorm", "blk.N.ffn_norm"),
    ("layers.N.feed_forward.w1", "model.layers.N.mlp.gate_proj", "blk.N.ffn_gate"),
    ("layers.N.feed_forward.w2", "model.layers.N.mlp.down_proj", "blk.N.ffn_down"),
    ("layers.N.feed_forward.w3", "model.layers.N.mlp.up_proj", "blk.N.ffn_up"),
    ("norm", "model.norm", "output_norm"),
    ("output", "lm_head", "output"),
)
FROM_HF = {hf: canonical for canonical, hf, _ in MODULES}
FROM_GGUF = {gguf: canonical for canonical, _, gguf in MODULES}
TO_HF = {canonical: hf for canonical, hf, _ in MODULES}
TO_GGUF = {canonical: gguf for canonical, _, gguf in MODULES}

ROTARY = ("wq", "wk")
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


def module_name(name: str) -> str:
    """The last module name of a weight: "wq" of "layers.3.attention.wq.weight"."""
    return name.split(".")[-2] if "." in name else name


def is_rotary(name: str) -> bool:
    """Whether the rows of this weight or bias have a rotary order."""
    return module_name(name) in ROTARY


def interleave(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads in Hugging Face's order, as a view (heads, head_dim / 2, 2, ...) in Meta's."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2)


def deinterleave(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads in Meta's order, as a view (heads, 2, head_dim / 2, ...) in Hugging Face's."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2)
