"""From a directory on this machine to a repository on the Hugging Face hub, by the optional package huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from .formats import open_checkpoint
from .hub import INSTALL_HUB, files_of, reason_of

EXPORT_MANIFEST, EXPORT_PACKAGE = "llama_export.json", "step.pt2"  # what an exported model has besides its checkpoint
REFUSALS = {
    401: "the hub does not know your token: give another one in HF_TOKEN, or run hf auth login",
    403: "the hub does not let you write there: give a token that may, in HF_TOKEN",
    409: "it is there already: --overwrite puts these files into it",
}
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def push(
    directory: str | Path,
    repository: str,
    *,
    private: bool = False,
    overwrite: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
) -> str:
    """Puts a checkpoint of any format, or an exported model, into a new repository `org/name`; gives its address.

    Only what a checkpoint is made of is sent, with what says who made it and what may be done with it: all of it in one
    commit, or nothing. With `overwrite` the repository may be there already. `token` is the person's, by default
    what HF_TOKEN or an earlier login gives. Raises FileNotFoundError, ValueError or RuntimeError, in one line.
    """
    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"{repository}: a repository is called org/name")
    folder = Path(directory).expanduser()
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such file or directory; give a checkpoint's")
    files = files_of(open_checkpoint(folder).path)
    if (folder / EXPORT_MANIFEST).is_file():
        files += [folder / name for name in (EXPORT_MANIFEST, EXPORT_PACKAGE) if (folder / name).is_file()]
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise RuntimeError(f"{repository}: there is no hub without huggingface_hub; run: {INSTALL_HUB}") from None
    token = token or huggingface_hub.get_token()
    if token is None:
        raise ValueError(f"{repository}: the hub wants to know who you are: set HF_TOKEN, or run hf auth login")
    hub = huggingface_hub.HfApi(endpoint=endpoint, token=token)
    then = ""
    try:
        hub.create_repo(repository, private=private, exist_ok=overwrite)
        then = "; the repository is there now, and --overwrite tries again"
        additions = [huggingface_hub.CommitOperationAdd(file.name, file) for file in files]
        hub.create_commit(repository, additions, commit_message=f"Upload {folder.resolve().name}")
    except HfHubHTTPError as error:
        why = REFUSALS.get(error.response.status_code, reason_of(error))
        raise RuntimeError(f"{repository}: {why}{then}") from error
    except Exception as error:  # every other way in which a network fails
        raise RuntimeError(f"{repository}: could not be sent to the hub: {reason_of(error)}{then}") from error
    return f"{hub.endpoint}/{repository}"
