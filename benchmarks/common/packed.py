"""A GGUF file with the blocks that this engine packs, for llama.cpp to read."""

from __future__ import annotations

from pathlib import Path

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from llama.checkpoint import open_checkpoint, untied
from llama.checkpoint.inventory import TO_GGUF, is_linear, rename
from llama.quantization import FORMATS


def is_ggml(format: str) -> bool:
    """Whether llama.cpp has a type of this name."""
    return format.upper() in GGMLQuantizationType.__members__


def write_packed(source: Path, target: Path, format: str) -> None:
    """The GGUF file `source` with every linear in that format, an output layer that is the embedding too.

    The bytes are those that `Llama.build(source, quantization=format)` multiplies, where llama.cpp's own quantizer
    would pack the embedding as well. What is no linear stays as it is stored.
    """
    writer = GGUFWriter(target, "llama")
    for key, field in GGUFReader(source).fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":  # what the writer writes by itself
            kind, inner = field.types[0], field.types[-1]
            writer.add_key_value(key, field.contents(), kind, inner if kind == GGUFValueType.ARRAY else None)
    for weight in untied(open_checkpoint(source)).weights():
        name, kind = rename(weight.name, TO_GGUF), weight.format
        if is_linear(weight.name) and kind != format:
            kind, data = format, FORMATS[format].quantize(weight.read().float())
        else:
            data = weight.read_packed()[0] if kind else weight.read()
        writer.add_tensor(name, data.numpy(), raw_dtype=GGMLQuantizationType[kind.upper()] if kind else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
