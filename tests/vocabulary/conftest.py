"""Vocabularies that many tests look at."""

from pathlib import Path

import pytest
from support.vocabularies import LLAMA3, LLAMA3_JSON, SMOLLM2, make_files, package_file

from llama.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, Path]:
    return make_files(tmp_path_factory.mktemp("vocabularies"))


@pytest.fixture(scope="session")
def tiny(files) -> dict[str, Tokenizer]:
    return {name: Tokenizer(path) for name, path in files.items()}


@pytest.fixture(scope="session")
def llama3() -> Tokenizer:
    return Tokenizer(package_file(*LLAMA3))


@pytest.fixture(scope="session")
def llama3_json() -> Tokenizer:
    return Tokenizer(package_file(*LLAMA3_JSON))


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    return Tokenizer(package_file(*SMOLLM2))
