"""A progress bar where a person is looking."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(title: str, show: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal's standard error; nothing in a pipe. Yields progress(bytes done, bytes in all)."""
    if not (show and os.isatty(2)):
        yield None
        return
    from rich.console import Console  # a third of this package's imports, for a person who is looking
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn(title), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def bytes_text(num_bytes: int) -> str:
    """1536 -> "1.5 KiB" """
    size, units = float(num_bytes), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "bytes" else f"{size:.1f} {units[0]}"
