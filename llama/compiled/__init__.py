"""A model's step compiled ahead of time: one graph, from tokens to logits, without Python between its operators.

`graph`: the step as torch.export reads it. `compiler`: the graph as a package, native code for this machine's
processor. `fingerprint`: what a package depends on, and the manifest beside it. `cache`: the person's own packages.
`program`: a package that runs, sharing the loaded model's weights. `captured`: a GPU's steps, recorded as graphs.
`selection`: which program a model gets.
"""

from __future__ import annotations

from .exported import Exported, open_export
from .manifest import MANIFEST, PACKAGE, ExportLimits, Manifest
from .selection import choose_program

__all__ = ["MANIFEST", "PACKAGE", "ExportLimits", "Exported", "Manifest", "choose_program", "open_export"]
