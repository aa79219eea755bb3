"""Meta's directories, both ways: `params.json` beside `consolidated.NN.pth`; also Mistral's one safetensors file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...files.errors import CheckpointError
from ...files.json import json_bytes, read_json
from ...files.tensor_file import TensorFile, read_tensor_file
from ...files.writing import Plan
from ...model import ModelArgs, validate_ranks
from ...rotary import DynamicScaling, LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from ..arrays import Joined, Mapped
from ..inventory import EMBEDDING, split_dim
from ..opened import NO_HEAD, Checkpoint, assemble
from ..settings import REQUIRED, Settings, generation_config, rope_scaling, rope_section, validate_args
from ..tokenizer_files import TokenizerFiles, find_tokenizer
from ..weight import Weight

FACTOR_32 = {
    (2048, 16),
    (3072, 28),
}  # (dim, layers) of Llama 3.2 1B and 3B; their files keep it to themselves
ROUNDINGS = (256, 4096, 1024, 512, 128, 64, 32, 16, 8, 4, 2, 1)  # of `multiple_of`; Meta's own values first
MULTIPLIERS = (None, 1.3, 1.2, 1.5, 1.0)
_SHARD = re.compile(r"consolidated\.(\d{2,4})\.pth")
_NO_EFFECT = ("max_batch_size", "model_parallel_size", "vocab_parallel")
_OTHER_MATHEMATICS = (
    "moe", "num_experts", "use_qk_norm", "qk_norm", "nope_layer_interval", "attention_chunk_size", "yarn",
    "vision_chunk_size", "vision_num_cross_attention_layers", "vision_args", "llama_4_scaling", "use_biases",
    "quantization_args", "lora_args",
)  # fmt: skip


def is_meta(path: Path) -> bool:
    """Whether `path` is a directory in Meta's layout."""
    return path.is_dir() and (path / "params.json").is_file() and bool(shard_files(path))


def open_meta(path: Path) -> Checkpoint:
    """Opens a directory in Meta's layout, with any number of shards."""
    settings = Settings(read_json(path / "params.json"), path / "params.json")
    shards = [read_tensor_file(file) for file in shard_files(path)]
    args = _args(settings, shards)
    weights = list(_weights(args, shards))
    defaults, stop_ids, length = generation_config(path)
    args.max_seq_len = settings.integer("max_seq_len") or length or _context(args)
    return assemble(
        path,
        "meta",
        args,
        weights,
        settings,
        tied=settings.boolean("tie_word_embeddings") is not False,
        tokenizer_path=find_tokenizer(path),
        generation_defaults=defaults,
        stop_ids=stop_ids,
    )


def shard_files(path: Path) -> list[Path]:
    """The shards in order: `consolidated.NN.pth` and nothing else where there are any, else every `*.pth`."""
    numbered = {int(match[1]): file for file in path.glob("*.pth") if (match := _SHARD.fullmatch(file.name))}
    missing = sorted(set(range(max(numbered, default=-1) + 1)) - set(numbered))
    if missing:
        gaps = ", ".join(f"consolidated.{number:02d}.pth" for number in missing[:8])
        raise CheckpointError(f"{path}: {gaps} missing, though consolidated.{max(numbered):02d}.pth is there")
    if numbered:
        return [numbered[number] for number in sorted(numbered)]
    single = path / "consolidated.safetensors"  # Mistral ships it beside Hugging Face's files, which say more
    is_alone = single.is_file() and not (path / "config.json").is_file()
    return sorted(path.glob("*.pth")) or [single] * is_alone


def _args(settings: Settings, shards: list[TensorFile]) -> ModelArgs:
    """The model's shape, but for its context; raises CheckpointError for keys that ask for other mathematics."""
    for key in _OTHER_MATHEMATICS:
        settings.refuse(key)
    settings.refuse("causal", True)
    settings.ignore(*_NO_EFFECT)
    dim = settings.integer("dim", REQUIRED)
    theta = settings.number("rope_freq_base", 10000.0)
    args = ModelArgs(
        dim=dim,
        n_layers=settings.integer("n_layers", REQUIRED),
        n_heads=settings.integer("n_heads", REQUIRED),
        n_kv_heads=settings.integer("n_kv_heads"),
        vocab_size=_vocab_size(settings, dim, shards),
        multiple_of=settings.integer("multiple_of", 256),
        ffn_dim_multiplier=settings.number("ffn_dim_multiplier"),
        norm_eps=settings.number("norm_eps", 1e-5),
        hidden_dim=settings.integer("hidden_dim"),
        head_dim=settings.integer("head_dim"),
        rope_theta=settings.number("rope_theta", theta),
        sliding_window=settings.integer("sliding_window"),
    )
    return validate_args(replace(args, rope_scaling=_scaling(settings, args)), settings.file)


