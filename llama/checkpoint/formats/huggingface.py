"""Hugging Face directories, both ways: `config.json` beside safetensors or `.bin` files, one or many by an index."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...files.errors import CheckpointError, shown
from ...files.json import json_bytes, read_json
from ...files.tensor_file import TensorFile, read_tensor_file
from ...files.writing import Entry, Plan
from ...model import ModelArgs
from ...rotary import DynamicScaling, LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from ..arrays import Array, Mapped, Reordered
from ..inventory import FROM_HF, TO_HF, deinterleave, expected_shapes, interleave, is_rotary, rename
from ..opened import Checkpoint, assemble
from ..settings import (
    REQUIRED,
    Settings,
    generation_config,
    rope_scaling,
    rope_section,
    validate_args,
)
from ..tokenizer_files import TokenizerFiles, find_tokenizer
from ..weight import Weight
from .weight_files import WeightFiles, find_weight_files, is_there

StoredArray = tuple[str, Array, Path]
"""A matrix or vector as it is stored: its name there, the array, the file."""
Decode = Callable[[Settings, ModelArgs, list[TensorFile]], Iterator[StoredArray]]
"""How the tensors of the files are to be understood, for a config and a model's shape."""

DEFAULTS: dict[str, dict[str, int]] = {
    # model_type: what transformers takes for keys that are not there
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    # the same mathematics under other names
    "aquila": {"max_position_embeddings": 2048},
    "xverse": {"max_position_embeddings": 2048},
}
ARCHITECTURES = (
    "LlamaForCausalLM", "MistralForCausalLM", "LlamaModel", "MistralModel",
    "LLaMAForCausalLM", "AquilaForCausalLM", "AquilaModel", "XverseForCausalLM",
)  # fmt: skip
HEAD = "lm_head.weight"  # without it the embedding may be the output layer
MAX_SHARD_SIZE = 5_000_000_000

_WITHOUT_EFFECT = re.compile(  # tensors that the model does not use: buffers, scales of a cache in 8 bits
    r"rotary_emb\.\w+$|self_attn\.(masked_)?bias$"
    r"|self_attn\.((\w+\.)?(k|v|kv|q|qkv|attn|prob)|[kv]_proj\.output)_(scale|zero_point)$"
)
_NO_EFFECT = (
    "_name_or_path", "torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range", "pretraining_tp",
    "attention_dropout", "hidden_dropout", "bos_token_id", "pad_token_id", "unk_token_id", "output_attentions",
    "output_hidden_states", "return_dict", "is_encoder_decoder", "is_llama_config", "rope_interleaved",
    "max_sequence_length", "tokenizer_class", "id2label", "label2id", "_attn_implementation", "max_window_layers",
    "chunk_size_feed_forward", "problem_type", "task_specific_params", "finetuning_task", "tokenizer_model_max_length",
    "attention_bias", "mlp_bias", "quantization_config", "bigdl_lcmu_enabled",
)  # fmt: skip
_OTHER_MATHEMATICS = (
    "num_local_experts", "num_experts", "num_experts_per_tok", "qk_norm", "use_qk_norm", "attn_logit_softcapping",
    "final_logit_softcapping", "logit_softcapping", "embedding_multiplier", "logits_scaling", "logit_scale",
    "residual_multiplier", "attention_multiplier", "scale_embeddings", "scale_emb", "no_rope_layers", "alibi",
    "parallel_attention", "layer_types", "attention_chunk_size", "add_cross_attention", "cross_attention_layers",
    "vision_config", "text_config", "use_sliding_window",
)  # fmt: skip


def is_huggingface(path: Path) -> bool:
    """Whether `path` is a Hugging Face directory; a config.json beside GGUF files alone does not make it one."""
    has_config = path.is_dir() and (path / "config.json").is_file()
    return has_config and (is_there(path) or not any(path.glob("*.gguf")))


def config_settings(path: Path) -> Settings:
    """A directory's config.json."""
    return Settings(read_json(path / "config.json"), path / "config.json")


