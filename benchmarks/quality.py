"""What every low-bit format costs in quality, memory and speed: the table in docs/quantization.md.

    python benchmarks/quality.py                                  # prints it
    python benchmarks/quality.py --write docs/quantization.md     # puts it between the marks in that file
    python benchmarks/quality.py --rows unpacked,sym_int4,nf4 --tokens 1024 --rounds 1        # a quick look
    python benchmarks/quality.py --quality-only --llamacpp PYTHON      # no speed; beside llama.cpp on the same files

The model is the embedded default. Each row is measured in a child process of its own, which builds the model, runs one
prompt and one answer, and only then builds the baseline beside it: the same weights unpacked (quantization="none").
PYTHON is one that has llama-cpp-python 0.3.36; without it the column of llama.cpp stays empty.

    bits per weight    of the linears, scales included
    file               the weights that `save_low_bit` writes; of the unpacked model, in bfloat16
    memory             growth of the anonymous resident memory over that after `import llama`: what the process holds
                       in the end, and the most at any moment, loading included; Linux only
    perplexity         of a text that every Python carries, its own manual (`pydoc_data.topics`), in windows of 512
                       tokens that do not overlap, as by `llama perplexity --window 512 --stride 512`
    KL                 KL(baseline || row) in nats, the mean over all positions
    llama.cpp's KL     the same of llama.cpp's predictions from a GGUF file with the row's bytes, over the same tokens:
                       on the CPU, without flash attention; of formats that llama.cpp has
    same top           share of the positions where both find the same token likeliest
    prefill, decode    the baseline's median time over the row's, in turns in one process; the row's tokens a second
    own weights        |W - packed W| / |W| over all linears of the model
    random weights     the same of a normal 1024 x 4096 matrix with a fixed seed

Formats whose blocks do not fill the model's columns have no figures of the model. Run it on a machine that does nothing
else. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from operator import mul
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from common.machine import Memory, machine
from common.packed import is_ggml, write_packed
from common.peers import LLAMACPP, Peer
from common.timing import alternate, median, report
from common.works import Work, run_ours

from llama import Llama
from llama.checkpoint import (
    convert,
    default_model,
    open_checkpoint,
    save_low_bit,
    untied,
)
from llama.checkpoint.inventory import is_linear
from llama.device import choose_dtype
from llama.linear import Linear
from llama.quantization import FORMATS, LowBitLinear
from llama.request import Request
from llama.runner import Pack
from llama.tokenizer import Tokenizer

TOPICS = ("objects", "execmodel", "import", "try", "types", "formatstrings")  # 22,500 tokens of prose
WINDOW = 512
WORKS = {"prefill": Work(1, 512, 1), "decode": Work(1, 512, 17)}
BASELINE = {"quantization": "none"}
ROWS: dict[str, dict[str, str]] = {
    "unpacked": BASELINE,
    "as stored": {},
    **{name: {"quantization": name} for name in FORMATS},
    "int8 cache": BASELINE | {"kv_dtype": "int8"},
}  # what `Llama.build` is told
START, END = "<!-- quality table: benchmarks/quality.py writes it -->", "<!-- end of the quality table -->"
HEADS = (
    *("weights", "bits per weight", "file, MiB", "memory, MiB (peak)", "perplexity", "KL, nats"),
    *("llama.cpp's KL, nats", "same top", "prefill, ratio (tokens/s)", "decode, ratio (tokens/s)"),
    *("own weights", "random weights"),
)


# ---- the text


def read_text(tokenizer: Tokenizer, num_tokens: int) -> list[int]:
    """The first tokens of the topics, one after the other."""
    text = "\n".join(topics[name] for name in TOPICS)
    tokens = tokenizer.encode(text, bos=False, eos=False)
    if len(tokens) < num_tokens:
        raise ValueError(f"the text has {len(tokens)} tokens: ask for no more")
    return tokens[:num_tokens]


def cut(tokens: list[int], bos: list[int], window: int) -> list[list[int]]:
    """Windows that do not overlap, each behind `bos`; one in which nothing is predicted is left out."""
    size = window - len(bos)
    parts = [bos + tokens[start : start + size] for start in range(0, len(tokens), size)]
    return [part for part in parts if len(part) > 1]


# ---- quality

Logits = Callable[[list[int]], torch.Tensor]  # a window's tokens -> (tokens, vocab_size) float32


@dataclass(frozen=True)
class Quality:
    """How a model predicts a text, and how far that is from its baseline's predictions."""

    perplexity: float
    divergence: float  # KL(baseline || model), nats per token
    agreement: float  # share of the positions where both find the same token likeliest