def _weights(args: ModelArgs, shards: list[TensorFile]) -> Iterator[Weight]:
    first = shards[0]
    for shard in shards[1:]:
        if difference := sorted(shard.tensors.keys() ^ first.tensors.keys()):
            raise CheckpointError(f"{shard.path}: {difference[0]}: is not in every shard of this directory")
    for name in first.tensors:
        if name.endswith("rope.freqs"):
            continue
        pieces = tuple(Mapped(shard.tensors[name], shard.check) for shard in shards)
        shapes = [piece.shape for piece in pieces]
        if len(shapes[0]) not in (1, 2):
            raise CheckpointError(f"{first.path}: {name}: has shape {list(shapes[0])}; 1 or 2 dimensions are expected")
        dim = _stored_split(args, name, pieces)
        if len(pieces) == 1 or dim is None:
            if len(set(shapes)) > 1:
                raise CheckpointError(f"{first.path}: {name}: has another shape in another shard")
            yield Weight(name, pieces[0], first.path)
            continue
        kinds = {(piece.stored, len(piece.shape), *piece.shape[:dim], *piece.shape[dim + 1 :]) for piece in pieces}
        if len(kinds) > 1:
            raise CheckpointError(f"{first.path}: {name}: the shards' shapes or types do not fit together")
        yield Weight(name, Joined(pieces, dim), first.path)


def _stored_split(args: ModelArgs, name: str, pieces: tuple[Mapped, ...]) -> int | None:
    """The dimension along which the shards of a weight are pieces of it; None: each shard has it whole."""
    if name == EMBEDDING and pieces[0].shape[-1] * len(pieces) == args.dim:
        return 1  # Llama 1 and 2; Llama 3 cuts the vocabulary
    return split_dim(name)


def _vocab_size(settings: Settings, dim: int, shards: list[TensorFile]) -> int:
    """The embedding's rows over all shards; `vocab_size` in params.json may be -1, and must agree otherwise."""
    pieces = [shard.tensors.get(EMBEDDING) for shard in shards]
    for shard, piece in zip(shards, pieces, strict=True):
        if piece is None or piece.ndim != 2:
            raise CheckpointError(f"{shard.path}: {EMBEDDING}: is missing or no matrix")
    is_cut_over_vocabulary = pieces[0].shape[1] == dim
    size = sum(piece.shape[0] for piece in pieces) if is_cut_over_vocabulary else pieces[0].shape[0]
    stated = settings.integer("vocab_size", -1, low=-1)
    if stated not in (-1, size):
        raise settings.error("vocab_size", stated, f"{EMBEDDING} has {size} rows")
    return size


def _scaling(settings: Settings, args: ModelArgs) -> RopeScaling | None:
    """Rope scaling from Meta's own keys, or from a `rope_scaling` object in Hugging Face's words."""
    section = settings.section("rope_scaling")
    stated = settings.number("rope_scaling_factor")
    is_scaled = settings.boolean("use_scaled_rope", False)
    low, high = settings.number("low_freq_factor", 1.0), settings.number("high_freq_factor", 4.0)
    if section is not None:
        return rope_scaling(section)
    if not is_scaled:
        if stated not in (None, 1.0):
            raise settings.error("rope_scaling_factor", stated, "use_scaled_rope is not true")
        return None
    if low >= high:
        raise settings.error("high_freq_factor", high, f"more than low_freq_factor ({low:g}) is needed")
    return Llama3Scaling(_usual_factor(args) if stated is None else stated, low, high)


def _usual_factor(args: ModelArgs) -> float:
    return 32.0 if (args.dim, args.n_layers) in FACTOR_32 else 8.0


def _context(args: ModelArgs) -> int:
    """The context of the family that has this rotary base, since Meta's params.json does not say it."""
    match args.rope_scaling:
        case Llama3Scaling():
            return 131072
        case LinearScaling(factor):
            return int(4096 * factor)
        case YarnScaling(factor, original):
            return int(original * factor)
        case DynamicScaling(_, original):
            return original
    if args.rope_theta == 500000.0:
        return 8192  # Llama 3
    if args.rope_theta > 10000.0:
        return 16384  # Code Llama
    is_first_llama = args.norm_eps <= 1e-6 and args.n_kv_heads == args.n_heads
    return 2048 if is_first_llama else 4096


