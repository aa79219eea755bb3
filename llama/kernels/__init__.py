"""The few operators that PyTorch lacks, each with its PyTorch twin.

`lowbit`: products with packed low-bit weights (C++ in `csrc/`, built by setup.py as an optional extension).
`cuda`: the same products on a GPU, in Triton; its twin is `Layout.dequantize` and PyTorch's product.
"""