def plain_arrays(settings: Settings, args: ModelArgs, files: list[TensorFile]) -> Iterator[StoredArray]:
    """Numbers as they are."""
    for file in files:
        for name, tensor in file.tensors.items():
            if name.endswith(".qweight"):
                module = name.removesuffix(".qweight")
                raise CheckpointError(f"{file.path}: {module}: is in four bits, but no config names the method")
            yield name, Mapped(tensor, file.check), file.path


def open_huggingface(path: Path, decode: Decode = plain_arrays) -> Checkpoint:
    """Opens a Hugging Face directory of a llama- or mistral-shaped model."""
    settings = config_settings(path)
    found = find_weight_files(path)
    files = [read_tensor_file(file) for file in found.files]
    args, stop_ids = _args(settings)
    _validate_names(found, files)
    weights = list(_weights(args, decode(settings, args, files)))
    defaults, more_stop_ids, _ = generation_config(path)
    is_base = any(name.endswith("Model") for name in settings.texts("architectures"))
    has_head = args.tie_word_embeddings or not is_base or any(one.name == "output.weight" for one in weights)
    return assemble(
        path,
        "hf",
        args,
        weights,
        settings,
        tied=args.tie_word_embeddings or not has_head,
        tokenizer_path=find_tokenizer(path, ("tokenizer.json", "tokenizer.model")),
        generation_defaults=defaults,
        stop_ids=tuple(dict.fromkeys(stop_ids + more_stop_ids)),
        warnings=found.passed_over,
        has_head=has_head,
    )


def _args(settings: Settings) -> tuple[ModelArgs, tuple[int, ...]]:
    """The model's shape and stop ids; raises CheckpointError for keys that ask for other mathematics."""
    _refuse_other_architectures(settings)
    stop_ids = settings.ids("eos_token_id")
    defaults = DEFAULTS[settings.text("model_type", "llama")]
    context = settings.integer("max_position_embeddings", defaults["max_position_embeddings"])
    rope, scaling = settings.section("rope_parameters"), settings.section("rope_scaling")
    theta = settings.number("rope_theta", 10000.0)
    sections = [section for section in (scaling, rope) if section is not None]  # as transformers prefers them
    found = [rope_scaling(section, context) for section in sections]
    for section in reversed(sections):
        theta = section.number("rope_theta", theta)
    args = ModelArgs(
        dim=settings.integer("hidden_size", REQUIRED),
        n_layers=settings.integer("num_hidden_layers", REQUIRED),
        n_heads=settings.integer("num_attention_heads", REQUIRED),
        n_kv_heads=settings.integer("num_key_value_heads", defaults.get("num_key_value_heads")),
        vocab_size=settings.integer("vocab_size", REQUIRED),
        norm_eps=settings.number("rms_norm_eps", 1e-6),
        hidden_dim=settings.integer("intermediate_size", REQUIRED),
        head_dim=settings.integer("head_dim"),
        rope_theta=theta,
        rope_scaling=next((one for one in found if one is not None), None),
        tie_word_embeddings=settings.boolean("tie_word_embeddings", False),
        sliding_window=_sliding_window(settings, defaults),
    )
    original = settings.integer("original_max_position_embeddings")
    if original is not None and isinstance(args.rope_scaling, Llama3Scaling | YarnScaling):
        args.rope_scaling = replace(args.rope_scaling, original_max_seq_len=original)
    args.max_seq_len = _context(args.rope_scaling, context)
    settings.ignore(*_NO_EFFECT)
    return validate_args(args, settings.file), stop_ids


def _sliding_window(settings: Settings, defaults: dict[str, int]) -> int | None:
    """Mistral's window; null says that there is none, and no word at all means the first Mistral's."""
    default = None if "sliding_window" in settings.values else defaults.get("sliding_window")
    return settings.integer("sliding_window", default) if "sliding_window" in defaults else None