def window_logits(llm: Llama, window: list[int]) -> torch.Tensor:
    """(tokens, vocab_size) float32, by way of the engine's own cache, whatever that stores. The engine is idle."""
    scheduler, runner = llm.engine.scheduler, llm.engine.runner
    request = Request(0, list(window), len(window), reuse_prefix=False)
    scheduler.add(request)
    rows = []
    while request.num_pending_tokens:
        step = scheduler.schedule()
        counts = [part.count for part in step.slices]
        rows.append(runner.run(Pack.of(step, counts, scheduler.block_size)).logits)
        scheduler.advance(step)
    scheduler.finish(request)
    return torch.cat(rows)


def compare(model: Logits, baseline: Logits, windows: Sequence[list[int]]) -> Quality:
    """Over every position of the windows that has a token behind it."""
    cost, divergence, same, count = 0.0, 0.0, 0, 0
    for window in windows:
        ours, theirs = (logits(window)[:-1].log_softmax(-1) for logits in (model, baseline))
        cost += F.nll_loss(ours, torch.tensor(window[1:]), reduction="sum").item()
        divergence += F.kl_div(ours, theirs, log_target=True, reduction="sum").item()
        same += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
        count += len(ours)
    return Quality(torch.tensor(cost / count).exp().item(), divergence / count, same / count)


@contextmanager
def peer_logits(peer: Peer, path: Path) -> Iterator[Logits]:
    """llama.cpp's of a GGUF file, as long as the context lasts; each window's cross the disk."""
    with closing(peer), tempfile.TemporaryDirectory() as folder:
        vocab_size = peer.ask(do="load", path=str(path), threads=torch.get_num_threads())["vocab_size"]
        target = Path(folder) / "logits"

        def logits(window: list[int]) -> torch.Tensor:
            peer.ask(do="logits", tokens=window, to=str(target))
            return torch.frombuffer(bytearray(target.read_bytes()), dtype=torch.float32).view(-1, vocab_size)

        yield logits


def llamacpp_quality(python: str, row: str, baseline: Logits, windows: Sequence[list[int]]) -> Quality | None:
    """llama.cpp's on the row's bytes; None where it has no such type."""
    if row != "as stored" and not (row in FORMATS and is_ggml(row)):
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = default_model()
        if row in FORMATS:
            path = Path(folder) / f"{row}.gguf"
            write_packed(default_model(), path, row)
        with peer_logits(Peer(python, LLAMACPP), path) as logits:
            return compare(logits, baseline, windows)


def packing_error(format: str, weights: Iterable[torch.Tensor]) -> float:
    """Root of the mean square error of float32 matrices in that format, relative to that of the numbers themselves."""
    form, wrong, whole = FORMATS[format], 0.0, 0.0
    for weight in weights:
        wrong += (form.dequantize(form.quantize(weight)) - weight).square().sum().item()
        whole += weight.square().sum().item()
    return (wrong / whole) ** 0.5


def random_weights() -> Iterator[torch.Tensor]:
    yield torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0))


def own_weights() -> Iterator[torch.Tensor]:
    """The matrices of the default model that are packed where a format is asked for."""
    for weight in untied(open_checkpoint(default_model())).weights():
        if is_linear(weight.name):
            yield weight.read().float()


# ---- memory, speed


@dataclass(frozen=True)
class Speed:
    tokens_per_second: float
    ratio: float  # of the baseline's time to this


