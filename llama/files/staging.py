"""A place to write to that appears all at once: complete, or not at all."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CheckpointError

ASIDE = "replaced"


@contextmanager
def staged(destination: Path, needed: int, is_directory: bool) -> Iterator[Path]:
    """A temporary sibling to write to, which becomes `destination` only once everything is on the disk.

    Until then an older `destination` stays as it is, and whatever goes wrong leaves nothing else behind. `needed`
    bytes must be free. Raises CheckpointError in one line for a full or unwritable disk.
    """
    if destination.exists() and destination.is_dir() != is_directory:
        raise CheckpointError(f"{destination}: is {'no' if is_directory else 'a'} directory; name another destination")
    parent = destination.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise CheckpointError(f"{destination}: needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free")
        with (
            tempfile.TemporaryDirectory(prefix=_prefix(destination), dir=parent) as folder,
            _locked(Path(folder)),
        ):
            staging = Path(folder) / destination.name
            if is_directory:
                staging.mkdir()
            yield staging
            for path in (*staging.glob("*"), staging):
                _sync(path)
            _move(staging, destination)
            _sync(parent)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CheckpointError(f"{destination}: the disk is full; nothing was written") from error
        raise CheckpointError(f"{destination}: cannot be written: {error.strerror or error}") from error


def clean_leftovers(destination: Path) -> list[Path]:
    """Removes what interrupted runs left beside `destination`, and puts back what one had set aside."""
    removed = []
    for folder in sorted(destination.absolute().parent.glob(glob.escape(_prefix(destination)) + "*")):
        if not folder.is_dir() or _is_in_use(folder):
            continue
        aside = folder / ASIDE
        if aside.exists() and not destination.exists():
            os.replace(aside, destination)
        shutil.rmtree(folder)
        removed.append(folder)
    return removed


def _prefix(destination: Path) -> str:
    return f".{destination.name}.partial-"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock that dies with this process, so that others can tell a running conversion from a leftover."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows: a leftover of the same name is anybody's
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_in_use(folder: Path) -> bool:
    try:
        import fcntl
    except ImportError:
        return False
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _move(staging: Path, destination: Path) -> None:
    """Puts `staging` in the place of `destination`; an older directory is set aside first, a file replaced."""
    if not destination.is_dir():
        os.replace(staging, destination)
        return
    aside = staging.parent / ASIDE
    os.replace(destination, aside)
    try:
        os.replace(staging, destination)
    except BaseException:
        os.replace(aside, destination)
        raise


def _sync(path: Path) -> None:
    """Waits until a file or a directory's entries have reached the disk."""
    if os.name != "posix" and path.is_dir():
        return  # Windows cannot open directories
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
