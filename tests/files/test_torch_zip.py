"""PyTorch's zip files: what is read of them, and what is refused before torch sees it."""

import io
import os
import pickle
import struct
import time
import zipfile

import pytest
import torch
from support.checkpoints import LINUX, assert_equal

from llama.files.errors import CheckpointError
from llama.files.torch_zip import read_torch_file

pytestmark = pytest.mark.skipif(not LINUX, reason="names of POSIX functions")


class Canary:
    """Unpickling it by plain pickle creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refused(path, message):
    with pytest.raises(CheckpointError, match=message) as error:
        read_torch_file(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda canary: {"x": canary},
        lambda canary: canary,
        lambda canary: {"x": torch.zeros(2), "y": [canary]},
        lambda canary: {canary: 1},
    ],
)
def test_code_in_a_pickle_is_named_and_never_run(tmp_path, make):
    torch.save(make(Canary(tmp_path / "ran")), tmp_path / "x.pth")
    refused(tmp_path / "x.pth", r"it wants 'posix mkdir'")
    assert not (tmp_path / "ran").exists()


def test_old_pickles_are_refused_without_a_look_inside(tmp_path):
    torch.save({"x": Canary(tmp_path / "ran")}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    refused(tmp_path / "x.pth", "not a zip file.*older pickles are refused")
    (tmp_path / "y.pth").write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
    refused(tmp_path / "y.pth", "older pickles are refused")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.zeros(2)], "a dictionary of tensors was expected, not list"),
        ({"x": 3}, "x: a tensor was expected, not int"),
        ({1: torch.zeros(2)}, "1: a tensor's name must be a string"),
        ({"x": torch.zeros(2, 3).T}, r"x: strides \[1, 3\] of shape \[3, 2\]"),
        ({"x": torch.zeros(1).expand(5)}, r"x: strides \[0\]"),
        ({"x": torch.zeros(3).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"x": torch.zeros(3, device="meta")}, "_rebuild_meta_tensor_no_storage"),
        ({"x": bytearray(10)}, "bytearray"),
    ],
)
def test_only_a_flat_dictionary_of_dense_tensors_is_read(tmp_path, value, message):
    torch.save(value, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", message)


def test_ordered_dictionaries_parameters_and_parts_of_larger_storages_are_read(tmp_path):
    from collections import OrderedDict

    whole = torch.arange(10.0)
    value = OrderedDict(a=whole[2:6], b=torch.nn.Parameter(torch.ones(3)), c=whole)
    torch.save(value, tmp_path / "x.pth")
    tensors, _ = read_torch_file(tmp_path / "x.pth")
    assert_equal(tensors, {"a": whole[2:6], "b": torch.ones(3), "c": whole})
    assert not tensors["b"].requires_grad


def rezip(path, change=lambda name, data: data, compress=zipfile.ZIP_STORED, extra=()):
    """Writes the zip anew, with other contents or in another way."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, change(name, archive.read(name))) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, data in [*members, *extra]:
            archive.writestr(name, data)
    return path


@pytest.fixture
def archive(tmp_path):
    torch.save({"x": torch.arange(1000.0), "y": torch.ones(5)}, tmp_path / "x.pth")
    return tmp_path / "x.pth"


def test_zip_files_that_pytorch_never_writes_are_refused(archive, tmp_path):
    data = archive.read_bytes()
    refused(rezip(archive, compress=zipfile.ZIP_DEFLATED), "is compressed, which checkpoints never are")
    archive.write_bytes(data)
    with pytest.warns(UserWarning, match="Duplicate name"):
        rezip(archive, extra=[("x/data/0", b"1234")])
    refused(archive, "a zip member occurs twice")
    archive.write_bytes(data)
    refused(rezip(archive, extra=[("y/data.pkl", b"")]), "there is no data.pkl in it")
    archive.write_bytes(data + b"more")
    refused(archive, "something follows the zip archive")
    archive.write_bytes(data)
    with zipfile.ZipFile(archive, "a") as zip_file:
        zip_file.comment = b"hello"
    refused(archive, "something follows the zip archive")
    archive.write_bytes(b"PK\3\4" + b"x" * 50 + data)
    refused(archive, "its zip directory is not one that PyTorch writes")
    with zipfile.ZipFile(archive, "w"):
        pass
    refused(archive, "not a zip file")
    refused(rezip(archive, extra=[("x/other", b"1")]), "there is no data.pkl in it")


def test_a_member_that_reaches_into_another_is_refused(archive):
    data = bytearray(archive.read_bytes())
    with zipfile.ZipFile(io.BytesIO(data)) as zip_file:
        first = zip_file.getinfo("x/data/0")
        second = zip_file.getinfo("x/data/1")
    directory = data.rindex(b"x/data/1") - 46
    struct.pack_into("<I", data, directory + 42, first.header_offset)
    archive.write_bytes(data)
    refused(archive, "x/data/1: is not where the zip directory says")
    struct.pack_into("<I", data, directory + 42, second.header_offset)
    struct.pack_into("<II", data, directory + 20, 4000, 4000)
    archive.write_bytes(data)
    refused(archive, "x/data/1: does not end where the zip directory says")


def test_a_storage_that_claims_more_than_its_file_is_refused(archive):
    def grow(name, data):
        return data.replace(b"M\xe8\x03", b"J\xff\xff\xff\x7f") if name.endswith("data.pkl") else data

    refused(rezip(archive, grow), "not a readable PyTorch checkpoint|reaches beyond its storage")


def test_an_endless_pickle_is_refused_before_it_is_parsed(archive):
    began = time.monotonic()
    refused(
        rezip(archive, lambda name, data: b"N" * (5 << 20) if name.endswith("pkl") else data),
        "larger than 4 MB",
    )
    assert time.monotonic() - began < 30


def test_a_damaged_pickle_is_refused_by_its_sum(archive):
    data = bytearray(archive.read_bytes())
    place = data.index(b"FloatStorage")
    data[place] ^= 1
    archive.write_bytes(data)
    refused(archive, "damaged or truncated zip file")
