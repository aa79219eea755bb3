"""The scripts that benchmarks talk to, beside those of `llama.bench`."""

from __future__ import annotations

from pathlib import Path

from llama.bench.peer import Peer
from llama.bench.sides import CHILDREN, PACKAGE_ROOT, TWINS

__all__ = ["CHECKOUT", "GGML", "LLAMACPP", "PACKAGE_ROOT", "PADDED", "TWINS", "Peer"]
HERE = Path(__file__).parent
GGML, CHECKOUT = HERE / "ggml.py", HERE / "checkout.py"
LLAMACPP, PADDED = CHILDREN / "llamacpp.py", CHILDREN / "padded.py"
