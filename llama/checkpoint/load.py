"""Filling a model: match names and shapes -> split for this rank -> read, cast and assign, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from ..embedding import Embedding
from ..files.errors import CheckpointError
from ..linear import LoadsItself
from ..model import Transformer, validate_ranks
from .inventory import expected_shapes, split_dim
from .opened import Checkpoint
from .weight import Weight

MAX_NAMED = 8
NUM_READERS = 4


def load_weights(
    model: Transformer,
    checkpoint: Checkpoint,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Replaces every parameter of `model` (usually on the meta device) by the checkpoint's, cut for `rank`.

    On the CPU, where `dtype` is the stored type (or None), parameters are the mapped file itself, without a copy;
    otherwise they are written once, in their final type and order. On other devices the CPU holds NUM_READERS
    weights at a time at most.

    A module that `LoadsItself` gets this rank's part, unread, and may keep the stored blocks of it.

    A module whose `as_stored` is true keeps a stored type that is smaller than `dtype`.

    `progress` is called with the bytes done and the bytes in all. Raises CheckpointError, before anything is read,
    that names every missing, unexpected, duplicate and misshapen weight; ValueError for an uneven world size.
    """
    validate_ranks(checkpoint.args, world_size)
    weights = match(model, checkpoint)
    total, done = sum(weight.nbytes for weight in weights), 0
    target = torch.device(device)
    with ThreadPoolExecutor(NUM_READERS) as readers:  # most of loading is the kernel's work on new pages
        filled = readers.map(lambda part: fill(model, part, target, dtype), split(weights, rank, world_size))
        for weight, _ in zip(weights, filled, strict=True):
            done += weight.nbytes
            if progress:
                progress(done, total)


def match(model: Transformer, checkpoint: Checkpoint) -> list[Weight]:
    """The checkpoint's weights of which this rank has a part, in order, if all are exactly what the model wants."""
    weights = list(checkpoint.weights())
    problems = list(_problems(dict(expected_shapes(model.params)), weights))
    if problems:
        named = "; ".join(problems[:MAX_NAMED])
        more = f"; and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
        raise CheckpointError(f"{checkpoint.path}: {named}{more}")
    held = set(_held(model))
    return [weight for weight in weights if weight.name in held]


def split(weights: Iterable[Weight], rank: int, world_size: int) -> Iterator[Weight]:
    """This rank's part of each weight; nothing is read."""
    return (weight.part(split_dim(weight.name), rank, world_size) for weight in weights)


def fill(model: nn.Module, part: Weight, device: torch.device, dtype: torch.dtype | None) -> None:
    """Reads this rank's part of one weight and makes it a parameter of the module that bears its name."""
    path, _, attribute = part.name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, LoadsItself):
        module.load_weight(attribute, part, device, dtype)
        return
    if dtype is not None and isinstance(module, Embedding) and module.as_stored:
        dtype = min(dtype, part.dtype, key=lambda one: one.itemsize)
    tensor = part.mapped()
    if tensor is None or (dtype is not None and tensor.dtype != dtype):
        tensor = torch.empty(part.shape, dtype=dtype or part.dtype)
        part.copy_to(tensor)
    setattr(module, attribute, nn.Parameter(tensor.to(device), requires_grad=False))


def _held(model: nn.Module) -> Iterator[str]:
    """The names of everything that is to be filled on this rank."""
    for path, module in model.named_modules():
        if isinstance(module, LoadsItself):
            names = module.weight_shapes()
        else:
            names = dict(module.named_parameters(recurse=False))
        yield from (f"{path}.{name}" for name in names)


def _problems(wanted: dict[str, tuple[int, ...]], weights: list[Weight]) -> Iterator[str]:
    found: set[str] = set()
    for weight in weights:
        if weight.name in found:
            yield f"{weight.name} occurs twice"
        elif weight.name not in wanted:
            yield f"{weight.name} is unexpected"
        elif weight.shape != wanted[weight.name]:
            yield f"{weight.name} has shape {list(weight.shape)}, expected {list(wanted[weight.name])}"
        found.add(weight.name)
    yield from (f"{name} is missing" for name in wanted if name not in found)
