"""A directory that `llama export` wrote: a checkpoint, and beside it a package with its manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llama.device import SPELLINGS
from llama.files.errors import CheckpointError

from .fingerprint import Fingerprint
from .manifest import MANIFEST, PACKAGE, ExportLimits, Manifest


@dataclass(frozen=True)
class Exported:
    path: Path
    manifest: Manifest
    limits: ExportLimits

    def within(self, name: str, given: int | None, most: int) -> int:
        """A limit: the export's, or the smaller one that was `given`. Raises ValueError for a larger one."""
        if given is not None and given > most:
            raise ValueError(f"{name} is {given}, but {self.path} was exported for {most}: export it again for more")
        return given or most

    def same(self, name: str, given: object, own: str) -> str:
        """The export's own; raises ValueError where another one is `given`."""
        if given != "auto" and SPELLINGS.get(given, given) != SPELLINGS.get(own, own):
            raise ValueError(
                f"{name} is {given}, but {self.path} was exported with {own}: leave it out, or export again"
            )
        return own

    def validate_checkpoint(self, digest: str) -> None:
        """Raises CheckpointError where the checkpoint in the directory is not of the exported one's kind."""
        if digest != self.manifest.checkpoint:
            raise CheckpointError(f"{self.path}: its weights are others than those that were exported: export it again")

    def trusted_package(self, here: Fingerprint) -> Path:
        """The folder of its own package, which the person trusts. Raises ValueError where it does not fit."""
        misfit = self.manifest.made_with.misfit(here)
        if misfit is None and not self.manifest.is_of(self.path):
            misfit = f"{PACKAGE} is missing, or not the file that {MANIFEST} was written for"
        if misfit is not None:
            raise ValueError(f"{self.path}: the package does not run here: {misfit}; {ELSE}")
        return self.path


ELSE = "compile=True (--compile) compiles it for this machine, compile=False (--no-compile) goes without"
UNTRUSTED = (
    "holds native code that was not compiled by you on this machine; if you know who did, "
    "trust_compiled=True (--trust-compiled) runs it"
)


def open_export(path: str | Path | None) -> Exported | None:
    """The exported model at `path`; None for whatever else there is. Raises CheckpointError for a damaged manifest."""
    folder = None if path is None else Path(path).expanduser()
    if folder is None or not (folder / MANIFEST).is_file():
        return None
    manifest = Manifest.read(folder)
    if manifest.limits is None:
        raise CheckpointError(f"{folder / MANIFEST}: names no limits, as that of an exported model does")
    return Exported(folder, manifest, manifest.limits)