def plan_meta(
    checkpoint: Checkpoint, tokenizer: TokenizerFiles | None, *, dtype: torch.dtype, shards: int | None = None
) -> Plan:
    """`shards` files in Meta's layout. Raises ValueError for a number that does not divide the model."""
    args, shards = checkpoint.args, shards or 1
    validate_ranks(args, shards)
    is_sentencepiece = tokenizer is not None and tokenizer.is_sentencepiece
    embedding_dim = 1 if is_sentencepiece else 0  # Llama 2's way, Llama 3's way
    weights = list(_with_output(checkpoint))
    files = {
        f"consolidated.{rank:02d}.pth": [
            weight.part(embedding_dim if weight.name == EMBEDDING else split_dim(weight.name), rank, shards).entry(
                weight.name, dtype
            )
            for weight in weights
        ]
        for rank in range(shards)
    }
    plan = Plan(files, warnings=_warnings(args, tokenizer, shards))
    if not checkpoint.has_head:
        plan.warnings.append(NO_HEAD)
    plan.small_files["params.json"] = json_bytes(_params(args, is_sentencepiece))
    if generation := _generation(checkpoint):
        plan.small_files["generation_config.json"] = json_bytes(generation)
    if tokenizer is not None:
        plan.small_files |= tokenizer.for_meta()
    return plan


def _with_output(checkpoint: Checkpoint) -> Iterator[Weight]:
    """Every weight, and the embedding a second time where it is the output layer: the reference wants both."""
    for weight in checkpoint.weights():
        yield weight
        if checkpoint.args.tie_word_embeddings and weight.name == EMBEDDING:
            yield replace(weight, name="output.weight")


def _params(args: ModelArgs, is_sentencepiece: bool) -> dict[str, Any]:
    """params.json: the reference's own keys, and others only where the reference cannot express the model."""
    multiple_of, multiplier = hidden_rounding(args)
    values: dict[str, Any] = {"dim": args.dim, "multiple_of": multiple_of}
    if multiplier is not None:
        values["ffn_dim_multiplier"] = multiplier
    values |= {"n_heads": args.n_heads, "n_layers": args.n_layers, "norm_eps": args.norm_eps}
    if args.n_kv_heads != args.n_heads:
        values["n_kv_heads"] = args.n_kv_heads
    values["vocab_size"] = -1 if is_sentencepiece else args.vocab_size
    if args.rope_theta != 10000.0:
        values["rope_theta"] = args.rope_theta
    if args.head_dim != args.dim // args.n_heads:
        values["head_dim"] = args.head_dim
    if args.sliding_window is not None:
        values["sliding_window"] = args.sliding_window
    return values | _scaling_params(args)


def _scaling_params(args: ModelArgs) -> dict[str, Any]:
    scaling = args.rope_scaling
    if scaling is None:
        return {}
    if scaling != Llama3Scaling(scaling.factor):
        return {"rope_scaling": rope_section(scaling)}
    factor = {} if scaling.factor == _usual_factor(args) else {"rope_scaling_factor": scaling.factor}
    return {"use_scaled_rope": True} | factor


def hidden_rounding(args: ModelArgs) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` from which the reference computes this model's hidden size."""
    for multiplier in MULTIPLIERS:
        for multiple_of in ROUNDINGS:
            if _hidden_dim(args.dim, multiple_of, multiplier) == args.hidden_dim:
                return multiple_of, multiplier
    base = int(8 * args.dim / 3)
    return 1, next(
        multiplier
        for digits in range(3, 18)
        if _hidden_dim(args.dim, 1, multiplier := round((args.hidden_dim + 0.5) / base, digits)) == args.hidden_dim
    )


def _hidden_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    args = ModelArgs(dim=dim, n_heads=1, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
    return args.hidden_dim


def _generation(checkpoint: Checkpoint) -> dict[str, Any]:
    """Sampling defaults and stop ids, and the context as `max_length` where Meta's family would suggest another."""
    values: dict[str, Any] = dict(checkpoint.generation_defaults)
    if checkpoint.stop_ids:
        values["eos_token_id"] = list(checkpoint.stop_ids)
    if checkpoint.args.max_seq_len != _context(checkpoint.args):
        values["max_length"] = checkpoint.args.max_seq_len
    return values


def _warnings(args: ModelArgs, tokenizer: TokenizerFiles | None, shards: int) -> list[str]:
    """What Meta's Llama 2 code lacks to run this model."""
    lacks = {
        f"a rope_theta of {args.rope_theta:g}": args.rope_theta != 10000.0,
        "rope scaling": args.rope_scaling is not None,
        f"a head_dim of {args.head_dim}": args.head_dim != args.dim // args.n_heads,
        "a sliding window": args.sliding_window is not None,
        f"a vocabulary of {args.vocab_size} over {shards} shards": args.vocab_size % shards,
        "biases": args.attention_bias or args.attention_output_bias or args.mlp_bias,
        "this kind of tokenizer": tokenizer is not None and not tokenizer.is_sentencepiece,
    }
    lines = [f"Meta's Llama 2 code cannot run this model: it lacks {what}" for what, wrong in lacks.items() if wrong]
    return lines if tokenizer is not None else [*lines, "no tokenizer was found; put a tokenizer.model there"]
