"""What an answer must cost, on machines that are not here: from the bytes that a step reads and the operations it does.

    python benchmarks/planning.py [speed.json]

A step of decoding reads every weight once, and the keys and values of every request; it multiplies every weight by
every request's row. Its time is at least the larger of the two, each over what the machine does at best, and
`--efficiency` is the share of that limit that is reached (0.6 of read bandwidth, 0.5 of the matrix rate unless told
otherwise). On several GPUs each holds a part; a step then also waits for two all-reduces a layer. Prices are examples,
for each machine's hour: give your own in `MACHINES`. Prints tables in Markdown; with a file that `llama bench --json`
wrote, also what this model of things predicts for the machine it was measured on, beside what was measured.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from llama.bench.shapes import MODEL_SHAPES
from llama.checkpoint import expected_shapes
from llama.model import ModelArgs

CONTEXT = 1024  # tokens that a request has behind it, in the midst of its answer
ALL_REDUCE = 20e-6  # seconds, of a few rows between GPUs of one node
BYTES = {"bf16": 2.0, "sym_int8": 8.25 / 8, "sym_int4": 4.25 / 8}  # a weight; keys and values stay 16 bits


@dataclass(frozen=True)
class Machine:
    name: str
    gigabytes_per_s: float  # read, of all its parts together
    teraflops: float  # of 16-bit products
    memory_GB: float
    parts: int  # GPUs, or 1
    price: float  # of an hour, in dollars: an example


MACHINES = (
    Machine("2-core CPU node, AVX2", 20, 0.12, 16, 1, 0.08),
    Machine("32-core CPU node, AMX", 250, 25, 256, 1, 1.60),
    Machine("1 x L40S", 864, 362, 48, 1, 1.20),
    Machine("1 x H100", 3350, 990, 80, 1, 3.00),
    Machine("8 x H100", 8 * 3350, 8 * 990, 640, 8, 24.00),
)
MODELS = {
    "7B": MODEL_SHAPES["7b"],
    "70B": ModelArgs(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, hidden_dim=28672, vocab_size=32000),
}
BATCHES = (1, 8, 32, 128)


@dataclass(frozen=True)
class Load:
    """What a model asks of a machine."""

    weights: int  # numbers of all matrices that a step multiplies with
    layers: int
    kv_bytes: int  # of a token

    @classmethod
    def of(cls, args: ModelArgs) -> Load:
        shapes = [shape for name, shape in expected_shapes(args) if len(shape) == 2 and "tok_embeddings" not in name]
        kv = 2 * args.n_layers * args.n_kv_heads * args.head_dim * 2
        return cls(sum(rows * columns for rows, columns in shapes), args.n_layers, kv)

    def memory(self, bytes_per_weight: float, batch: int, context: int = CONTEXT) -> float:
        return self.weights * bytes_per_weight + batch * context * self.kv_bytes

    def step_seconds(self, machine: Machine, bytes_per_weight: float, batch: int, shares: tuple[float, float]) -> float:
        """Of one token for each of `batch` requests."""
        reading = self.memory(bytes_per_weight, batch) / (machine.gigabytes_per_s * 1e9 * shares[0])
        multiplying = 2 * self.weights * batch / (machine.teraflops * 1e12 * shares[1])
        between = 2 * self.layers * ALL_REDUCE if machine.parts > 1 else 0.0
        return max(reading, multiplying) + between


def decode_table(shares: tuple[float, float]) -> list[str]:
    lines = ["| model | weights | machine | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |"]
    lines.append("|---|---|---|" + "---|" * len(BATCHES))
    for name, args in MODELS.items():
        load = Load.of(args)
        for precision, bytes_per_weight in BYTES.items():
            for machine in MACHINES:
                cells = []
                for batch in BATCHES:
                    if load.memory(bytes_per_weight, batch) > 0.9e9 * machine.memory_GB:
                        cells.append("does not fit")
                        continue
                    rate = batch / load.step_seconds(machine, bytes_per_weight, batch, shares)
                    cells.append(f"{rate:,.0f}/s, ${1e6 * machine.price / 3600 / rate:,.2f}")
                if set(cells) != {"does not fit"}:
                    lines.append(f"| {name} | {precision} | {machine.name} | " + " | ".join(cells) + " |")
    return lines


def prompt_table(shares: tuple[float, float]) -> list[str]:
    lines = ["| model | machine | prompt tokens/s | a million of them |", "|---|---|---|---|"]
    for name, args in MODELS.items():
        load = Load.of(args)
        for machine in MACHINES:
            if load.memory(BYTES["sym_int4"], 1) < 0.9e9 * machine.memory_GB:
                rate = machine.teraflops * 1e12 * shares[1] / (2 * load.weights)
                lines.append(f"| {name} | {machine.name} | {rate:,.0f} | ${1e6 * machine.price / 3600 / rate:,.2f} |")
    return lines


def check_table(path: Path) -> list[str]:
    """Measured beside the limit, from the machine's own limits in the file."""
    content = json.loads(path.read_text())
    lines = [
        f"| {content['model']}, {content['limits']['processor']} | measured, tokens/s | the limit | share |",
        "|---|---|---|---|",
    ]
    for one in content["figures"]:
        if one["side"] == "llama":
            limit = one["tokens_per_s"] / one["share_of_limit"]
            what = f"{one['precision']} {one['work']} ({one['limit']})"
            lines.append(f"| {what} | {one['tokens_per_s']:.1f} | {limit:.1f} | {one['share_of_limit']:.0%} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speed", type=Path, nargs="?", help="what `llama bench --json` wrote")
    parser.add_argument("--efficiency", type=float, nargs=2, default=(0.6, 0.5), metavar=("READ", "MATRIX"))
    options = parser.parse_args()
    tables = [decode_table(tuple(options.efficiency)), prompt_table(tuple(options.efficiency))]
    if options.speed:
        tables.append(check_table(options.speed))
    print("\n\n".join("\n".join(table) for table in tables))


if __name__ == "__main__":
    main()
