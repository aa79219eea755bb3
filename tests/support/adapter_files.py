"""Adapters of tiny models as PEFT writes them, with random numbers; nothing here needs PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from support.tiny import tiny_args

RANK = 4


def save_adapter(path: Path, seed: int, whole: dict[str, torch.Tensor] | None = None, **changes: int) -> Path:
    """A directory with an adapter on wq and wo, large enough that other tokens are chosen; and with whole weights."""
    args = tiny_args(**changes)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(args.n_layers):
        for module in ("q_proj", "o_proj"):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(RANK, args.dim, generator=generator)
            tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(args.dim, RANK, generator=generator)
    tensors |= whole or {}
    path.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["q_proj", "o_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")
    return path
