"""Vocabularies of real models."""

from pathlib import Path

import pytest

from llama.checkpoint import default_model
from llama.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def smollm():
    return Tokenizer(str(default_model()))


@pytest.fixture(scope="module")
def llama3_file():
    package = pytest.importorskip("llama_models")
    return Path(package.__file__).parent / "llama3" / "tokenizer.model"


@pytest.fixture(scope="module")
def sentencepiece_file():
    package = pytest.importorskip("mistral_common")
    return Path(package.__file__).parent / "data" / "tokenizer.model.v1"
