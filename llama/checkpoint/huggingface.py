"""Hugging Face directories: `config.json` beside safetensors or `.bin` files, one or many by an index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import torch

from ..files.errors import shown
from ..files.json import read_json
from ..files.tensor_file import TensorFile, read_tensor_file
from ..model import ModelArgs
from ..quantization import FORMATS
from ..rotary import LinearScaling
from .arrays import Array
from .gptq import stored_arrays
from .lowbit import LowBitMatrix, as_matrix, lowbit_format
from .names import FROM_HF, interleave, is_rotary, module_name, rename
from .settings import REQUIRED, Settings, check_args, generation_settings, rope_scaling
from .shapes import check_layers, expected_shapes, is_tied
from .tokenizer_files import find_tokenizer
from .weight import Checkpoint, CheckpointError, Weight, dominant_dtype

DEFAULTS: dict[str, dict[str, int]] = {
    # model_type: what transformers takes for keys that are not there
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
}
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")

_NO_EFFECT = (
    "_name_or_path", "torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range", "pretraining_tp",
    "attention_dropout", "hidden_dropout", "bos_token_id", "pad_token_id", "unk_token_id", "output_attentions",
    "output_hidden_states", "return_dict", "is_encoder_decoder", "is_llama_config", "rope_interleaved",
    "max_sequence_length", "tokenizer_class", "id2label", "label2id", "_attn_implementation", "max_window_layers",
    "chunk_size_feed_forward", "problem_type", "task_specific_params", "finetuning_task", "tokenizer_model_max_length",
)  # fmt: skip
_OTHER_MATHEMATICS = (
    "num_local_experts", "num_experts", "num_experts_per_tok", "qk_norm", "use_qk_norm", "attn_logit_softcapping",
    "final_logit_softcapping", "logit_softcapping", "embedding_multiplier", "logits_scaling", "logit_scale",
    "residual_multiplier", "attention_multiplier", "scale_embeddings", "scale_emb", "no_rope_layers", "alibi",
    "parallel_attention", "layer_types", "attention_chunk_size", "add_cross_attention", "cross_attention_layers",
    "vision_config", "text_config", "use_sliding_window",
)  # fmt: skip


def recognises(path: Path) -> bool:
    """Whether `path` is a Hugging Face directory."""
    return path.is_dir() and (path / "config.json").is_file()


def open_huggingface(path: Path) -> Checkpoint:
    """Opens a Hugging Face directory of a llama- or mistral-shaped model."""
    settings = Settings(read_json(path / "config.json"), path / "config.json")
    files = [read_tensor_file(file) for file in weight_files(path)]
    args, stop_ids = read_args(settings)
    arrays = list(_arrays(path, settings, files))
    weights = list(_weights(args, arrays, lowbit_format(settings)))
    check_layers(args, weights, settings.file)
    names = {weight.name for weight in weights}
    args.attention_bias = "layers.0.attention.wq.bias" in names
    args.attention_output_bias = "layers.0.attention.wo.bias" in names
    if "output.weight" in names:
        args.tie_word_embeddings = is_tied(weights)
    if args.tie_word_embeddings:
        weights = [weight for weight in weights if weight.name != "output.weight"]
    defaults, more_stop_ids = _generation_config(path)
    return Checkpoint(
        path=path,
        format="hf",
        args=args,
        weights=lambda: iter(weights),
        dtype=dominant_dtype(iter(weights)),
        tokenizer_path=find_tokenizer(path, ("tokenizer.json", "tokenizer.model")),
        generation_defaults=defaults,
        stop_ids=tuple(dict.fromkeys(stop_ids + more_stop_ids)),
        unknown_keys=settings.unknown,
        settings=settings.values,
    )


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights: those of the index where there is one, else the single one."""
    for name in INDEXES:
        if (path / name).is_file():
            return [path / file for file in dict.fromkeys(weight_map(path / name).values())]
    for name in SINGLE_FILES:
        if (path / name).is_file():
            return [path / name]
    others = sorted(
        file for file in path.glob("*.safetensors") if not file.name.startswith(("consolidated", "adapter"))
    )
    if not others:
        raise CheckpointError(
            f"{path}: config.json is there, but neither model.safetensors nor pytorch_model.bin is"
        )
    return others


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name to file name from an index; a name that would leave the directory is refused."""
    entries: Any = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"{index}: weight_map is missing or empty")
    for tensor, file in entries.items():
        if (
            not isinstance(file, str)
            or PurePath(file).name != file
            or file in ("", ".", "..")
            or "\\" in file
        ):
            raise CheckpointError(f"{index}: {tensor}: {shown(file)} is no plain file name")
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index}: {tensor}: its file {file} is missing")
    return entries


def read_args(settings: Settings) -> tuple[ModelArgs, tuple[int, ...]]:
    """The model's shape and stop ids; raises CheckpointError for keys that ask for other mathematics."""
    _refuse_other_architectures(settings)
    stop_ids = settings.ids("eos_token_id")
    defaults = DEFAULTS[settings.text("model_type", "llama")]
    context = settings.integer("max_position_embeddings", defaults["max_position_embeddings"])
    rope, scaling = settings.section("rope_parameters"), settings.section("rope_scaling")
    theta = settings.number("rope_theta", 10000.0)
    scaling_settings = [section for section in (scaling, rope) if section is not None]
    found = [rope_scaling(section, context) for section in scaling_settings]
    args = ModelArgs(
        dim=settings.integer("hidden_size", REQUIRED),
        n_layers=settings.integer("num_hidden_layers", REQUIRED),
        n_heads=settings.integer("num_attention_heads", REQUIRED),
        n_kv_heads=settings.integer("num_key_value_heads", defaults.get("num_key_value_heads")),
        vocab_size=settings.integer("vocab_size", REQUIRED),
        norm_eps=settings.number("rms_norm_eps", 1e-6),
        hidden_dim=settings.integer("intermediate_size", REQUIRED),
        head_dim=settings.integer("head_dim"),
        rope_theta=rope.number("rope_theta", theta) if rope else theta,
        rope_scaling=next((one for one in found if one is not None), None),
        tie_word_embeddings=settings.boolean("tie_word_embeddings", False),
        mlp_bias=settings.boolean("mlp_bias", False),
        sliding_window=_sliding_window(settings, defaults),
    )
    stretched = args.rope_scaling.factor if isinstance(args.rope_scaling, LinearScaling) else 1
    args.max_seq_len = int(context * stretched)
    settings.ignore("attention_bias", *_NO_EFFECT)  # the stored biases themselves say which there are
    return check_args(args, settings.file), stop_ids


