"""Quantized directories of other programs: one class a method, one row each."""

from .bitsandbytes import BitsAndBytes
from .gptq import Awq, Gptq
from .method import Method, Where
from .scaled import CompressedTensors, Fp8

METHODS: dict[str, type[Method]] = {
    # by the name that `quant_method` has
    "gptq": Gptq,
    "awq": Awq,
    "bitsandbytes": BitsAndBytes,
    "fp8": Fp8,
    "fbgemm_fp8": Fp8,
    "compressed-tensors": CompressedTensors,
}

__all__ = ["METHODS", "Method", "Where"]
