"""Where a model computes, in which numbers, and how much memory is there."""

import builtins
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from llama.device import UNKNOWN_MEMORY, choose_device, choose_dtype, free_memory, num_sharing

CPU = torch.device("cpu")


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.fixture
def not_linux(monkeypatch):
    """No /proc, no os.sysconf, as on Windows."""
    real = builtins.open

    def absent(path, *arguments, **options):
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", absent)
    monkeypatch.delattr(os, "sysconf", raising=False)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "xpu", "mps"])
def test_a_device_that_is_not_here_is_refused_with_what_is(device, no_accelerator):
    with pytest.raises(ValueError, match=f"device is '{device}', but this torch finds none here: give auto or cpu"):
        choose_device(device)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", ""])
def test_what_is_no_device_is_refused_in_one_line(device, no_accelerator):
    with pytest.raises(ValueError, match=f"device is '{device}': give auto, cpu$"):
        choose_device(device)


def test_an_index_that_does_not_exist_is_refused(two_gpus, monkeypatch):
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:0")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device is cuda:2, but there are 2, counted from 0"):
        choose_device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ValueError, match="device is cuda:3, but there are 2"):
        choose_device("auto")


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (("bf16", "bfloat16", torch.bfloat16), torch.bfloat16),
        (("fp16", "float16", torch.float16), torch.float16),
        (("fp32", "float32", torch.float32), torch.float32),
    ],
)
def test_a_type_is_known_by_every_usual_name(names, dtype):
    assert [choose_dtype(name, torch.float32, CPU) for name in names] == [dtype] * 3


def test_an_unknown_type_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"dtype is 'int3': give auto, bf16, .*float32 or a torch dtype"):
        choose_dtype("int3", None, CPU)


def test_free_memory_is_asked_of_psutil_where_there_is_no_proc(not_linux, monkeypatch):
    told = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=12345))
    monkeypatch.setitem(sys.modules, "psutil", told)
    assert free_memory(CPU) == 12345


def test_ranks_of_one_machine_share_its_memory_and_each_has_a_gpu_of_its_own(monkeypatch):
    assert num_sharing(CPU) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert num_sharing(CPU) == 4
    assert num_sharing(torch.device("cuda", 0)) == 1


def test_free_memory_is_a_stated_number_where_nobody_tells(not_linux, monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert free_memory(CPU) == UNKNOWN_MEMORY
