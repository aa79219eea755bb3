"""Checkpoints of every format: open one, fill a model from it, write another."""

from __future__ import annotations

from ..files.errors import CheckpointError, Finding
from .adapters import Adapter, LowRank, is_adapter, open_adapter, open_weighted, with_adapters, with_adapters_beside
from .conversion import convert, legacy_source, parse_size, save_low_bit
from .default import DEFAULT_ABOUT, DEFAULT_SETTINGS, default_model
from .folder import adapter_in, adapters_in, located_adapter, model_in, models_in
from .formats import open_checkpoint
from .hub import files_of, resolve
from .inspection import Estimate, Inspection, Stored, estimate, inspect
from .inventory import expected_shapes
from .load import load_weights
from .opened import Checkpoint
from .packing import keeps_blocks, packed_modules, untied
from .push import push
from .verification import verify
from .weight import Weight

__all__ = [
    "DEFAULT_ABOUT",
    "DEFAULT_SETTINGS",
    "Adapter",
    "Checkpoint",
    "CheckpointError",
    "Estimate",
    "Finding",
    "Inspection",
    "LowRank",
    "Stored",
    "Weight",
    "adapter_in",
    "adapters_in",
    "convert",
    "default_model",
    "estimate",
    "expected_shapes",
    "files_of",
    "inspect",
    "is_adapter",
    "keeps_blocks",
    "legacy_source",
    "load_weights",
    "located_adapter",
    "model_in",
    "models_in",
    "open_adapter",
    "open_checkpoint",
    "open_weighted",
    "packed_modules",
    "parse_size",
    "push",
    "resolve",
    "save_low_bit",
    "untied",
    "verify",
    "with_adapters",
    "with_adapters_beside",
]