def _refuse_other_architectures(settings: Settings) -> None:
    kind = settings.text("model_type", "llama")
    if kind not in DEFAULTS:
        raise CheckpointError(f"{settings.file}: model_type {shown(kind)} is not supported; llama and mistral are")
    for name in settings.texts("architectures"):
        if name not in ARCHITECTURES:
            raise CheckpointError(
                f"{settings.file}: the architecture {shown(name)} is not supported; {', '.join(ARCHITECTURES)} are"
            )
    for key in _OTHER_MATHEMATICS:
        settings.refuse(key)
    settings.refuse("hidden_act", "silu", "swish")
    settings.refuse("hidden_activation", "silu", "swish")
    settings.refuse("partial_rotary_factor", 1.0)
    settings.refuse("position_embedding_type", "rope", "absolute")


def _context(scaling: RopeScaling | None, stated: int) -> int:
    """The context of a model whose config.json states one: some kinds of scaling lengthen it."""
    match scaling:
        case LinearScaling(factor):
            return int(stated * factor)
        case YarnScaling(factor, original) if stated <= original:
            return int(original * factor)
    return stated


def _stated_context(args: ModelArgs) -> int:
    """What config.json states, from which `_context` follows."""
    match args.rope_scaling:
        case LinearScaling(factor):
            return int(args.max_seq_len / factor)
        case DynamicScaling(_, original):
            return original
    return args.max_seq_len


def _validate_names(found: WeightFiles, files: list[TensorFile]) -> None:
    """Raises CheckpointError for a tensor that occurs twice, and for one that the index lists and no file has."""
    seen: dict[str, Path] = {}
    for file in files:
        for name in file.tensors:
            if name in seen:
                raise CheckpointError(f"{file.path}: {name}: occurs in {seen[name].name} as well")
            seen[name] = file.path
    for name, file_name in found.listed.items():
        if name not in seen and name != HEAD and not _WITHOUT_EFFECT.search(name):
            where = found.index.with_name(file_name)
            raise CheckpointError(f"{where}: {name}: is missing, though {found.index.name} lists it")


def canonical_name(stored_name: str) -> str:
    """A stored name in Meta's words; models without a head are stored without "model." too."""
    return rename(stored_name, FROM_HF) or rename(f"model.{stored_name}", FROM_HF) or stored_name


def _weights(args: ModelArgs, stored: Iterable[StoredArray]) -> Iterator[Weight]:
    for stored_name, array, file in stored:
        if _WITHOUT_EFFECT.search(stored_name):
            continue
        if len(array.shape) not in (1, 2):
            raise CheckpointError(
                f"{file}: {stored_name}: has shape {list(array.shape)}; 1 or 2 dimensions are expected"
            )
        name = canonical_name(stored_name)
        if is_rotary(name):
            if array.shape[0] % args.head_dim:
                raise CheckpointError(
                    f"{file}: {stored_name}: {array.shape[0]} rows are not whole heads of {args.head_dim}"
                )
            array = array.reordered(args.head_dim, interleave)
        yield Weight(name, array, file)


def plan_huggingface(
    checkpoint: Checkpoint,
    tokenizer: TokenizerFiles | None,
    *,
    dtype: torch.dtype,
    shards: int | None = None,
    max_shard_size: int | None = None,
) -> Plan:
    """safetensors files: exactly `shards` of them, or as many as `max_shard_size` bytes each need."""
    args = checkpoint.args
    entries = list(_entries(checkpoint, dtype))
    groups = _even_groups(entries, shards) if shards else _groups(entries, max_shard_size or MAX_SHARD_SIZE)
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    files = {"model.safetensors": entries} if count == 1 else dict(zip(names, groups, strict=True))
    plan = Plan(files, metadata={"format": "pt"})
    plan.small_files["config.json"] = json_bytes(_config(checkpoint, dtype, tokenizer))
    plan.small_files["generation_config.json"] = json_bytes(_generation(checkpoint, tokenizer))
    if count > 1:
        places = {one.name: name for name, group in files.items() for one in group}
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": places}
        plan.small_files["model.safetensors.index.json"] = json_bytes(index)
    if tokenizer is None:
        plan.warnings.append("no tokenizer was found; transformers will not tokenize for this directory")
    else:
        plan.small_files |= tokenizer.for_huggingface()
    if args.sliding_window is not None and (args.attention_bias or args.attention_output_bias or args.mlp_bias):
        raise CheckpointError(f"{checkpoint.path}: Hugging Face has no model with a sliding window and biases")
    return plan


