"""What the commands about files show a person."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from llama.files.json import json_bytes
from llama.progress import bytes_text
from llama.streams import printable

if TYPE_CHECKING:
    from llama.answer import EngineStats
    from llama.batch import BatchJob, Counts
    from llama.bench.run import Bench, Figure, Limits, Start
    from llama.checkpoint import Adapter, Estimate, Finding, Inspection, Stored
    from llama.generation import Llama


def show_inspection(found: Inspection) -> None:
    args = found.args
    facts = {
        "path": found.path,
        "format": found.format,
        "parameters": f"{found.parameters / 1e9:.2f} B" if found.parameters >= 1e8 else f"{found.parameters:,}",
        "size": bytes_text(found.nbytes),
        "shape": f"dim {args.dim}, {args.n_layers} layers, hidden {args.hidden_dim}, vocabulary {args.vocab_size}",
        "heads": f"{args.n_heads} heads of {args.head_dim}, {args.n_kv_heads} key/value heads",
        "rope": f"theta {args.rope_theta:g}"
        + (f", {args.rope_scaling.kind} x {args.rope_scaling.factor:g}" if args.rope_scaling else ""),
        "context": f"{found.context} tokens",
        "tokenizer": found.tokenizer or "none found",
        "chat format": found.chat_format or "none",
    }
    for name, stored in found.types.items():
        facts[f"stored {name}"] = (
            f"{stored.tensors} tensors, {stored.parameters:,} values, {bytes_text(stored.nbytes)}" + kept_text(stored)
        )
    if found.unknown_keys:
        facts["unknown keys"] = ", ".join(found.unknown_keys)
    if found.warnings:
        facts["warnings"] = "; ".join(found.warnings)
    show_facts(facts)


def show_adapter(adapter: Adapter) -> None:
    modules = sorted({name.rpartition(".")[2] for name in adapter.low_rank})
    facts = {
        "path": adapter.path,
        "format": f"{adapter.format}, an adapter (LoRA)",
        "base model": adapter.base or "not said",
        "modules": f"{len(adapter.low_rank)}: {', '.join(modules)}",
        "ranks": ", ".join(map(str, adapter.ranks)) or "none",
        "parameters": f"{adapter.parameters:,}",
    }
    if any(one.magnitude is not None for one in adapter.low_rank.values()):
        facts["magnitudes"] = "yes (DoRA)"
    if adapter.whole:
        facts["whole weights"] = ", ".join(f"{name} {list(one.shape)}" for name, one in adapter.whole.items())
    if adapter.tokenizer_path is not None:
        facts["tokenizer"] = adapter.tokenizer_path.name
    if adapter.unknown_keys:
        facts["unknown keys"] = ", ".join(adapter.unknown_keys)
    show_facts(facts)


def show_facts(facts: dict[str, object]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        print(printable(f"{name:{width}}  {value}"))


def kept_text(stored: Stored) -> str:
    """What becomes of low-bit blocks when they are loaded."""
    if stored.packed is None:
        return ""
    counts = {"kept packed": stored.packed, "dequantized": stored.tensors - stored.packed}
    found = {what: count for what, count in counts.items() if count}
    return ", " + ", ".join(what if len(found) == 1 else f"{count} {what}" for what, count in found.items())


def show_estimates(estimates: Iterable[Estimate]) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("precision", "weights", "keys and values", "together", "fits"):
        table.add_column(title, justify="left" if title == "precision" else "right")
    free = 0
    for estimate in estimates:
        free = estimate.free_bytes
        sizes = (estimate.weight_bytes, estimate.kv_bytes, estimate.total_bytes)
        table.add_row(estimate.precision, *map(bytes_text, sizes), "yes" if estimate.fits else "no")
    console = Console(soft_wrap=True, highlight=False)
    console.print()
    console.print(table)
    console.print(f"per rank; {bytes_text(free)} are free on this machine")


def show_findings(findings: Iterable[Finding]) -> bool:
    """One line a finding; whether all are good."""
    good = True
    for finding in findings:
        good = good and finding.ok
        line = f"{'ok ' if finding.ok else 'BAD'}  {finding.subject}: {finding.message}"
        print(printable(line), flush=True)
    return good


def show_perplexity(llm: Llama, text: str, window: int | None, stride: int | None) -> None:
    from llama.perplexity import perplexity

    console = Console(stderr=True)
    columns = (TextColumn("Predicting"), MofNCompleteColumn(), TextColumn("tokens"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("")
        found = perplexity(
            llm, text, window, stride, lambda done, total: progress.update(task, completed=done, total=total)
        )
    if llm.rank == 0:
        print(f"tokens {found.num_tokens}")
        print(f"perplexity {found.perplexity:.4f}")
        print(f"tokens per second {found.tokens_per_second:.1f}")


def guesses_text(stats: EngineStats) -> str:
    """What came of guesses, to be added to a line; "" where there were none."""
    if not stats.num_draft_tokens:
        return ""
    return f", {stats.num_accepted_tokens} of {stats.num_draft_tokens} guesses right"


def run_batch(batch: BatchJob, llm: Llama | None = None) -> Counts:
    """Runs it under a line that counts, and sums up, with what is known of the model's guesses."""
    console = Console(stderr=True)
    started = time.perf_counter()
    is_first = llm is None or llm.rank == 0

    def summary(counts: Counts) -> str:
        rate = counts.tokens / (time.perf_counter() - started)
        skipped = f", {counts.skipped} answered before" if counts.skipped else ""
        guessed = guesses_text(llm.engine.stats()) if llm else ""
        return f"{counts.answered} answered, {counts.failed} failed{skipped}; {rate:.1f} tokens per second{guessed}"

    show = console.is_terminal and is_first
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not show) as progress:
        task = progress.add_task("")
        counts = batch.run(lambda counts: progress.update(task, description=summary(counts)))
    if is_first:
        console.print(summary(counts), highlight=False)
    return counts


