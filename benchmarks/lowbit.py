"""Low-bit matrix products side by side with llama.cpp's: all linear layers of a model, once through.

    python benchmarks/lowbit.py --peer-python /path/to/venv-with-llama-cpp-python/bin/python

Both sides hold random weights of the same shapes in the same number of bits (nf4 and the 4-bit formats against Q4_0
or Q4_1, and so on), fused as each engine fuses them, and take turns in one run. Rows are the activation rows of a step:
1 is decoding one stream, 32 a batch, 512 a prompt. Shares are of the machine's own limits, measured in the same turns:
packed bytes over read bandwidth for one row, operations over the rate of an unpacked product for many (bfloat16
where the processor computes in it, else float32, as the engine chooses). The bandwidth is
that of torch.sum over a large buffer, which prefetches less than the kernels do: a share can exceed 100 %. Two threads
need two idle cores; where others compute, only --threads 1 gives ratios that mean something.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from common.machine import DTYPE, machine, matrix_rate, read_bandwidth
from common.peers import GGML, TWINS, Peer
from common.shapes import SMOLLM2, TINYLLAMA, fused_linears, separate_linears
from common.timing import alternate, median, report, seconds

from llama.kernels import lowbit
from llama.linear import Linear
from llama.model import ModelArgs
from llama.quantization import FORMATS, LowBitLinear

SHAPES = {"tinyllama-1.1b": TINYLLAMA, "smollm2-135m": SMOLLM2}


class Ours:
    """Random packed weights of every fused shape, ready to run."""

    def __init__(self, name: str, shape: ModelArgs, variant: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.linears = []
        for rows, columns in fused_linears(shape):
            # not random bytes: a float32 scale among them may be too small to multiply at full speed
            linear = LowBitLinear.from_weight(name, torch.randn(rows, columns, generator=generator)).prepare()
            linear.variant = variant
            self.linears.append(linear)
        self.num_bytes = sum(linear.weight.numel() for linear in self.linears)

    def run(self, num_rows: int, dtype: torch.dtype) -> float:
        widths = {linear.in_features for linear in self.linears}
        inputs = {width: torch.randn(num_rows, width, dtype=dtype) for width in widths}
        return seconds(lambda: [linear(inputs[linear.in_features]) for linear in self.linears])


class Unpacked:
    """Our own unpacked linears at the same shapes; one layer, counted per layer."""

    def __init__(self, shape: ModelArgs) -> None:
        self.counts = Counter(fused_linears(shape))
        self.linears = {size: self.linear(*size) for size in self.counts}

    @staticmethod
    def linear(rows: int, columns: int) -> Linear:
        linear = Linear(columns, rows).to(DTYPE)
        linear.prepare()
        return linear

    def run(self, num_rows: int) -> float:
        inputs = {columns: torch.randn(num_rows, columns, dtype=DTYPE) for _, columns in self.counts}
        return sum(count * seconds(partial(self.linears[size], inputs[size[1]])) for size, count in self.counts.items())


@dataclass(frozen=True)
class Result:
    """One comparison. Seconds are medians of one pass; ratios are of medians, above 1 where ours is faster."""

    model: str
    format: str
    peer: str
    peer_layouts: list[str]
    num_rows: int
    seconds: float
    peer_seconds: float
    ratio: float
    share_of_limit: float
    ratio_to_unpacked: float | None


def compare(model: str, name: str, num_rows: int, ours: Ours, peer: Peer, layouts: list[str], rounds: int) -> Result:
    """Ours, the peer and the machine's limit in turns; for prompts also our own unpacked weights."""
    weights = sum(linear.in_features * linear.out_features for linear in ours.linears)
    passes = max(1, min(20, 50_000_000_000 // (ours.num_bytes * num_rows * 40)))
    sides: dict[str, Callable[[], float]] = {
        "ours": lambda: median([ours.run(num_rows, DTYPE) for _ in range(passes)]),
        "peer": lambda: median([peer.ask(run=num_rows)["seconds"] for _ in range(passes)]),
    }
    if num_rows == 1:
        buffer, work = torch.ones(1 << 27), ours.num_bytes
        sides["limit"] = lambda: read_bandwidth(buffer, repetitions=1)
    else:
        work = 2 * weights * num_rows
        sides["limit"] = lambda: matrix_rate(DTYPE, repetitions=1)
    if num_rows >= 512:
        unpacked = Unpacked(SHAPES[model])
        sides["unpacked"] = lambda: unpacked.run(num_rows)
    figures = {side: median(found) for side, found in alternate(rounds, **sides).items()}
    return Result(
        model=model,
        format=name,
        peer=TWINS[name],
        peer_layouts=layouts,
        num_rows=num_rows,
        seconds=figures["ours"],
        peer_seconds=figures["peer"],
        ratio=round(figures["peer"] / figures["ours"], 3),
        share_of_limit=round(work / figures["ours"] / figures["limit"], 3),
        ratio_to_unpacked=(round(figures["unpacked"] / figures["ours"], 3) if "unpacked" in figures else None),
    )


def show(result: Result) -> None:
    limit = "read bandwidth" if result.num_rows == 1 else "matrix rate"
    unpacked = f", {result.ratio_to_unpacked:.2f}x our unpacked" if result.ratio_to_unpacked else ""
    print(
        f"{result.model} {result.format:9} {result.num_rows:4} rows  {1e3 * result.seconds:8.2f} ms  "
        f"{result.peer} {1e3 * result.peer_seconds:8.2f} ms ({', '.join(result.peer_layouts)})  "
        f"{result.ratio:.2f}x, {100 * result.share_of_limit:.0f} % of {limit}{unpacked}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--rows", default="1,32,512")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--variant", default="auto", help=f"auto, or one of {', '.join(lowbit.variants())}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    limits = machine()
    print(limits, flush=True)
    results = []
    peer = Peer(options.peer_python, GGML, options.threads)
    for model in options.models.split(","):
        shape = SHAPES[model]
        for name in options.formats.split(","):
            if any(columns % FORMATS[name].block for _, columns in fused_linears(shape)):
                print(f"{model} {name}: its columns are not whole blocks", file=sys.stderr)
                continue
            ours = Ours(name, shape, options.variant)
            layouts = peer.ask(make={"type": TWINS[name], "shapes": separate_linears(shape)})["layouts"]
            for num_rows in map(int, options.rows.split(",")):
                results.append(compare(model, name, num_rows, ours, peer, layouts, options.rounds))
                show(results[-1])
    peer.close()
    report({"machine": limits, "results": [asdict(result) for result in results]})


if __name__ == "__main__":
    main()
