"""The formats of checkpoints, one row each: how one is recognised, opened, written and verified."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...files.errors import CheckpointError, Finding, shown
from ...files.gguf import write_gguf
from ...files.json import read_json
from ...files.safetensors import write_safetensors
from ...files.torch_zip import write_torch_file
from ...files.writing import Plan, Writer
from ..hub import resolve
from ..opened import Checkpoint
from .gguf import is_gguf, open_gguf_model, plan_gguf
from .huggingface import is_huggingface, open_huggingface, plan_huggingface
from .lowbit import is_lowbit, open_lowbit, plan_lowbit
from .meta import is_meta, open_meta, plan_meta
from .quantized import is_quantized, open_quantized
from .weight_files import verify_index


def nothing(path: Path) -> Iterator[Finding]:
    """Nothing to verify beyond what opening does."""
    return iter(())


@dataclass(frozen=True)
class Format:
    """What there is to know about one format. A path is given to the first row that recognises it, by its content."""

    recognise: Callable[[Path], bool]
    open: Callable[[Path], Checkpoint]
    plan: Callable[..., Plan] | None = None
    """(checkpoint, its tokenizer's files or None, **options) -> what is to be written; None: it is only read."""
    write: Writer | None = None
    """Writes one tensor file of the plan."""
    options: tuple[str, ...] = ()
    """What `plan` takes besides: "dtype", "shards", "max_shard_size", "type" (a low-bit format)."""
    verify: Callable[[Path], Iterator[Finding]] = nothing
    """What only this format's files can have wrong."""
    suffixes: tuple[str, ...] = (".safetensors", ".bin")
    """What the names of the weight files in its directory end with."""


FORMATS = {
    "meta": Format(is_meta, open_meta, plan_meta, write_torch_file, ("dtype", "shards"), suffixes=(".pth",)),
    "lowbit": Format(is_lowbit, open_lowbit, plan_lowbit, write_safetensors, ("type",), verify_index),
    "quantized": Format(is_quantized, open_quantized, verify=verify_index),
    "hf": Format(
        is_huggingface,
        open_huggingface,
        plan_huggingface,
        write_safetensors,
        ("dtype", "shards", "max_shard_size"),
        verify_index,
    ),
    "gguf": Format(is_gguf, open_gguf_model, plan_gguf, write_gguf, ("dtype",), suffixes=()),
}


def recognise(path: Path) -> Format:
    """The row of what is at `path`. Raises CheckpointError for what is no checkpoint."""
    for row in FORMATS.values():
        if row.recognise(path):
            return row
    raise CheckpointError(f"{path}: no checkpoint found; {_expectation(path)}")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a checkpoint of any format, or `org/name` of the hub: its settings are parsed, its weights stay on disk.

    Raises FileNotFoundError where nothing is at `path`, CheckpointError for what is no checkpoint or a damaged one.
    """
    path = resolve(path)
    return recognise(path).open(path)


def _expectation(path: Path) -> str:
    if path.is_file():
        return "a file must be GGUF; for .pth, .bin and .safetensors give their directory"
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        of = f" of {shown(base)}" if base else ""
        return f"it holds an adapter (LoRA){of} and no model: merge it into its base model and give the merged one"
    return (
        "a directory must hold params.json with consolidated.NN.pth, config.json with .safetensors or .bin files, "
        "or a .gguf file"
    )
