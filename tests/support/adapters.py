"""Tiny random models and adapters of every kind, made by PEFT, which also says what they compute."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from support.checkpoints import sample, write_hf, write_sentencepiece

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BIASED = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
KINDS = {  # what LoraConfig gets, and what the base model has
    "linears": ({"target_modules": ALL}, {}),
    "some": ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "fan_in_fan_out": True}, {}),
    "patterns": (
        {
            "target_modules": ALL,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
            "alpha_pattern": {"^model.layers.0.*up_proj": 3, "k_proj": 30},
        },
        {},
    ),
    "rslora": ({"target_modules": ALL, "use_rslora": True}, {}),
    "dora": ({"target_modules": ALL, "use_dora": True}, {}),
    "dora and biases": ({"target_modules": ALL, "use_dora": True, "bias": "all"}, BIASED),
    "lora_bias": ({"target_modules": ALL, "lora_bias": True}, BIASED),
    "biases": ({"target_modules": ALL, "bias": "lora_only"}, BIASED),
    "ends": ({"target_modules": [*ALL, "embed_tokens", "lm_head"]}, {}),
    "dora ends": ({"target_modules": [*ALL, "embed_tokens", "lm_head"], "use_dora": True}, {}),
    "saved": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, {}),
    "tied": ({"target_modules": [*ALL, "embed_tokens"]}, {"tie_word_embeddings": True}),
}


def write_base(path: Path, **changes) -> Path:
    """A tiny model with a tokenizer, in Hugging Face's layout."""
    args, weights = sample(**changes)
    if args.tie_word_embeddings:
        weights.pop("output.weight", None)
    write_hf(path, args, weights, attention_bias=args.attention_bias, mlp_bias=args.mlp_bias)
    write_sentencepiece(path / "tokenizer.model")
    return path


def write_adapter(base: Path, path: Path, seed: int = 0, vocab_size: int | None = None, **config) -> torch.nn.Module:
    """Saves an adapter with random numbers everywhere; returns PEFT's model."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    if vocab_size is not None:
        model.resize_token_embeddings(vocab_size)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.5 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return model.eval()


@torch.no_grad()
def peft_logits(model: torch.nn.Module, tokens: list[int]) -> Tensor:
    """(tokens, vocab_size)"""
    return model(torch.tensor([tokens])).logits[0]