def race(llm: Llama, baseline: Llama, name: str, rounds: int) -> Speed:
    """A prompt of 512 tokens ("prefill"), or one token of an answer behind it ("decode"), in turns."""
    work = WORKS[name]
    sides: dict[str, Callable[[], float]] = {
        side: partial(run_ours, model, work) for side, model in (("ours", llm), ("baseline", baseline))
    }
    times = {side: median(found) for side, found in alternate(rounds, **sides).items()}
    num_tokens = work.prompt_tokens if name == "prefill" else 1
    return Speed(num_tokens / times["ours"], times["baseline"] / times["ours"])


# ---- a row, in its own process


@dataclass(frozen=True)
class Figures:
    """What was measured of one row's model."""

    bits_per_weight: float
    held: int  # bytes
    peak: int
    quality: Quality
    llamacpp: Quality | None = None
    prefill: Speed | None = None
    decode: Speed | None = None

    @classmethod
    def from_json(cls, fields: dict) -> Figures:
        kinds = {"quality": Quality, "llamacpp": Quality, "prefill": Speed, "decode": Speed}
        return cls(**fields | {name: kind(**fields[name]) for name, kind in kinds.items() if fields[name]})


def build(options: dict[str, str], dtype: str) -> Llama:
    return Llama.build(max_seq_len=1024, max_batch_size=1, device="cpu", dtype=dtype, **options)


def bits_per_weight(llm: Llama) -> float:
    """The mean over all weights of the linears."""
    dense = 8 * llm.model.norm.weight.element_size()
    linears = [module for module in llm.model.modules() if isinstance(module, LowBitLinear | Linear)]
    sizes = [linear.in_features * linear.out_features for linear in linears]
    bits = [x.format.bits_per_weight if isinstance(x, LowBitLinear) else dense for x in linears]
    return sum(map(mul, bits, sizes)) / sum(sizes)


def measure(row: str, dtype: str, num_tokens: int, rounds: int, llamacpp: str | None) -> Figures:
    """No speed without `rounds`, and nothing of llama.cpp without a Python that has it."""
    with Memory() as memory:
        llm = build(ROWS[row], dtype)
        run_ours(llm, WORKS["decode"])
    baseline = build(BASELINE, dtype)
    bos = [llm.tokenizer.bos_id] if llm.tokenizer.add_bos else []
    windows = cut(read_text(llm.tokenizer, num_tokens), bos, WINDOW)
    truth = partial(window_logits, baseline)
    return Figures(
        bits_per_weight(llm),
        memory.held,
        memory.peak,
        compare(partial(window_logits, llm), truth, windows),
        llamacpp_quality(llamacpp, row, truth, windows) if llamacpp else None,
        *(race(llm, baseline, name, rounds) for name in WORKS if rounds),
    )


def serve() -> None:
    """The child: one request as a line of JSON, one answer."""
    request = json.loads(sys.stdin.readline())
    with redirect_stdout(sys.stderr):
        figures = measure(**request)
    print(json.dumps(asdict(figures)))


# ---- the table


def fits(row: str) -> bool:
    """Whether whole blocks fill the model's columns."""
    args, form = open_checkpoint(default_model()).args, FORMATS.get(row)
    return form is None or not (args.dim % form.block or args.hidden_dim % form.block)


def file_bytes(row: str) -> int:
    """What the weights take on disk."""
    if row == "as stored":
        return default_model().stat().st_size
    with tempfile.TemporaryDirectory() as name:
        if row in FORMATS:
            save_low_bit(open_checkpoint(default_model()), Path(name) / row, row)
        else:
            convert(default_model(), Path(name) / row, to="hf", dtype="bf16")
        return sum(file.stat().st_size for file in Path(name).glob("*/*.safetensors"))


