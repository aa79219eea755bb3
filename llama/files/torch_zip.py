"""PyTorch's zip files (`.pth`, `.bin`): checked, then mapped; and written one tensor at a time."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .mapped import open_file, size_check
from .writing import Entry, Progress

MAX_PICKLE_BYTES = 4 << 20
MAX_MEMBERS = 100_000
LOCAL_HEADER = struct.Struct("<4s22xHH")
END_RECORD = struct.Struct("<4s16xH")
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(
        f"torch {kind}Storage"
        for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
    ),
}


def read_torch_file(path: Path) -> tuple[dict[str, Tensor], Callable[[], None]]:
    """The tensors of a `.pth` or `.bin` file as views of the mapped file, and the check to run before touching them.

    Raises CheckpointError for anything but a flat dictionary of dense tensors in an uncompressed zip: old pickles,
    compressed or overlong members and foreign objects are refused before torch.load sees the file.
    """
    check = size_check(path) if path.exists() else lambda: None
    _check_zip(path)
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever a hostile pickle or zip provokes becomes one clear line
        raise CheckpointError(f"{path}: not a readable PyTorch checkpoint: {_first_line(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: a dictionary of tensors was expected, not {type(state).__name__}")
    for name, tensor in state.items():
        problem = _problem(name, tensor)
        if problem:
            raise CheckpointError(f"{path}: {name}: {problem}")
    return {name: tensor.detach() for name, tensor in state.items()}, check


def _problem(name: object, tensor: object) -> str | None:
    if not isinstance(name, str):
        return "a tensor's name must be a string"
    if not isinstance(tensor, Tensor):
        return f"a tensor was expected, not {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return f"only dense tensors are allowed, not {tensor.layout} on {tensor.device}"
    if not tensor.is_contiguous():
        return f"strides {list(tensor.stride())} of shape {list(tensor.shape)} are not those of a dense tensor"
    if (tensor.storage_offset() + tensor.numel()) * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "reaches beyond its storage"
    return None


def _check_zip(path: Path) -> None:
    with open_file(path) as file:
        if file.read(4) != b"PK\3\4":
            raise CheckpointError(
                f"{path}: not a zip file, as PyTorch has written since 1.6, or truncated; older pickles are refused: "
                "save it again with a current torch.save"
            )
        try:
            with zipfile.ZipFile(file) as archive:
                problem = next(_zip_problems(archive, file), None)
        except Exception as error:  # zipfile raises many kinds on damaged files
            raise CheckpointError(f"{path}: a damaged or truncated zip file: {_first_line(error)}") from error
        if problem:
            raise CheckpointError(f"{path}: {problem}")


def _zip_problems(archive: zipfile.ZipFile, file: IO[bytes]) -> Iterator[str]:
    """What torch.load would not notice, or would read differently from here."""
    file.seek(-END_RECORD.size, io.SEEK_END)
    signature, comment_length = END_RECORD.unpack(file.read(END_RECORD.size))
    if signature != b"PK\5\6" or comment_length:
        yield "something follows the zip archive"
    members = archive.infolist()
    if len(members) > MAX_MEMBERS or min((member.header_offset for member in members), default=1) != 0:
        yield "its zip directory is not one that PyTorch writes"
    if len({member.filename for member in members}) < len(members):
        yield "a zip member occurs twice"
    for member in members:
        if problem := _member_problem(member, file):
            yield f"{member.filename}: {problem}"
    pickles = [one for one in members if one.filename.endswith("/data.pkl") and one.filename.count("/") == 1]
    if len(pickles) != 1:
        yield "there is no data.pkl in it, so PyTorch did not write this file"
    elif pickles[0].file_size > MAX_PICKLE_BYTES:
        yield f"data.pkl is larger than {MAX_PICKLE_BYTES >> 20} MB"
    else:
        yield from _pickle_problems(archive.read(pickles[0]))


def _member_problem(member: zipfile.ZipInfo, file: IO[bytes]) -> str | None:
    """Whether a member lies in the file just as the zip directory and its own header say."""
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        return "is compressed, which checkpoints never are"
    file.seek(member.header_offset)
    header = file.read(LOCAL_HEADER.size)
    if len(header) < LOCAL_HEADER.size:
        return "lies outside the file"
    signature, name_length, extra_length = LOCAL_HEADER.unpack(header)
    name = file.read(name_length)
    if signature != b"PK\3\4" or name != member.filename.encode():
        return "is not where the zip directory says"
    file.seek(extra_length + member.file_size, io.SEEK_CUR)
    if file.read(4) not in (
        b"PK\3\4",
        b"PK\1\2",
        b"PK\7\x08",
    ):  # the next member, the directory, a descriptor
        return "does not end where the zip directory says"
    return None


def _pickle_problems(data: bytes) -> Iterator[str]:
    """Names every callable in the pickle that a plain dictionary of dense tensors does not need."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL" and argument not in _GLOBALS:
            yield f"it wants {argument!r}, which is not part of a dictionary of dense tensors"
        if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
            yield f"it holds the pickle instruction {opcode.name}, which a dictionary of tensors does not need"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


MEMBER_ALIGNMENT = 64  # of the tensors in the file, so that mapped memory suits every kernel


class _Reference:
    """Stands for a tensor in the pickle: rebuilt from a stored number of values, as torch.save describes it."""

    def __init__(self, number: int, entry: Entry) -> None:
        self.storage = _Storage(str(number), entry)
        self.shape = entry.shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides = [1]
        for size in reversed(self.shape[1:]):
            strides.insert(0, strides[0] * size)
        return torch._utils._rebuild_tensor_v2, (
            self.storage,
            0,
            self.shape,
            tuple(strides),
            False,
            OrderedDict(),
        )


class _Storage:
    """Stands for a storage: its key is the name of the zip member that holds its bytes."""

    def __init__(self, key: str, entry: Entry) -> None:
        kind = _STORAGES[entry.dtype]
        self.persistent_id = ("storage", kind, key, "cpu", entry.nbytes // entry.dtype.itemsize)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.persistent_id if isinstance(obj, _Storage) else None


_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.uint8: torch.ByteStorage,
}


def write_torch_file(path: Path, entries: Sequence[Entry], metadata: Mapping[str, Any], progress: Progress) -> None:
    """Writes a state dict as torch.save would, but one tensor at a time, so that torch.load can map it.

    The format keeps no `metadata`.
    """
    pickled = io.BytesIO()
    state = {entry.name: _Reference(number, entry) for number, entry in enumerate(entries)}
    _Pickler(pickled, protocol=2).dump(state)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_member(archive, "data.pkl"), pickled.getvalue())
        archive.writestr(_member(archive, "byteorder"), b"little")
        for number, entry in enumerate(entries):
            member = _member(archive, f"data/{number}")
            with archive.open(member, "w", force_zip64=True) as file:
                entry.write(file)
            progress(entry.nbytes)
        archive.writestr(_member(archive, "version"), b"3\n")


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """A zip member whose bytes will start at a multiple of MEMBER_ALIGNMENT: an extra field is the padding."""
    member = zipfile.ZipInfo(f"archive/{name}")
    zip64 = 20 if name.startswith("data/") else 0  # the extra field that force_zip64 adds
    start = archive.fp.tell() + 30 + len(member.filename) + zip64 + 4
    padding = -start % MEMBER_ALIGNMENT
    member.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return member
