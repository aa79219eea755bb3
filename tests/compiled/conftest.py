"""One tiny model and its package, compiled once for all tests: it takes a C++ compiler half a minute."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.checkpoints import sample, write_hf, write_sentencepiece

from llama import Llama
from llama.kernels import library

SHAPE = dict(dim=64, n_heads=4, n_kv_heads=2, max_seq_len=1024)  # heads of 16, which the kernels serve
OPTIONS = dict(device="cpu", dtype="fp32", kv_cache_memory=1 << 22)


@dataclass
class Made:
    """A checkpoint, and the cache folder in which its package is."""

    checkpoint: Path
    cache: Path

    def build(self, path: Path | None = None, **options) -> Llama:
        return Llama.build(path or self.checkpoint, **OPTIONS | options)


@pytest.fixture(autouse=True, scope="session")
def quickly() -> Iterator[None]:
    """g++ optimises what stands between operators for longer than it takes to run here."""
    os.environ["AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL"] = "O0"
    yield
    del os.environ["AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL"]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory, quickly) -> Made:
    """Workers of one run share it: whoever comes second waits, and finds it."""
    if not library.AVAILABLE or not shutil.which("g++"):
        pytest.skip("compiling needs the kernels and a C++ compiler")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    args, weights = sample(**SHAPE)
    checkpoint = write_hf(tmp_path_factory.mktemp("model"), args, weights)
    write_sentencepiece(checkpoint / "tokenizer.model")
    made = Made(checkpoint, shared / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(made.cache))
        made.build(compile=True)
    return made


@pytest.fixture
def made(compiled, monkeypatch) -> Made:
    """The same, with its cache as the person's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiled.cache))
    return compiled


@pytest.fixture
def elsewhere(compiled, monkeypatch, tmp_path) -> Made:
    """The same, for somebody who has compiled nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return compiled


@pytest.fixture
def no_compiler(monkeypatch) -> Iterator[Callable[[], None]]:
    """A machine without a C++ compiler."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
