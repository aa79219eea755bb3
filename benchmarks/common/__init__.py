"""What the benchmarks share: the machine's limits, measuring in turns, peers, shapes and works."""

import llama  # noqa: F401  (before torch, which reads once what is set there)
