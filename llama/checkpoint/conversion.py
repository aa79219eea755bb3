"""Writing a checkpoint in another format, one tensor at a time, so that it appears complete or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..device import DTYPES, SPELLINGS
from ..files.errors import CheckpointError
from ..files.staging import clean_leftovers, staged
from .adapters import with_adapters
from .formats import FORMATS, open_checkpoint
from .opened import Checkpoint
from .tokenizer_files import TokenizerFiles

SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}
BESIDE_WEIGHTS = {
    ".json",
    ".model",
    ".chk",
    ".jinja",
    ".txt",
    ".md",
}  # what else a checkpoint's files end with
MARGIN = 16 << 20  # bytes that must stay free besides the tensors: tokenizer, headers, file system


def convert(
    src: str | Path,
    dst: str | Path,
    to: str,
    *,
    shards: int | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Writes the checkpoint `src` to `dst` in the format `to` ("meta", "hf" or "gguf"), tokenizer and config included.

    `shards`: how many weight files (meta, hf). `max_shard_size`: bytes, or "5GB" (hf). `dtype`: "bf16", "fp16",
    "fp32" or a torch dtype; None keeps the type that most weights have, and float32 for low-bit ones. `adapter`: paths
    of adapters that are merged into it, in order, or "PATH=0.7" for one with a weight. `progress` gets the bytes
    written and the bytes in all. Gives warnings, one line each: what was cleaned up, and what the programs that own the
    format will not understand. An older `dst` stays until the new one is complete. Raises CheckpointError or
    ValueError, in one line, and leaves nothing behind.
    """
    possible = _takers("dtype")
    if to not in possible:
        raise ValueError(f"cannot convert to {to!r}; {', '.join(possible)} are possible")
    checkpoint, destination = with_adapters(open_checkpoint(src), adapter), Path(dst).expanduser()
    warnings = _prepare(checkpoint.path, destination)
    options = {"dtype": _dtype(checkpoint, dtype)}
    if shards is not None and _takes_shards(to, shards):
        options["shards"] = shards
    if max_shard_size is not None:
        options["max_shard_size"] = _max_shard_size(to, max_shard_size)
    return warnings + _write(checkpoint, destination, to, progress, options)


def save_low_bit(
    checkpoint: Checkpoint,
    destination: str | Path,
    format: str,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Writes a low-bit directory, one weight at a time, tokenizer included; gives warnings as `convert` does.

    Raises LowBitError where the columns are not whole blocks.
    """
    warnings = _prepare(checkpoint.path, Path(destination).expanduser())
    return warnings + _write(checkpoint, Path(destination).expanduser(), "lowbit", progress, {"type": format})


def legacy_source(input_dir: str | Path, model_size: str) -> Path:
    """The directory that the old converter's `--input_dir` and `--model_size` ("7B", "13Bf", ...) mean.

    Raises FileNotFoundError that lists where it looked.
    """
    size = model_size.removesuffix("f")
    downloaded = f"llama-2-{size.lower()}" + ("-chat" if model_size.endswith("f") else "")
    folder = Path(input_dir).expanduser()
    candidates = [folder / model_size, folder / downloaded, folder / size, folder]
    for candidate in candidates:
        if (candidate / "params.json").is_file():
            return candidate
    looked = ", ".join(str(candidate) for candidate in candidates)
    raise FileNotFoundError(f"no params.json for model size {model_size}; looked in {looked}")


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a number; raises ValueError for anything else."""
    text = str(size).strip().upper()
    unit = next((unit for unit in SIZES if text.endswith(unit)), "")
    number = text.removesuffix(unit).strip()
    if not number.replace(".", "", 1).isdigit() or float(number) * SIZES.get(unit, 1) < 1:
        raise ValueError(f"{size!r} is no size; write bytes, or 500MB, 5GB, 2GiB")
    return int(float(number) * SIZES.get(unit, 1))


def _write(
    checkpoint: Checkpoint,
    destination: Path,
    to: str,
    progress: Callable[[int, int], None] | None,
    options: dict[str, Any],
) -> list[str]:
    """Carries the format's plan out, all or nothing; gives warnings, one line each."""
    row = FORMATS[to]
    tokenizer = None if checkpoint.tokenizer_path is None else TokenizerFiles(checkpoint.tokenizer_path)
    plan = row.plan(checkpoint, tokenizer, **options)
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, plan.nbytes)

    needed = plan.nbytes + sum(map(len, plan.small_files.values())) + MARGIN
    with staged(destination, needed, plan.is_directory) as staging:
        plan.write(staging, row.write, count)
    return [*checkpoint.warnings, *plan.warnings] + ([] if tokenizer is None else tokenizer.warnings)


def _takers(option: str) -> list[str]:
    """The formats that take an option."""
    return [name for name, row in FORMATS.items() if option in row.options]


def _takes_shards(to: str, shards: int) -> bool:
    if shards < 1:
        raise ValueError(f"{shards} shards; at least 1 is possible")
    if to not in _takers("shards") and shards > 1:
        raise ValueError(f"a {to.upper()} file is written whole; leave out the number of shards")
    return to in _takers("shards")


def _max_shard_size(to: str, size: int | str) -> int:
    takers = _takers("max_shard_size")
    if to not in takers:
        raise ValueError(f"a maximal shard size is for {', '.join(takers)}; for {to} give the number of shards")
    return parse_size(size)


def _dtype(checkpoint: Checkpoint, dtype: torch.dtype | str | None) -> torch.dtype:
    if isinstance(dtype, str):
        if dtype not in SPELLINGS:
            raise ValueError(f"cannot write dtype {dtype!r}; {', '.join(DTYPES)} are possible")
        return SPELLINGS[dtype]
    return dtype or checkpoint.dtype or torch.float32


def _prepare(source: Path, destination: Path) -> list[str]:
    """Removes what interrupted runs have left, and says so.

    Refuses what would destroy the source, or files that no conversion has written.
    """
    warnings = [f"removed {path.name}, left by an interrupted run" for path in clean_leftovers(destination)]
    new, old = destination.resolve(), source.resolve()
    if new == old or new in old.parents or (old.is_dir() and old in new.parents):
        raise CheckpointError(f"{destination}: is the source itself, inside it or around it; name another destination")
    if destination.is_dir():
        known = BESIDE_WEIGHTS.union(*(row.suffixes for row in FORMATS.values()))
        for path in sorted(destination.iterdir()):
            if not path.is_file() or path.suffix not in known:
                raise CheckpointError(f"{destination}: holds {path.name}, which is no checkpoint's; name another place")
    return warnings
