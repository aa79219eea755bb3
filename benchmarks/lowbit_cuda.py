"""Low-bit matrix products on a GPU side by side with PyTorch's bfloat16 ones, at the shapes of Llama-2-7B.

    python benchmarks/lowbit_cuda.py
    python benchmarks/lowbit_cuda.py --formats sym_int4,nf4 --rows 1,16

One pass is every linear layer of the model once, fused as the engine fuses them; the time is the GPU's own, between
two events, the median of all rounds, and both sides take turns. Each of several copies of a shape's weight is used in
turn, more bytes than the cache holds, so that weights come from memory as they do in a model. Products are launched
by a graph, as in a model's decoding steps. Shares are of the card's own limits, measured in the same turns: a large
copy's bandwidth for up to 16 rows, the rate of a large bfloat16 product beyond.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import cycle

import torch
import torch.nn.functional as F
from common.gpu import gpu_seconds, limits
from common.timing import alternate, median, report

from llama.quantization import FORMATS, LowBitLinear

LAYERS = 32
SHAPES = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]  # (rows, columns): wqkv, wo, w13, w2
CACHE_BYTES = 128 << 20  # more than any card's cache


class Side:
    """The same weights in one format, or in bfloat16: copies of each shape, ready to run."""

    def __init__(self, name: str) -> None:
        self.num_bytes, self.products = 0, []
        for rows, columns in SHAPES:
            if name == "bf16":
                make = self.dense(rows, columns)
                size = 2 * rows * columns
            else:
                make = self.packed(name, rows, columns)
                size = rows * FORMATS[name].packed_columns(columns)
            self.num_bytes += LAYERS * size
            self.products.append((columns, cycle([make() for _ in range(1 + CACHE_BYTES // size)])))

    @staticmethod
    def dense(rows: int, columns: int) -> Callable[[], Callable[[torch.Tensor], torch.Tensor]]:
        def make() -> Callable[[torch.Tensor], torch.Tensor]:
            weight = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
            return lambda x: F.linear(x, weight)

        return make

    @staticmethod
    def packed(name: str, rows: int, columns: int) -> Callable[[], LowBitLinear]:
        size = (rows, FORMATS[name].packed_columns(columns))

        def make() -> LowBitLinear:
            # bytes below 60 keep every scale an ordinary number
            packed = torch.randint(0, 60, size, dtype=torch.uint8, device="cuda")
            return LowBitLinear.from_packed(name, packed).prepare()

        return make

    def run(self, num_rows: int) -> float:
        """Seconds of one pass."""
        total = 0.0
        for columns, products in self.products:
            x = torch.randn(num_rows, columns, dtype=torch.bfloat16, device="cuda")
            total += LAYERS * gpu_seconds(lambda x=x, products=products: next(products)(x))
        return total


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--rows", default="1,16,512")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    names, counts = options.formats.split(","), [int(rows) for rows in options.rows.split(",")]
    unknown = [name for name in names if name not in FORMATS]
    if unknown:
        parser.error(f"unknown formats {', '.join(unknown)}; choose from {', '.join(FORMATS)}")
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU; benchmarks/lowbit.py measures processors")
    dense, card, results = Side("bf16"), limits(), []
    for name in names:
        ours = Side(name)
        for rows in counts:
            sides = {"ours": lambda: ours.run(rows), "bf16": lambda: dense.run(rows), **card}  # noqa: B023
            figures = {side: median(found) for side, found in alternate(options.rounds, **sides).items()}
            operations = 2 * rows * LAYERS * sum(outputs * columns for outputs, columns in SHAPES)
            work, limit = (ours.num_bytes, "bandwidth") if rows <= 16 else (operations, "rate")
            results.append(
                {
                    "format": name,
                    "num_rows": rows,
                    "seconds": figures["ours"],
                    "bf16_seconds": figures["bf16"],
                    "ratio": round(figures["bf16"] / figures["ours"], 3),
                    "share_of_limit": round(work / figures["ours"] / figures[limit], 3),
                }
            )
            print(
                f"{name:9} {rows:4} rows  {1e3 * figures['ours']:8.2f} ms  bf16 {1e3 * figures['bf16']:8.2f} ms  "
                f"{results[-1]['ratio']:.2f}x, {100 * results[-1]['share_of_limit']:.0f} % of {limit}",
                flush=True,
            )
    report({"card": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results})


if __name__ == "__main__":
    main()
