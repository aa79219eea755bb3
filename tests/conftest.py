"""What holds for every test: one thread, and Triton's interpreter where there is no GPU."""

import io
import os
import sys

import pytest
import torch
from support.tiny import ByteTokenizer

from llama import __main__ as command_line

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels run on the CPU, in NumPy


@pytest.fixture
def byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def llama(monkeypatch, capsys):
    """Runs a command in this process: (status, standard output, standard error)."""

    def run(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llama", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            command_line.main()
            status = 0
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run
