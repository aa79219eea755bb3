"""GGUF files of the llama family, whole or split into `-00001-of-0000N.gguf`; every ggml type."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files.gguf import BLOCKS, GGUFFile, TensorHeader
from ..files.mapped import open_file
from ..model import ModelArgs
from ..rotary import LinearScaling, Llama3Scaling, RopeScaling, rope_factors
from .arrays import Array, Mapped, PackedArray
from .names import FROM_GGUF, rename
from .settings import REQUIRED, Settings, check_args, generation_settings
from .shapes import check_layers, is_tied
from .weight import Checkpoint, CheckpointError, Weight, dominant_dtype

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
CHUNK = 1 << 18  # numbers that are dequantized at a time: the temporaries of every reader stay small
ROPE_FACTORS = "rope_freqs.weight"
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
        shape = list(self.shape)
        shape[dim] = stop - start
        out = torch.empty(shape)
        self.copy_to(out, dim, start, stop)
        return out

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
        import numpy
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        with numpy.errstate(all="ignore"):  # a damaged block may hold infinity; that is for others to find
            return torch.from_numpy(dequantize(packed.numpy(), GGMLQuantizationType(self.header.kind)))


def recognises(path: Path) -> bool:
    """Whether `path` is a GGUF file, or a directory that holds one."""
    if path.is_dir():
        return bool(_files_in(path))
    with open_file(path) as file:
        return file.read(4) == b"GGUF"


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file; for a directory, or one file of a split one, all of its files."""
    files = [GGUFFile(file) for file in _all_files(path)]
    first = files[0]
    settings = Settings(first.scalars(), first.path)
    weights = list(_weights(files))
    by_name = {weight.name: weight for weight in weights}
    if len(by_name) < len(weights):
        twice = next(weight for weight in weights if by_name[weight.name] is not weight)
        raise CheckpointError(f"{twice.file}: {twice.name}: occurs twice")
    args = _args(settings, first, by_name)
    check_layers(args, weights, first.path)
    args.rope_scaling = _scaling(settings, args, files)
    args.tie_word_embeddings = is_tied(weights)
    if args.tie_word_embeddings:
        by_name.pop("output.weight", None)
    return Checkpoint(
        path=path,
        format="gguf",
        args=check_args(args, first.path),
        weights=lambda: iter(by_name.values()),
        dtype=dominant_dtype(iter(by_name.values())),
        tokenizer_path=first.path if first.length("tokenizer.ggml.tokens") else None,
        generation_defaults=_generation_defaults(settings),
        stop_ids=_stop_ids(settings),
        unknown_keys=settings.unknown,
        settings=settings.values,
    )


def _files_in(folder: Path) -> list[Path]:
    """GGUF files in a directory, of split ones the first."""
    names = sorted(folder.glob("*.gguf"))
    return [name for name in names if not (match := _SPLIT_NAME.fullmatch(name.name)) or int(match[2]) == 1]


def _all_files(path: Path) -> list[Path]:
    if path.is_dir():
        found = _files_in(path)
        if len(found) > 1:
            raise CheckpointError(
                f"{path}: holds {len(found)} GGUF files; name one of them, such as {found[0].name}"
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
            if header.name == ROPE_FACTORS:
                continue
            name = rename(header.name, FROM_GGUF)
            yield Weight(name or header.name, array_of(file, header), file.path)


def array_of(file: GGUFFile, header: TensorHeader) -> Array:
    dtype = PLAIN.get(BLOCKS[header.kind][0])
    if dtype is None:
        return Blocks(file, header)
    return Mapped(file.mapped.tensor(header.name, header.offset, dtype, header.shape), file.mapped.check)


def _args(settings: Settings, file: GGUFFile, weights: dict[str, Weight]) -> ModelArgs:
    architecture = settings.text("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{file.path}: the architecture {architecture!r} is not supported; llama is")
    _refuse_other_mathematics(settings, file)
    embedding = weights.get("tok_embeddings.weight")
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
        attention_bias="layers.0.attention.wq.bias" in weights,
        attention_output_bias="layers.0.attention.wo.bias" in weights,
        mlp_bias="layers.0.feed_forward.w1.bias" in weights,
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
        *(
            key
            for key in settings.values
            if key.split(".")[0] in ("general", "tokenizer", "quantize", "split")
        )
    )


def _scaling(settings: Settings, args: ModelArgs, files: list[GGUFFile]) -> RopeScaling | None:
    """Linear scaling from the metadata; Llama 3's from the factors that llama.cpp stores as a tensor."""
    kind = settings.text("llama.rope.scaling.type", "none")
    factor = settings.number("llama.rope.scaling.factor", settings.number("llama.rope.scale_linear"))
    settings.ignore("llama.rope.scale_linear")
    original = settings.integer("llama.rope.scaling.original_context_length", 8192)
    low = settings.number("llama.rope.scaling.low_freq_factor", 1.0)
    high = settings.number("llama.rope.scaling.high_freq_factor", 4.0)
    headers = [(file, file.tensors[ROPE_FACTORS]) for file in files if ROPE_FACTORS in file.tensors]
    if kind not in ("none", "linear"):
        raise settings.error(
            "llama.rope.scaling.type", kind, "none, linear and llama3's rope_freqs.weight are supported"
        )
    if headers:
        stored = array_of(*headers[0]).read(0, 0, headers[0][1].shape[0]).float().flatten()
        return llama3_from_factors(stored, args, low, high, original, headers[0][0].path)
    if factor is not None and factor != 1.0:
        return LinearScaling(factor)
    return None


def llama3_from_factors(
    factors: Tensor, args: ModelArgs, low: float, high: float, original: int, file: Path
) -> RopeScaling | None:
    """The scaling whose factors these are; None where they change nothing."""
    if (
        factors.shape != (args.head_dim // 2,)
        or not bool((factors >= 1).all())
        or not factors.isfinite().all()
    ):
        raise CheckpointError(
            f"{file}: {ROPE_FACTORS}: {args.head_dim // 2} factors of at least 1 are expected"
        )
    if bool((factors == 1).all()):
        return None
    scaling = Llama3Scaling(float(factors.max()), low, high, original)
    if low >= high or not torch.allclose(
        factors, rope_factors(args.head_dim, args.rope_theta, scaling), rtol=1e-4
    ):
        raise CheckpointError(
            f"{file}: {ROPE_FACTORS}: not Llama 3's rope scaling; other kinds are not supported"
        )
    return scaling


def _generation_defaults(settings: Settings) -> dict[str, float]:
    stored = {name: settings.values.get(f"general.sampling.{key}") for key, name in SAMPLING.items()}
    renamed = {name: value for name, value in stored.items() if value is not None}
    return generation_settings(Settings(renamed, settings.file, "general.sampling."))[0]


def _stop_ids(settings: Settings) -> tuple[int, ...]:
    keys = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
    return tuple(dict.fromkeys(token for key in keys for token in settings.ids(key)))
