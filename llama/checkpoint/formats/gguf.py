"""GGUF files of the llama family, both ways: whole or split into `-00001-of-0000N.gguf`; every ggml type is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files.errors import CheckpointError
from ...files.gguf import BLOCKS, FLOAT32, STRING, TYPE_NUMBERS, UINT32, GGUFFile, TensorHeader, Value
from ...files.mapped import open_file
from ...files.writing import Entry, Plan
from ...model import ModelArgs
from ...quantization import FORMATS
from ...rotary import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
    rope_factors,
    yarn_magnitude,
)
from ..arrays import Array, Mapped, PackedArray, read_by_copy
from ..inventory import FROM_GGUF, TO_GGUF, rename
from ..opened import NO_HEAD, Checkpoint, assemble
from ..settings import REQUIRED, Settings, generation_settings, validate_args
from ..tokenizer_files import TokenizerFiles
from ..weight import Weight

PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
CHUNK = 1 << 16  # numbers that are dequantized at a time: more, and what readers leave in their heaps doubles the peak
ROPE_FACTORS = "rope_freqs.weight"
FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
SAMPLING = {  # keys of general.sampling, and the names they have here
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class Blocks(PackedArray):
    """A matrix in ggml's low-bit blocks; `read` dequantizes only the blocks it needs, to float32."""

    file: GGUFFile
    header: TensorHeader

    @property
    def shape(self) -> tuple[int, ...]:
        return self.header.shape

    @property
    def stored(self) -> str:
        return BLOCKS[self.header.kind][0]

    @property
    def format(self) -> str:
        return self.stored.lower()

    @property
    def nbytes(self) -> int:
        return self.header.nbytes

    def read(self, dim: int, start: int, stop: int) -> Tensor:
        return read_by_copy(self, dim, start, stop)

    def copy_to(self, out: Tensor, dim: int, start: int, stop: int) -> None:
        block, columns = BLOCKS[self.header.kind][1], self.shape[-1]
        skipped = 0
        if dim == len(self.shape) - 1:  # whole blocks, then the columns asked for
            first, last = start // block * block, -(-stop // block) * block
            start, stop, skipped, columns = first, last, start - first, last - first
        packed = self.packed(dim, start, stop).reshape(-1, columns // block * BLOCKS[self.header.kind][2])
        rows = max(1, CHUNK // max(columns, 1))
        for some, place in zip(packed.split(rows), out.view(len(packed), -1).split(rows), strict=True):
            place.copy_(self._dequantize(some).narrow(1, skipped, place.shape[1]))

    def packed(self, dim: int, start: int, stop: int) -> Tensor:
        """The blocks of that part: uint8, rows first, bytes of a row last."""
        _, block, size = BLOCKS[self.header.kind]
        self.file.mapped.check()
        shape = (*self.shape[:-1], self.shape[-1] // block * size)
        data = self.file.mapped.tensor(self.header.name, self.header.offset, torch.uint8, shape)
        if dim != len(self.shape) - 1:
            return data.narrow(dim, start, stop - start)
        if start % block or stop % block:
            raise CheckpointError(f"columns {start} to {stop} are not whole {self.stored} blocks of {block}")
        return data.narrow(dim, start // block * size, (stop - start) // block * size)

    def _dequantize(self, packed: Tensor) -> Tensor:
        """uint8 (rows, bytes) -> float32 (rows, columns)"""
        if self.format in FORMATS:
            return FORMATS[self.format].dequantize(packed)
        import numpy  # gguf knows the others, and takes longer to import than a small model to load
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        with numpy.errstate(all="ignore"):  # a damaged block may hold infinity; that is for others to find
            return torch.from_numpy(dequantize(packed.numpy(), GGMLQuantizationType(self.header.kind)))


def is_gguf(path: Path) -> bool:
    """Whether `path` is a GGUF file, or a directory that holds one."""
    if path.is_dir():
        return bool(_files_in(path))
    with open_file(path) as file:
        return file.read(4) == b"GGUF"


def open_gguf_model(path: Path) -> Checkpoint:
    """Opens a GGUF file; for a directory, or one file of a split one, all of its files."""
    files = [GGUFFile(file) for file in _all_files(path)]
    first = files[0]
    settings = Settings(first.scalars(), first.path)
    weights = list(_weights(files))
    args = _args(settings, first, weights)
    args.rope_scaling = _scaling(settings, args, files)
    return assemble(
        path,
        "gguf",
        validate_args(args, first.path),
        weights,
        settings,
        tied=True,
        tokenizer_path=first.path if first.length("tokenizer.ggml.tokens") else None,
        header=first,
        generation_defaults=_generation_defaults(settings),
        stop_ids=_stop_ids(settings),
    )


def _files_in(folder: Path) -> list[Path]:
    """GGUF files in a directory, of split ones the first."""
    names = sorted(folder.glob("*.gguf"))
    return [name for name in names if not (match := _SPLIT_NAME.fullmatch(name.name)) or int(match[2]) == 1]


def _all_files(path: Path) -> list[Path]:
    if path.is_dir():
        found = _files_in(path)
        if len(found) > 1:
            first, *others = (file.name for file in found)
            raise CheckpointError(
                f"{path}: holds {len(found)} GGUF files; name one of them, such as {first}; others: {', '.join(others)}"
            )
        path = found[0]
    match = _SPLIT_NAME.fullmatch(path.name)
    if not match:
        return [path]
    count = int(match[3])
    files = [path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{path}: is one of {count} files, of which {missing[0]} is missing")
    return files


def _weights(files: list[GGUFFile]) -> Iterator[Weight]:
    for file in files:
        for header in file.tensors.values():
            if header.name == ROPE_FACTORS or header.name.endswith(".attn_rot_embd.weight"):
                continue
            name = rename(header.name, FROM_GGUF)
            yield Weight(name or header.name, array_of(file, header), file.path)


def array_of(file: GGUFFile, header: TensorHeader) -> Array:
    dtype = PLAIN_TYPES.get(BLOCKS[header.kind][0])
    if dtype is None:
        return Blocks(file, header)
    return Mapped(file.mapped.tensor(header.name, header.offset, dtype, header.shape), file.mapped.check)


def _args(settings: Settings, file: GGUFFile, weights: list[Weight]) -> ModelArgs:
    architecture = settings.text("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{file.path}: the architecture {architecture!r} is not supported; llama is")
    _refuse_other_mathematics(settings, file)
    embedding = next((weight for weight in weights if weight.name == "tok_embeddings.weight"), None)
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path}: token_embd.weight: is missing or no matrix")
    dim = settings.integer("llama.embedding_length", REQUIRED)
    n_heads = settings.integer("llama.attention.head_count", REQUIRED)
    head_dim = settings.integer("llama.attention.key_length", dim // n_heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if settings.integer(key, head_dim) != head_dim:
            raise settings.error(key, settings.values[key], f"only the head's size, {head_dim}, is supported")
    return ModelArgs(
        dim=dim,
        n_layers=settings.integer("llama.block_count", REQUIRED),
        n_heads=n_heads,
        n_kv_heads=settings.integer("llama.attention.head_count_kv"),
        vocab_size=embedding.shape[0],
        norm_eps=settings.number("llama.attention.layer_norm_rms_epsilon", 1e-5),
        max_seq_len=settings.integer("llama.context_length", 2048),
        hidden_dim=settings.integer("llama.feed_forward_length", REQUIRED),
        head_dim=head_dim,
        rope_theta=settings.number("llama.rope.freq_base", 10000.0),
        sliding_window=settings.integer("llama.attention.sliding_window"),
    )


def _refuse_other_mathematics(settings: Settings, file: GGUFFile) -> None:
    for key in ("expert_count", "expert_used_count", "attention.layer_norm_epsilon"):
        settings.refuse(f"llama.{key}", 0)
    for key in ("attention.scale", "logit_scale", "embedding_scale", "residual_scale", "attn_logit_softcapping",
                "final_logit_softcapping", "attention.clamp_kqv", "attention.temperature_scale"):  # fmt: skip
        settings.refuse(f"llama.{key}", 0.0)
    settings.refuse("llama.attention.causal", True)
    for key, value in file.metadata.items():
        if key.startswith("llama.") and not isinstance(value, int | float | str | bool):
            raise CheckpointError(f"{file.path}: {key} differs from layer to layer, which is not supported")
    settings.ignore("llama.vocab_size")
    settings.ignore(
        *(key for key in settings.values if key.split(".")[0] in ("general", "tokenizer", "quantize", "split"))
    )


def _scaling(settings: Settings, args: ModelArgs, files: list[GGUFFile]) -> RopeScaling | None:
    """Linear scaling and YaRN from the metadata; Llama 3's from the factors that llama.cpp stores as a tensor."""
    kind = settings.text("llama.rope.scaling.type", "linear")
    factor = settings.number("llama.rope.scaling.factor", settings.number("llama.rope.scale_linear"))
    settings.ignore("llama.rope.scale_linear")
    original = settings.integer("llama.rope.scaling.original_context_length")
    low = settings.number("llama.rope.scaling.low_freq_factor", 1.0)
    high = settings.number("llama.rope.scaling.high_freq_factor", 4.0)
    headers = [(file, file.tensors[ROPE_FACTORS]) for file in files if ROPE_FACTORS in file.tensors]
    settings.ignore("llama.rope.scaling.finetuned", "llama.rope.scaling.yarn_attn_factor")
    if kind not in ("none", "linear", "yarn") or (kind == "yarn" and headers):
        raise settings.error(
            "llama.rope.scaling.type", kind, "none, linear, yarn and llama3's rope_freqs.weight are supported"
        )
    if headers:
        stored = array_of(*headers[0]).read(0, 0, headers[0][1].shape[0]).float().flatten()
        return _llama3(stored, args, low, high, original or 8192, headers[0][0].path)
    if factor is None or factor == 1.0 or kind == "none":
        return None
    return LinearScaling(factor) if kind == "linear" else _yarn(settings, factor, original or args.max_seq_len)


def _yarn(settings: Settings, factor: float, original: int) -> YarnScaling:
    """As llama.cpp computes it, which lengthens vectors by `attn_factor` times the paper's factor."""
    prefix = "llama.rope.scaling."
    settings.refuse(f"{prefix}yarn_ext_factor", 1.0, -1.0)
    settings.refuse(f"{prefix}yarn_log_multiplier", 0.0)
    longer = settings.number(f"{prefix}attn_factor", 1.0)
    return YarnScaling(
        factor,
        original,
        settings.number(f"{prefix}yarn_beta_fast", 32.0, low=1e-3, high=1e6),
        settings.number(f"{prefix}yarn_beta_slow", 1.0, low=1e-3, high=1e6),
        None if longer == 1.0 else float(f"{longer * yarn_magnitude(factor):.6g}"),  # float32 in the file
    )


def _llama3(factors: Tensor, args: ModelArgs, low: float, high: float, original: int, file: Path) -> RopeScaling | None:
    """The scaling whose factors these are; None where they change nothing."""
    if factors.shape != (args.head_dim // 2,) or not bool((factors >= 1).all()) or not factors.isfinite().all():
        raise CheckpointError(f"{file}: {ROPE_FACTORS}: {args.head_dim // 2} factors of at least 1 are expected")
    if bool((factors == 1).all()):
        return None
    scaling = Llama3Scaling(float(factors.max()), low, high, original)
    if low >= high or not torch.allclose(factors, rope_factors(args.head_dim, args.rope_theta, scaling), rtol=1e-4):
        raise CheckpointError(f"{file}: {ROPE_FACTORS}: not Llama 3's rope scaling; other kinds are not supported")
    return scaling


def _generation_defaults(settings: Settings) -> dict[str, float]:
    stored = {name: settings.values.get(f"general.sampling.{key}") for key, name in SAMPLING.items()}
    renamed = {name: value for name, value in stored.items() if value is not None}
    return generation_settings(Settings(renamed, settings.file, "general.sampling."))[0]


def _stop_ids(settings: Settings) -> tuple[int, ...]:
    keys = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(token for key in keys for token in settings.ids(key)))


def plan_gguf(checkpoint: Checkpoint, tokenizer: TokenizerFiles | None, *, dtype: torch.dtype) -> Plan:
    """One GGUF file; vectors (norms, biases) are float32, as llama.cpp wants them."""
    if dtype not in TYPE_NUMBERS:
        raise CheckpointError(f"GGUF is written in fp32, fp16 or bf16, not {str(dtype).removeprefix('torch.')}")
    plan = Plan({"": list(_entries(checkpoint, dtype))}, metadata=_metadata(checkpoint, dtype))
    if tokenizer is None:
        plan.warnings.append("no tokenizer was found; programs cannot tokenize with this file")
    else:
        plan.metadata |= tokenizer.for_gguf(checkpoint.args.vocab_size, checkpoint.stop_ids)
    if checkpoint.args.sliding_window is not None:
        plan.warnings.append("llama.cpp ignores the sliding window of this architecture")
    if not checkpoint.has_head:
        plan.warnings.append(NO_HEAD)
    return plan


def _entries(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[Entry]:
    scaling = checkpoint.args.rope_scaling
    if isinstance(scaling, DynamicScaling) or (isinstance(scaling, YarnScaling) and not scaling.truncate):
        kind = "dynamic rope scaling" if isinstance(scaling, DynamicScaling) else "yarn without truncation"
        raise CheckpointError(f"{checkpoint.path}: GGUF cannot express {kind}; write hf or meta")
    if isinstance(scaling, Llama3Scaling):
        factors = rope_factors(checkpoint.args.head_dim, checkpoint.args.rope_theta, scaling)
        yield Entry(ROPE_FACTORS, tuple(factors.shape), torch.float32, lambda: factors)
    for weight in checkpoint.weights():
        name = rename(weight.name, TO_GGUF)
        if name is None:
            raise CheckpointError(f"{weight.file}: {weight.name}: has no name in GGUF")
        yield weight.entry(name, torch.float32 if len(weight.shape) == 1 else dtype)


def _metadata(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Value]:
    """The header's keys, but for the tokenizer's."""
    args = checkpoint.args
    values = {
        "general.architecture": Value(STRING, "llama"),
        "general.type": Value(STRING, "model"),
        "general.name": Value(STRING, checkpoint.path.stem),
        "general.file_type": Value(UINT32, FILE_TYPES[dtype]),
    }
    numbers = {
        "block_count": args.n_layers,
        "context_length": args.max_seq_len,
        "embedding_length": args.dim,
        "feed_forward_length": args.hidden_dim,
        "attention.head_count": args.n_heads,
        "attention.head_count_kv": args.n_kv_heads,
        "attention.key_length": args.head_dim,
        "attention.value_length": args.head_dim,
        "attention.layer_norm_rms_epsilon": args.norm_eps,
        "rope.dimension_count": args.head_dim,
        "rope.freq_base": args.rope_theta,
        "vocab_size": args.vocab_size,
    }
    if args.sliding_window is not None:
        numbers["attention.sliding_window"] = args.sliding_window
    values |= {f"llama.{key}": _number(value) for key, value in numbers.items()}
    return values | _scaling_metadata(args) | _sampling(checkpoint)


def _number(value: Any) -> Value:
    return Value(FLOAT32 if isinstance(value, float) else UINT32, value)


def _scaling_metadata(args: ModelArgs) -> dict[str, Value]:
    """Linear scaling and YaRN; of Llama 3's, which is stored as a tensor of factors, what is not as usual."""
    prefix = "llama.rope.scaling."
    match args.rope_scaling:
        case LinearScaling(factor):
            return {f"{prefix}type": Value(STRING, "linear"), f"{prefix}factor": _number(factor)}
        case Llama3Scaling(factor) as scaling if scaling != Llama3Scaling(factor):
            return {
                f"{prefix}original_context_length": _number(scaling.original_max_seq_len),
                f"{prefix}low_freq_factor": _number(scaling.low_freq_factor),
                f"{prefix}high_freq_factor": _number(scaling.high_freq_factor),
            }
        case YarnScaling() as scaling:
            return {
                f"{prefix}type": Value(STRING, "yarn"),
                f"{prefix}factor": _number(scaling.factor),
                f"{prefix}original_context_length": _number(scaling.original_max_seq_len),
                f"{prefix}yarn_beta_fast": _number(scaling.beta_fast),
                f"{prefix}yarn_beta_slow": _number(scaling.beta_slow),
                f"{prefix}attn_factor": _number(scaling.magnitude / yarn_magnitude(scaling.factor)),
            }
    return {}


def _sampling(checkpoint: Checkpoint) -> dict[str, Value]:
    defaults = checkpoint.generation_defaults
    return {f"general.sampling.{key}": _number(defaults[name]) for key, name in SAMPLING.items() if name in defaults}
