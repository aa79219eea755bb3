"""The few operators that PyTorch lacks, each with its PyTorch twin.

`formats`: the low-bit formats, one class and one row each. `lowbit`: products with packed low-bit weights.
`attention`: rotating, storing, and single rows that look at their own keys and values. `elementwise`: norm, rotation
and gate in one pass each. `lowrank`: what the adapters of a step add. They are C++ in `csrc/`, which setup.py builds as
an optional extension and `library` loads.
`cuda/`: the same on a GPU, in Triton: attention, norm and gate, low-bit products.
"""
