"""What a command or a script does around its work: usable streams, errors in one line, an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

from llama.streams import repair, tell


@contextmanager
def running(name: str) -> Iterator[None]:
    """Ends the process with status 1 and one line for whatever else a person can cause, 130 for Ctrl-C."""
    repair()
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            tell("")  # a terminal shows ^C where the output stood
        fail(name, "stopped", 130)
    except (ValueError, OSError, RuntimeError) as error:
        fail(name, str(error), 1)


def fail(name: str, message: str, status: int) -> NoReturn:
    tell(f"{name}: {' '.join(message.split())}")
    sys.exit(status)


def run_script(main: Callable[..., None]) -> None:
    """Calls `main` with the flags of the command line, as fire reads them.

    fire calls a function before it looks for flags that the function does not have: here one that only notes with
    what it was called, so that a misspelt flag is refused before a model loads.
    """
    import fire

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @wraps(main)
    def take(*args: Any, **kwargs: Any) -> None:
        calls.append((args, kwargs))

    with running(Path(sys.argv[0]).name):
        fire.Fire(take)
        for args, kwargs in calls:
            main(*args, **kwargs)