@dataclass(frozen=True)
class Line:
    """One line of the table; None for what there is not."""

    row: str
    figures: Figures | None = None
    file_bytes: int | None = None
    own_error: float | None = None
    random_error: float | None = None

    def cells(self) -> list[str]:
        row, figures = self.row, self.figures
        bits = FORMATS[row].bits_per_weight if row in FORMATS else figures.bits_per_weight
        model = ["–"] * 7
        if figures:
            quality = figures.quality
            model = [
                f"{figures.held / 2**20:.0f} ({figures.peak / 2**20:.0f})",
                f"{quality.perplexity:.3f}",
                f"{quality.divergence:.4f}",
                f"{figures.llamacpp.divergence:.4f}" if figures.llamacpp else "–",
                f"{quality.agreement:.1%}",
                *(
                    f"{s.ratio:.2f} ({s.tokens_per_second:.0f})" if s else "–"
                    for s in (figures.prefill, figures.decode)
                ),
            ]
        size = "–" if self.file_bytes is None else f"{self.file_bytes / 2**20:.1f}"
        errors = ("–" if error is None else f"{error:.4f}" for error in (self.own_error, self.random_error))
        return [row, f"{bits:.4g}", size, *model, *errors]


def make_line(row: str, **request: object) -> Line:
    """`request`: what `measure` is told."""
    random_error = packing_error(row, random_weights()) if row in FORMATS else None
    if not fits(row):
        return Line(row, random_error=random_error)
    child = Peer(sys.executable, __file__, "--child")
    figures = Figures.from_json(child.ask(row=row, **request))
    child.close()
    return Line(
        row,
        figures,
        file_bytes(row) if "kv_dtype" not in ROWS[row] else None,
        packing_error(row, own_weights()) if row in FORMATS else None,
        random_error,
    )


def to_markdown(lines: Iterable[Line]) -> str:
    """The heads, and below them the lines, numbers to the right."""
    rule = ["---", *["---:"] * (len(HEADS) - 1)]
    rows = (HEADS, rule, *(line.cells() for line in lines))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def caption(limits: dict[str, object], dtype: str, tokens: list[int], text: str) -> str:
    names = ", ".join(f"`{name}`" for name in TOPICS)
    return (
        f"{limits['processor']}, {limits['threads']} threads, {limits['read_GB_per_s']} GB/s read, "
        f"torch {limits['torch']}; the unpacked model and all activations in {dtype}. Text: the first {len(tokens)} "
        f"tokens of the topics {names} in `pydoc_data.topics` of Python {platform.python_version()}, "
        f"sha256 `{sha256(text.encode()).hexdigest()}`."
    )


def between_marks(document: str, table: str) -> str:
    """The document with the table in place of what stood between the marks. Raises ValueError without marks."""
    before, start, rest = document.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"no place for the table: the file needs the lines {START} and {END}")
    return f"{before}{START}\n\n{table}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the marks in FILE")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--tokens", type=int, default=5120, help="of the text, which has 22,500")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quality-only", action="store_const", const=0, dest="rounds", help="leave out speed")
    parser.add_argument("--llamacpp", metavar="PYTHON", help="one that has llama-cpp-python")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return serve()
    if options.write:
        between_marks(options.write.read_text(encoding="utf-8"), "")  # fails now rather than at the end
    tokenizer = Tokenizer(str(default_model()))
    tokens = read_text(tokenizer, options.tokens)
    limits, lines = machine(), []
    request = {"dtype": options.dtype, "num_tokens": options.tokens, "rounds": options.rounds}
    for row in options.rows.split(","):
        lines.append(make_line(row, **request, llamacpp=options.llamacpp))
        print(*lines[-1].cells(), sep=" | ", file=sys.stderr, flush=True)
    dtype = choose_dtype(options.dtype, open_checkpoint(default_model()).dtype, torch.device("cpu"))
    table = to_markdown(lines) + "\n\n" + caption(limits, str(dtype), tokens, tokenizer.decode(tokens))
    if options.write:
        document = between_marks(options.write.read_text(encoding="utf-8"), table)
        options.write.write_text(document, encoding="utf-8")
    else:
        print(table)
    report({"machine": limits, "tokens": len(tokens), "rows": [asdict(line) for line in lines]})


if __name__ == "__main__":
    main()
