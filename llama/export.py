"""Exported models: a checkpoint, and beside it the package that computes its steps, for a number of sequences and a
length that are chosen once. What optimum-neuron calls batch_size, sequence_length, auto_cast_type and num_cores."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from llama.building import load
from llama.checkpoint import Checkpoint, CheckpointError, default_model, files_of, open_checkpoint, save_low_bit
from llama.compiled import MANIFEST, PACKAGE, ExportLimits, Manifest
from llama.files.staging import clean_leftovers, staged
from llama.quantization import resolve_format

ROOM_BESIDE = 64 << 20  # bytes that must be free besides the checkpoint's


def export_model(
    ckpt_dir: str | Path | None,
    directory: str | Path,
    *,
    batch_size: int = 1,
    sequence_length: int | None = None,
    dtype: str = "auto",
    num_cores: int | None = None,
    quantization: str | None = None,
    kv_dtype: str = "auto",
    tokenizer_path: str | Path | None = None,
) -> ExportLimits:
    """Writes `directory`, which `Llama.build` runs: up to `batch_size` sequences at once, on `num_cores` threads.

    No prompt with its answer is longer than `sequence_length`, the model's context if None; smaller lists and shorter
    prompts are not filled up. The step is compiled in the person's cache, from which it runs on this machine; the copy
    in the directory is for those who trust it. Weights stay as they are stored, or are packed as `quantization`
    says. An older export stays until the new one is complete. Raises FileNotFoundError, ValueError or RuntimeError, in
    one line.
    """
    destination = Path(directory).expanduser()
    if ckpt_dir is not None and Path(ckpt_dir).expanduser().resolve() == destination.resolve():
        raise CheckpointError(f"{destination}: is the model itself; name another directory")
    validate_destination(destination)
    quantization = resolve_format(quantization)
    checkpoint = open_checkpoint(default_model() if ckpt_dir is None else ckpt_dir)
    clean_leftovers(destination)
    needed = ROOM_BESIDE + sum(file.stat().st_size for file in files_of(checkpoint.path))
    with staged(destination, needed, is_directory=True) as staging:
        if quantization is None:
            copy_files(checkpoint, tokenizer_path, staging)
        else:
            save_low_bit(checkpoint, staging, quantization)
        # what lies there may be held in other layouts than the source, so that is what is compiled
        loaded = load(staging, max_seq_len=sequence_length, device="cpu", dtype=dtype, kv_dtype=kv_dtype, compile=True)
        limits = ExportLimits(
            batch_size,
            loaded.model.params.max_seq_len,
            num_cores or torch.get_num_threads(),
            str(loaded.model.norm.weight.dtype).removeprefix("torch."),
            kv_dtype,
        )
        package = loaded.program.package
        shutil.copyfile(package, staging / PACKAGE)
        made = Manifest.read(package.parent)
        replace(made, limits=limits, checkpoint=loaded.checkpoint.digest).write(staging)
    return limits


def validate_destination(path: Path) -> None:
    """Raises CheckpointError unless nothing is there, or an earlier export, which is replaced as a whole."""
    if path.is_dir() and any(path.iterdir()) and not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path}: holds files that no export wrote; name another directory")


def copy_files(checkpoint: Checkpoint, tokenizer_path: str | Path | None, folder: Path) -> None:
    """A checkpoint's files, and its tokenizer's where that stands elsewhere."""
    files = files_of(checkpoint.path)
    tokenizer = checkpoint.tokenizer_path if tokenizer_path is None else Path(tokenizer_path)
    if tokenizer is not None and tokenizer.is_file():
        files = [file for file in files if file.name != tokenizer.name] + [tokenizer]
    for file in files:
        shutil.copyfile(file, folder / file.name)
