"""Hugging Face directories whose matrices another program quantized: in our blocks where they fit, else dequantized."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...files.errors import CheckpointError, shown
from ...files.json import read_json
from ...files.tensor_file import TensorFile
from ...model import ModelArgs
from ..arrays import Mapped
from ..methods import METHODS, Method, Where
from ..opened import Checkpoint
from ..settings import Settings
from .huggingface import StoredArray, config_settings, is_huggingface, open_huggingface

SECTIONS = ("quantization_config", "compression_config")  # in config.json: today's name, an older one
BESIDE = "quantize_config.json"  # AutoGPTQ's file of its own


def is_quantized(path: Path) -> bool:
    """Whether `path` is a Hugging Face directory that says how its matrices were quantized."""
    if not is_huggingface(path):
        return False
    values = config_settings(path).values
    return any(values.get(key) is not None for key in SECTIONS) or (path / BESIDE).is_file()


def open_quantized(path: Path) -> Checkpoint:
    """Opens a directory that one of METHODS can read. Raises CheckpointError for all others, by their name."""
    return open_huggingface(path, _arrays)


def _arrays(settings: Settings, args: ModelArgs, files: list[TensorFile]) -> Iterator[StoredArray]:
    """Every stored array; the parts of a matrix become one `....weight`.

    Of a matrix's parts the small ones are read, to see whether a format of ours holds it. Raises CheckpointError for a
    method that is not supported and for parts that are missing or do not fit together.
    """
    method = _method(settings)
    suffixes = {f".{part}": part for part in sorted(method.parts, key=len, reverse=True)}
    modules: dict[str, dict[str, Mapped]] = {}
    places: dict[str, Path] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            array = Mapped(tensor, file.check)
            suffix = next(filter(name.endswith, suffixes), None)
            if suffix is None:
                yield name, array, file.path
                continue
            module = name.removesuffix(suffix)
            modules.setdefault(module, {})[suffixes[suffix]] = array
            places[module] = file.path
    for module, parts in modules.items():
        yield f"{module}.weight", method.matrix(Where(places[module], module), parts), places[module]


def _method(settings: Settings) -> Method:
    beside = settings.file.with_name(BESIDE)
    found = next(filter(None, map(settings.section, SECTIONS)), None)
    found = found or Settings(read_json(beside), beside)
    is_old_bitsandbytes = "load_in_4bit" in found.values or "load_in_8bit" in found.values
    name = found.text("quant_method") or ("bitsandbytes" if is_old_bitsandbytes else "gptq")
    if name.lower() not in METHODS:
        raise CheckpointError(
            f"{found.file}: quantization {shown(name)} is not supported; {', '.join(METHODS)} are. Give the model's "
            f"unquantized weights instead; quantization='sym_int4' packs them as they load"
        )
    return METHODS[name.lower()](found)