def _sliding_window(settings: Settings, defaults: dict[str, int]) -> int | None:
    """Mistral's window; null says that there is none, and no word at all means the first Mistral's."""
    default = None if "sliding_window" in settings.values else defaults.get("sliding_window")
    return settings.integer("sliding_window", default) if "sliding_window" in defaults else None


def _refuse_other_architectures(settings: Settings) -> None:
    kind = settings.text("model_type", "llama")
    if kind not in DEFAULTS:
        raise CheckpointError(
            f"{settings.file}: model_type {shown(kind)} is not supported; llama and mistral are"
        )
    settings.ignore("architectures")
    for name in settings.values.get("architectures") or ():
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


def _arrays(path: Path, settings: Settings, files: list[TensorFile]) -> Iterator[tuple[str, Array, Path]]:
    """Every stored array under its stored name; four-bit matrices put together."""
    seen: dict[str, Path] = {}
    for file in files:
        for name in file.tensors:
            if name in seen:
                raise CheckpointError(f"{file.path}: {name}: occurs in {seen[name].name} as well")
            seen[name] = file.path
    index = next((path / name for name in INDEXES if (path / name).is_file()), None)
    for name, file_name in weight_map(index).items() if index else ():
        if name not in seen:
            raise CheckpointError(f"{path / file_name}: {name}: is missing, though {index.name} lists it")
    quantization = settings.section("quantization_config")
    if quantization is None and (path / "quantize_config.json").is_file():
        quantization = Settings(read_json(path / "quantize_config.json"), path / "quantize_config.json")
    yield from stored_arrays(quantization, files)


def _weights(args: ModelArgs, arrays: list[tuple[str, Array, Path]], lowbit: str | None) -> Iterator[Weight]:
    one_layer = expected_shapes(replace(args, n_layers=1, tie_word_embeddings=False))
    rows = {module_name(name): shape[0] for name, shape in one_layer if len(shape) == 2}
    for stored_name, array, file in arrays:
        if stored_name.endswith("rotary_emb.inv_freq"):
            continue
        if len(array.shape) not in (1, 2):
            raise CheckpointError(
                f"{file}: {stored_name}: has shape {list(array.shape)}; 1 or 2 dimensions are expected"
            )
        name = rename(stored_name, FROM_HF) or stored_name
        if lowbit is not None and array.dtype == torch.uint8 and module_name(name) in rows:
            blocks = as_matrix(array, rows[module_name(name)], f"{file}: {stored_name}")
            array = LowBitMatrix(blocks, FORMATS[lowbit])
        if is_rotary(name):
            if array.shape[0] % args.head_dim:
                raise CheckpointError(
                    f"{file}: {stored_name}: {array.shape[0]} rows are not whole heads of {args.head_dim}"
                )
            array = array.reordered(args.head_dim, interleave)
        yield Weight(name, array, file)


def _generation_config(path: Path) -> tuple[dict[str, float], tuple[int, ...]]:
    file = path / "generation_config.json"
    if not file.is_file():
        return {}, ()
    defaults, stop_ids, _ = generation_settings(Settings(read_json(file), file))
    return defaults, stop_ids
