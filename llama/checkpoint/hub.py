"""Models on the Hugging Face hub, by way of the optional package huggingface_hub: which files one is made of.

A name is `org/name`; `org/name:Q4_K_M`, one of several GGUF files or folders told by a part of its name; or
`org/name/path/to/file.gguf`.
"""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Sequence
from pathlib import Path

from ..files.errors import CheckpointError

_NAME = re.compile(
    r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"  # the repository
    r"(?::([\w.-]+)|/((?:[\w-][\w.-]*/)*[\w-][\w.-]*\.gguf))?"  # a choice in it, or a file
)
_SPLIT = re.compile(r"(.*)-\d{5}-of-\d{5}\.gguf")
INSTALL_HUB = "pip install huggingface_hub"
TIMEOUT = 10.0  # seconds until the hub counts as out of reach
SETTINGS = re.compile(r"(?!.*index\.json|llama_export\.json).*\.json|.*\.jinja|tokenizer\.model")
ABOUT = re.compile(r"(README|LICEN[CS]E|NOTICE|USE_POLICY)[\w.-]*", re.IGNORECASE)  # goes with copies
WEIGHTS = (  # of these kinds, the first that is there is read, as in a directory
    r"model\.safetensors",
    r"model-\d+-of-\d+\.safetensors",
    r"(?!consolidated|adapter).*\.safetensors",
    r"pytorch_model\.bin",
    r"pytorch_model-\d+-of-\d+\.bin",
    r"consolidated\.\d+\.pth",
    r"consolidated\.safetensors",
)
KNOWN = "safetensors, pytorch_model.bin, consolidated.NN.pth, .gguf"
ADAPTERS = (r"adapter_model\.safetensors", r"adapter_model\.bin")  # in the place of WEIGHTS


def resolve(
    name_or_path: str | Path,
    *,
    kinds: Sequence[str] = WEIGHTS,
    endpoint: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """A path on this machine: the one given if it exists, else a download from the hub.

    Only what will be read is fetched (weights in one format, settings and tokenizer; of GGUF files one), into
    huggingface_hub's cache (`cache_dir`); what is there already is used when the hub cannot be reached. `kinds`:
    patterns of the weights, a model's or ADAPTERS. `endpoint` is the hub's address. Raises FileNotFoundError in one
    line for what neither this machine nor the hub has, or where the package is missing; CheckpointError where the name
    fits several GGUF files.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    name = str(name_or_path)
    parts = _NAME.fullmatch(name)
    if not parts:
        raise FileNotFoundError(
            f"{name}: no such file or directory; give a checkpoint's directory, a .gguf file or org/name of the hub"
        )
    repository, choice, file = parts.groups()
    try:
        import huggingface_hub
    except ImportError:
        raise FileNotFoundError(
            f"{name}: no such directory here, and without huggingface_hub no hub to ask; run: {INSTALL_HUB}"
        ) from None
    try:
        info = huggingface_hub.HfApi(endpoint=endpoint).model_info(repository, timeout=TIMEOUT)
    except Exception as error:  # every way in which a network and a server fail
        folder = _cached(repository, name, cache_dir, error)
        there = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        return folder / select(name, there, choice, file, kinds)[0]
    model, files = select(name, [file.rfilename for file in info.siblings or ()], choice, file, kinds)
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            allow_patterns=[glob.escape(file) for file in files],
            ignore_patterns="*.py",  # no code, whatever it is called
            endpoint=endpoint,
            cache_dir=cache_dir,
        )
    except Exception as error:
        raise FileNotFoundError(f"{name}: the hub's files could not be fetched: {reason_of(error)}") from error
    return Path(folder) / model


def select(
    name: str, files: list[str], choice: str | None, file: str | None, kinds: Sequence[str]
) -> tuple[str, list[str]]:
    """Of a repository's files the one, or the folder, that is the model, and all that it needs.

    Raises CheckpointError where there is none, or not one alone.
    """
    if file is not None:
        return _gguf(name, [one for one in files if one == file], files)
    folder = f"{choice}/" if choice and any(one.startswith(f"{choice}/") for one in files) else ""
    inside = [one.removeprefix(folder) for one in files if one.startswith(folder)]
    inside = [one for one in inside if "/" not in one]
    if folder or choice is None:
        for kind in kinds:
            weights = [one for one in inside if re.fullmatch(kind, one)]
            if weights:
                indexes = [one for one in inside if one.endswith("index.json") and one[:5] == weights[0][:5]]
                settings = [one for one in inside if SETTINGS.fullmatch(one)]
                return folder, [folder + one for one in (*weights, *indexes, *settings)]
    fitting = [one for one in files if one.endswith(".gguf") and (choice is None or _is_called(one, choice))]
    return _gguf(name, fitting, files)


def files_of(path: Path) -> list[Path]:
    """The files that a checkpoint on this machine is made of: a directory's, or a GGUF file with its other parts.

    Those that nothing here reads stay out, but for what says who made it and what may be done with it.
    """
    folder = path if path.is_dir() else path.parent
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    _, wanted = select(str(path), names, None, None if path.is_dir() else path.name, WEIGHTS)
    about = [name for name in names if path.is_dir() and ABOUT.fullmatch(name)]
    return [folder / name for name in dict.fromkeys((*wanted, *about))]


def _is_called(file: str, choice: str) -> bool:
    """Whether `choice` is a whole part of a GGUF file's name, or of its folders'."""
    return bool(re.search(rf"(^|[-._/]){re.escape(choice)}([-./]|$)", file, re.IGNORECASE))


def _gguf(name: str, fitting: list[str], files: list[str]) -> tuple[str, list[str]]:
    """The one GGUF file of those that fit, with all the files that it is split into."""

    def whole(file: str) -> str:
        match = _SPLIT.fullmatch(file)
        return match[1] if match else file

    models = sorted({whole(one) for one in fitting})
    if len(models) == 1:
        parts = sorted(one for one in files if one.endswith(".gguf") and whole(one) == models[0])
        return parts[0], parts
    found = models or sorted({whole(one) for one in files if one.endswith(".gguf")})
    if not found:
        raise CheckpointError(f"{name}: the hub has it, but with no weights in a known format ({KNOWN})")
    listed = ", ".join(one.removesuffix(".gguf") for one in found)
    problem = f"{len(found)} GGUF files fit" if models else f"no such file there, but {len(found)} GGUF files"
    raise CheckpointError(f"{name}: {problem}; name one, as org/name:Q4_K_M or org/name/file.gguf: {listed}")


def _cached(repository: str, name: str, cache_dir: str | Path | None, error: Exception) -> Path:
    """The folder of an earlier download; it holds what was asked for then."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    with contextlib.suppress(CacheNotFound):
        for repo in scan_cache_dir(cache_dir).repos:
            if repo.repo_id == repository and repo.repo_type == "model":
                newest = max(repo.revisions, key=lambda one: ("main" in one.refs, one.last_modified))
                return Path(newest.snapshot_path)
    raise FileNotFoundError(
        f"{name}: no such directory here, and the hub does not give it: {reason_of(error)}"
    ) from error


def reason_of(error: Exception) -> str:
    """What a library said, cut to a line of ours."""
    return " ".join(str(error).split())[:200] or type(error).__name__
