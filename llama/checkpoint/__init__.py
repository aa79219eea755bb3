"""Checkpoints of every format: open one, fill a model from it, write another."""

from __future__ import annotations

from .conversion import convert, legacy_source
from .default import default_model
from .hub import resolve
from .inspection import Estimate, Inspection, Stored, estimate, inspect
from .load import load_weights
from .opening import open_checkpoint
from .packing import packed_modules, untied
from .shapes import expected_shapes
from .to_lowbit import save_low_bit
from .verification import Finding, verify
from .weight import Checkpoint, CheckpointError, Weight

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Estimate",
    "Finding",
    "Inspection",
    "Stored",
    "Weight",
    "convert",
    "default_model",
    "estimate",
    "expected_shapes",
    "inspect",
    "legacy_source",
    "load_weights",
    "open_checkpoint",
    "packed_modules",
    "resolve",
    "save_low_bit",
    "untied",
    "verify",
]
