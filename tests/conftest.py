"""What holds for every test: one thread, and Triton's interpreter where there is no GPU."""

import os

import pytest
import torch
from support.tiny import ByteTokenizer

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: its kernels run on the CPU, in NumPy


@pytest.fixture
def byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()
