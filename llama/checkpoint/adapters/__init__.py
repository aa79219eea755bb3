"""Adapters (LoRA): what their files say, and models with adapters merged into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...files.errors import CheckpointError
from ..hub import ADAPTERS, resolve
from ..opened import Checkpoint
from ..weight import Weight
from .adapter import Adapter, LowRank
from .gguf import is_gguf_adapter, open_gguf_adapter
from .merging import merge_adapter
from .peft import ADAPTER_CONFIG, is_peft, open_peft

__all__ = [
    "Adapter",
    "LowRank",
    "is_adapter",
    "merge_adapter",
    "open_adapter",
    "open_weighted",
    "with_adapters",
    "with_adapters_beside",
]


def is_adapter(path: Path) -> bool:
    """Whether there is an adapter at `path`, and no model."""
    return (is_peft(path) and not (path / "config.json").is_file()) or is_gguf_adapter(path)


def open_adapter(path: str | Path) -> Adapter:
    """Opens a PEFT directory, a GGUF file with an adapter, or org/name of the hub: what it says is parsed.

    Raises FileNotFoundError where nothing is at `path`, CheckpointError for what is no adapter or a damaged one.
    """
    path = resolve(path, kinds=ADAPTERS)
    if is_peft(path):
        return open_peft(path)
    if is_gguf_adapter(path):
        return open_gguf_adapter(path)
    raise CheckpointError(
        f"{path}: no adapter found; a directory must hold {ADAPTER_CONFIG}, a file must be a GGUF adapter"
    )


def open_weighted(given: str | Path) -> Adapter:
    """Opens an adapter that is given as a path, or as "PATH=0.7", which makes it as strong as that; so does a second
    weight behind it."""
    path, weight = parse_weighted(given)
    return open_adapter(path) if path == given else open_weighted(path).weighted(weight)


def parse_weighted(given: str | Path) -> tuple[str | Path, float]:
    """A path and its weight, from "PATH=0.7"; 1 where there is none. What exists under the whole name is a path."""
    path, equals, weight = str(given).rpartition("=")
    if not equals or Path(given).expanduser().exists():
        return given, 1.0
    try:
        number = float(weight)
    except ValueError:
        return given, 1.0
    if not -1e6 < number < 1e6:
        raise CheckpointError(f"{given}: a weight of {weight} is not possible")
    return path, number


def with_adapters(checkpoint: Checkpoint, given: str | Path | Sequence[str | Path] | None) -> Checkpoint:
    """The checkpoint with each of the adapters in it, in order: paths, or "PATH=0.7" for one with a weight."""
    for one in as_list(given):
        checkpoint, _ = merge_adapter(checkpoint, open_weighted(one))
    return checkpoint


def with_adapters_beside(
    checkpoint: Checkpoint, given: str | Path | Sequence[str | Path] | None, keeps: Callable[[Weight], bool]
) -> tuple[Checkpoint, list[Adapter]]:
    """The same, but linears of which `keeps` is true stay in their blocks; and what is to be added beside those."""
    beside = []
    for one in as_list(given):
        checkpoint, rest = merge_adapter(checkpoint, open_weighted(one), keeps)
        beside += [] if rest is None else [rest]
    return checkpoint, beside


def as_list(given: str | Path | Sequence[str | Path] | None) -> Sequence[str | Path]:
    """One adapter, several or none, as a list."""
    return [given] if isinstance(given, str | Path) else given or ()