def show_bench(found: Iterable[Bench | Limits | Figure | Start], json: Path | None, plot: Path | None) -> None:
    """Prints what is measured as it comes; writes all of it at the end, if a file was named."""
    from llama.bench.plot import plot_figures, validate_plot
    from llama.bench.run import Bench, Figure, Limits, Start

    if plot is not None:
        validate_plot(plot)
    for path in filter(None, (json, plot)):
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    shown: dict[type, list[Any]] = {Bench: [], Limits: [], Figure: [], Start: []}
    for one in found:
        shown[type(one)].append(one)
        if isinstance(one, Limits):
            show_facts({name: value for name, value in asdict(one).items() if value is not None})
        elif isinstance(one, Figure | Start):
            print(printable(figure_text(one) if isinstance(one, Figure) else start_text(one)), flush=True)
    [bench], [limits] = shown[Bench], shown[Limits]
    if json is not None:
        figures, starts = ([asdict(one) for one in shown[kind]] for kind in (Figure, Start))
        content = {"model": bench.title, "limits": asdict(limits), "figures": figures, "starts": starts}
        json.write_bytes(json_bytes(content))
    if plot is not None:
        plot_figures(plot, f"{bench.title} on {limits.processor}, {limits.threads} threads", shown[Figure])


def figure_text(figure: Figure) -> str:
    low, high = figure.spread
    beside = f"{figure.share_of_limit:.0%} of {figure.limit}" if figure.ratio is None else f"{figure.ratio:.2f}x"
    setting = f" ({figure.setting})" if figure.setting else ""
    return (
        f"{figure.precision:9} {figure.work:12} {figure.side:12} {1e3 * figure.seconds:9.2f} ms "
        f"{figure.tokens_per_s:8.1f} tokens/s ({low:.1f} to {high:.1f})  {beside}{setting}"
    )


def start_text(start: Start) -> str:
    peak = "" if start.peak_bytes is None else f", {bytes_text(start.peak_bytes)} at most"
    return (
        f"{start.precision:9} start        {start.side:12} {start.first_token_seconds:6.2f} s to the first token: "
        f"{start.import_seconds:.2f} s imports, {start.load_seconds:.2f} s loading{peak}"
    )