def _entries(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[Entry]:
    args = checkpoint.args
    for weight in checkpoint.weights():
        name = rename(weight.name, TO_HF)
        if name is None:
            raise CheckpointError(f"{weight.file}: {weight.name}: has no name in Hugging Face's format")
        if is_rotary(weight.name):
            weight = replace(weight, array=Reordered(weight.array, args.head_dim, deinterleave))
        yield weight.entry(name, dtype)
    if args.attention_bias != args.attention_output_bias:  # Hugging Face has either all four biases or none
        stored = {name for name, _ in expected_shapes(args)}
        for name, shape in expected_shapes(replace(args, attention_bias=True, attention_output_bias=True)):
            if name not in stored:
                yield Entry(rename(name, TO_HF), shape, dtype, partial(torch.zeros, shape))


def _config(checkpoint: Checkpoint, dtype: torch.dtype, tokenizer: TokenizerFiles | None) -> dict[str, Any]:
    """config.json in the spelling that old and new transformers both read."""
    args = checkpoint.args
    kind = "llama" if args.sliding_window is None else "mistral"
    scaling = args.rope_scaling
    values: dict[str, Any] = {
        "architectures": [f"{kind.capitalize()}{'ForCausalLM' if checkpoint.has_head else 'Model'}"],
        "model_type": kind,
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": args.norm_eps,
        "max_position_embeddings": _stated_context(args),
        "rope_theta": args.rope_theta,
        "rope_scaling": None if scaling is None else rope_section(scaling),
        "vocab_size": args.vocab_size,
        "tie_word_embeddings": args.tie_word_embeddings and checkpoint.has_head,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if kind == "llama":
        values |= {
            "attention_bias": args.attention_bias or args.attention_output_bias,
            "mlp_bias": args.mlp_bias,
        }
    else:
        values["sliding_window"] = args.sliding_window
    return values | _token_ids(checkpoint, tokenizer)


def _token_ids(checkpoint: Checkpoint, tokenizer: TokenizerFiles | None) -> dict[str, Any]:
    """`bos_token_id` and `eos_token_id` (one id, or the list of all that end an answer)."""
    stop_ids = list(checkpoint.stop_ids)
    values: dict[str, Any] = {}
    if tokenizer is not None:
        values["bos_token_id"] = tokenizer.bos_id
        stop_ids = stop_ids or ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
    values["eos_token_id"] = stop_ids[0] if len(stop_ids) == 1 else stop_ids or None
    return values


def _generation(checkpoint: Checkpoint, tokenizer: TokenizerFiles | None) -> dict[str, Any]:
    """generation_config.json: what ends an answer, and the sampling defaults that the model came with."""
    defaults = dict(checkpoint.generation_defaults)
    if defaults.get("temperature") == 0.0:
        del defaults["temperature"]
        return {"do_sample": False, **defaults, **_token_ids(checkpoint, tokenizer)}
    sampled = {"do_sample": True} if "temperature" in defaults or "top_p" in defaults else {}
    return sampled | defaults | _token_ids(checkpoint, tokenizer)


def _groups(entries: list[Entry], limit: int) -> list[list[Entry]]:
    """Neighbouring tensors in files of at most `limit` bytes; a larger tensor has a file of its own."""
    groups: list[list[Entry]] = []
    size = limit + 1
    for one in entries:
        if size + one.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(one)
        size += one.nbytes
    return groups


def _even_groups(entries: list[Entry], count: int) -> list[list[Entry]]:
    """Neighbouring tensors in exactly `count` files of about equal size."""
    if count > len(entries):
        raise CheckpointError(f"{count} files were asked for, but the model has {len(entries)} tensors")
    total = sum(one.nbytes for one in entries)
    groups: list[list[Entry]] = [[]]
    done = 0
    for number, one in enumerate(entries):
        left = len(entries) - number
        is_full = groups[-1] and done >= total * len(groups) / count
        if len(groups) < count and (is_full or left == count - len(groups)):
            groups.append([])
        groups[-1].append(one)
        done += one.nbytes
    return groups
