"""The packages that this person's programs compiled, in the person's cache directory, where nobody else may write.

A package is native code, so that whoever can write here runs what he likes: folders of others, and those that others
may write to, are refused.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from llama.files.errors import CheckpointError
from llama.files.staging import clean_leftovers, staged
from llama.streams import tell

from .compiler import compile_package
from .fingerprint import Fingerprint, short_digest
from .graph import StepGraph
from .manifest import PACKAGE, Manifest

NEEDED = 64 << 20  # bytes that must be free to write a package of some megabytes


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/llama/compiled, which the standard wants absolute; else ~/.cache/llama/compiled."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return base / "llama" / "compiled"


class PackageCache:
    """A folder for each package, named by its fingerprint's key; each appears whole or not at all."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder or cache_folder()

    def find(self, fingerprint: Fingerprint) -> Path | None:
        """The folder of the package with this fingerprint; None where there is none, or a damaged one.

        Raises ValueError, in one line, where others may have written.
        """
        folder = self.folder / fingerprint.key
        if not folder.exists():
            return None
        validate_way_to(self.folder)
        for path in (self.folder, folder, *folder.iterdir()):
            validate_own(path)
        try:
            manifest = Manifest.read(folder)
        except (FileNotFoundError, CheckpointError):
            return None
        return folder if manifest.made_with == fingerprint and manifest.is_of(folder) else None

    def make(self, graph: StepGraph, fingerprint: Fingerprint) -> Path:
        """The same, compiled now if it is not there. Of several processes one compiles, and the others wait for it.

        Raises ValueError or RuntimeError, in one line.
        """
        from filelock import FileLock

        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        validate_way_to(self.folder)
        validate_own(self.folder)
        with FileLock(self.folder / f"{fingerprint.key}.lock", mode=0o600):
            folder = self.find(fingerprint)
            if folder is None:
                folder = self.folder / fingerprint.key
                clean_leftovers(folder)
                tell("Compiling the model's step: this takes a minute or more, and once only")
                with staged(folder, NEEDED, is_directory=True) as staging:
                    staging.chmod(0o700)
                    compile_package(graph, staging / PACKAGE)
                    Manifest(fingerprint, short_digest((staging / PACKAGE).read_bytes())).write(staging)
                    for file in staging.iterdir():
                        file.chmod(0o600)
        return folder


def validate_own(path: Path) -> None:
    """Raises ValueError unless `path` is this person's, is no link, and nobody else may write to it."""
    if os.name != "posix":
        return
    state = path.lstat()
    if stat.S_ISLNK(state.st_mode) or state.st_uid != os.geteuid():
        raise ValueError(f"{path}: compiled code runs from folders of your own alone, and this one is another's")
    if state.st_mode & 0o022:
        raise ValueError(f"{path}: others may write there, so no compiled code runs from it: chmod go-w {path}")


def validate_way_to(path: Path) -> None:
    """Raises ValueError where somebody else may put another folder in the place of `path`."""
    if os.name != "posix":
        return
    for parent in path.resolve().parents:
        state = parent.stat()
        is_open = state.st_mode & stat.S_IWOTH and not state.st_mode & stat.S_ISVTX
        if is_open or state.st_uid not in (0, os.geteuid()):
            raise ValueError(f"{parent}: others may rename what is in there, so no compiled code runs from {path}")
