"""Tokens per second against context and against batch, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .contest import Figure
from .works import WORKS

PANELS = {"context": "tokens of context", "batch": "requests at once"}  # the beginning of works' names
SUFFIXES = (".png", ".svg")


def validate_plot(path: Path) -> None:
    """Raises before anything is measured: ValueError for another kind of file, RuntimeError without matplotlib."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: a plot is a {' or '.join(SUFFIXES)} file")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeError("matplotlib is missing: pip install 'llama-native[bench]'") from error


def plot_figures(path: Path, title: str, figures: Sequence[Figure]) -> None:
    """Writes `path`, a panel for contexts and one for batches, a line for each side and precision."""
    from matplotlib.figure import Figure as Canvas  # not pyplot, which keeps what it draws and looks for a screen

    canvas = Canvas(figsize=(10, 4.5), layout="constrained")
    canvas.suptitle(title)
    lines = sorted({(one.precision, one.side) for one in figures})
    for axes, (kind, label) in zip(canvas.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for precision, side in lines:
            drawn = [
                (int(one.work.split("-")[1]), one.tokens_per_s)
                for one in figures
                if (one.precision, one.side) == (precision, side) and one.work.startswith(kind)
            ]
            if drawn:
                axes.plot(*zip(*sorted(drawn), strict=True), marker="o", label=f"{side}, {precision}")
        axes.set(xlabel=label, ylabel="tokens per second", ylim=(0, None))
        if kind == "batch":
            axes.set_xscale("log", base=2)
            axes.set_xticks([work.num_prompts for name, work in WORKS.items() if name.startswith(kind)])
            axes.xaxis.set_major_formatter("{x:.0f}")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    canvas.savefig(path, dpi=144)
