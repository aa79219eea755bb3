"""Meta's directories: `params.json` beside `consolidated.NN.pth`, or Mistral's `consolidated.safetensors`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..files.json import read_json
from ..files.tensor_file import TensorFile, read_tensor_file
from ..model import ModelArgs
from ..parallel import SPLIT
from ..rotary import LinearScaling, Llama3Scaling, RopeScaling
from .arrays import Joined, Mapped
from .names import module_name
from .settings import REQUIRED, Settings, check_args, generation_settings, rope_scaling
from .shapes import check_layers, is_tied
from .tokenizer_files import find_tokenizer
from .weight import Checkpoint, CheckpointError, Weight, dominant_dtype

IGNORED = ("rope.freqs",)
FACTOR_32 = {
    (2048, 16),
    (3072, 28),
}  # (dim, layers) of Llama 3.2 1B and 3B; their files keep it to themselves
_SHARD = re.compile(r"consolidated\.(\d{2,4})\.pth")
_NO_EFFECT = ("max_batch_size", "model_parallel_size", "vocab_parallel", "tie_word_embeddings")
_OTHER_MATHEMATICS = (
    "moe", "num_experts", "use_qk_norm", "qk_norm", "nope_layer_interval", "attention_chunk_size", "yarn",
    "vision_chunk_size", "vision_num_cross_attention_layers", "vision_args", "llama_4_scaling", "use_biases",
    "quantization_args", "lora_args",
)  # fmt: skip


def recognises(path: Path) -> bool:
    """Whether `path` is a directory in Meta's layout."""
    return path.is_dir() and (path / "params.json").is_file() and bool(shard_files(path))


def open_meta(path: Path) -> Checkpoint:
    """Opens a directory in Meta's layout, with any number of shards."""
    settings = Settings(read_json(path / "params.json"), path / "params.json")
    shards = [read_tensor_file(file) for file in shard_files(path)]
    args = read_args(settings, shards)
    weights = list(_weights(args, shards))
    check_layers(args, weights, settings.file)
    if settings.boolean("tie_word_embeddings") is not False:
        args.tie_word_embeddings = is_tied(weights)
    if args.tie_word_embeddings:
        weights = [weight for weight in weights if weight.name != "output.weight"]
    defaults, stop_ids, length = _generation_config(path)
    args.max_seq_len = settings.integer("max_seq_len") or length or context(args)
    return Checkpoint(
        path=path,
        format="meta",
        args=args,
        weights=lambda: iter(weights),
        dtype=dominant_dtype(iter(weights)),
        tokenizer_path=find_tokenizer(path),
        generation_defaults=defaults,
        stop_ids=stop_ids,
        unknown_keys=settings.unknown,
        settings=settings.values,
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


def read_args(settings: Settings, shards: list[TensorFile]) -> ModelArgs:
    """The model's shape, but for its context; raises CheckpointError for keys that ask for other mathematics."""
    for key in _OTHER_MATHEMATICS:
        settings.refuse(key)
    settings.refuse("causal", True)
    settings.ignore(*_NO_EFFECT)
    dim = settings.integer("dim", REQUIRED)
    first = shards[0].tensors
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
        attention_bias="layers.0.attention.wq.bias" in first,
        attention_output_bias="layers.0.attention.wo.bias" in first,
        mlp_bias="layers.0.feed_forward.w1.bias" in first,
        sliding_window=settings.integer("sliding_window"),
    )
    return check_args(replace(args, rope_scaling=_scaling(settings, args)), settings.file)


def _weights(args: ModelArgs, shards: list[TensorFile]) -> Iterator[Weight]:
    first = shards[0]
    for shard in shards[1:]:
        if difference := sorted(shard.tensors.keys() ^ first.tensors.keys()):
            raise CheckpointError(f"{shard.path}: {difference[0]}: is not in every shard of this directory")
    for name in first.tensors:
        if name in IGNORED:
            continue
        pieces = tuple(Mapped(shard.tensors[name], shard.check) for shard in shards)
        shapes = [piece.shape for piece in pieces]
        if len(shapes[0]) not in (1, 2):
            raise CheckpointError(
                f"{first.path}: {name}: has shape {list(shapes[0])}; 1 or 2 dimensions are expected"
            )
        dim = _stored_split(args, name, pieces)
        if len(pieces) == 1 or dim is None:
            if len(set(shapes)) > 1:
                raise CheckpointError(f"{first.path}: {name}: has another shape in another shard")
            yield Weight(name, pieces[0], first.path)
            continue
        if (
            len(
                {
                    (piece.stored, len(piece.shape), *piece.shape[:dim], *piece.shape[dim + 1 :])
                    for piece in pieces
                }
            )
            > 1
        ):
            raise CheckpointError(f"{first.path}: {name}: the shards' shapes or types do not fit together")
        yield Weight(name, Joined(pieces, dim), first.path)


def _stored_split(args: ModelArgs, name: str, pieces: tuple[Mapped, ...]) -> int | None:
    """The dimension along which the shards of a weight are pieces of it; None: each shard has it whole."""
    module = module_name(name)
    if name.endswith(".bias"):
        return 0 if SPLIT.get(module) == 0 else None
    if module == "tok_embeddings" and pieces[0].shape[-1] * len(pieces) == args.dim:
        return 1  # Llama 1 and 2; Llama 3 cuts the vocabulary
    return SPLIT.get(module)


def _vocab_size(settings: Settings, dim: int, shards: list[TensorFile]) -> int:
    """The embedding's rows over all shards; `vocab_size` in params.json may be -1, and must agree otherwise."""
    pieces = [shard.tensors.get("tok_embeddings.weight") for shard in shards]
    for shard, piece in zip(shards, pieces, strict=True):
        if piece is None or piece.ndim != 2:
            raise CheckpointError(f"{shard.path}: tok_embeddings.weight: is missing or no matrix")
    is_cut_over_vocabulary = pieces[0].shape[1] == dim
    size = sum(piece.shape[0] for piece in pieces) if is_cut_over_vocabulary else pieces[0].shape[0]
    stated = settings.integer("vocab_size", -1, low=-1)
    if stated not in (-1, size):
        raise settings.error("vocab_size", stated, f"tok_embeddings.weight has {size} rows")
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
    inferred = 32.0 if (args.dim, args.n_layers) in FACTOR_32 else 8.0
    return Llama3Scaling(inferred if stated is None else stated, low, high)


def _generation_config(path: Path) -> tuple[dict[str, float], tuple[int, ...], int | None]:
    file = path / "generation_config.json"
    return generation_settings(Settings(read_json(file), file)) if file.is_file() else ({}, (), None)


def context(args: ModelArgs) -> int:
    """The context of the family that has this rotary base, since Meta's params.json does not say it."""
    match args.rope_scaling:
        case Llama3Scaling():
            return 131072
        case LinearScaling(factor):
            return int(4096 * factor)
    if args.rope_theta == 500000.0:
        return 8192  # Llama 3
    if args.rope_theta > 10000.0:
        return 16384  # Code Llama
    is_first_llama = args.norm_eps <= 1e-6 and args.n_kv_heads == args.n_heads
    return 2048 if is_first_llama else 4096
