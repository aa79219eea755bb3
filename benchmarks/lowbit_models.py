"""Whole models in low bits side by side with llama.cpp: prompts, one stream, 32 streams.

    python benchmarks/lowbit_models.py --peer-python /path/to/venv-with-llama-cpp-python/bin/python
    python benchmarks/lowbit_models.py --peer-python ... --models smollm2 --formats sym_int4 --rounds 7

Each format of ours meets its ggml twin (nf4 and the 4-bit formats Q4_0 or Q4_1, and so on), every matrix in that format
on both sides, the output layer too. "1.1b" has TinyLlama's shape and random weights; "smollm2" is the embedded default.
Three works, whose sides take turns in one run:

    prefill   one prompt of 512 tokens, up to its first token; also by our own unpacked model
    decode    one stream, each token after a prompt of 512
    batch     32 streams, each step after prompts of 32

llama.cpp runs with or without flash attention, whichever is faster when both are tried. Ratios are of medians, above 1
where ours is faster. Shares are of the machine's limits, measured in the same turns: the packed bytes and keys and
values that a token reads over read bandwidth (decode), operations of the linears over the rate of an unpacked product
(prefill, batch). Run it on a machine that does nothing else. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from common.machine import DTYPE, machine, matrix_rate, read_bandwidth
from common.peers import LLAMACPP, TWINS, Peer
from common.shapes import TINYLLAMA, write_model
from common.timing import alternate, median, report
from common.works import Work, low_bit_linears, packed_bytes, run_llamacpp, run_ours

from llama import Llama
from llama.checkpoint import convert, default_model, open_checkpoint
from llama.quantization import FORMATS

WORKS = {"prefill": Work(1, 512, 1), "decode": Work(1, 512, 33), "batch": Work(32, 32, 17)}
TARGETS = {  # of llama.cpp's speed, by format; "" is any other
    "prefill": {"sym_int5": 1.2, "asym_int5": 1.2, "q5_0": 1.2, "q5_1": 1.2, "": 1.5},
    "decode": {"sym_int4": 1.05, "": 1.0},
    "batch": {"": 1.3},
}
SMOLLM2_TARGETS = {"decode": {"sym_int4": 0.9}}


@dataclass(frozen=True)
class Result:
    """One comparison. Seconds are medians, of a prompt or of one step."""

    model: str
    format: str
    peer: str
    work: str
    seconds: float
    peer_seconds: float
    ratio: float
    target: float | None
    share_of_limit: float
    ratio_to_unpacked: float | None

    def show(self) -> None:
        limit = "read bandwidth" if self.work == "decode" else "matrix rate"
        unpacked = f", {self.ratio_to_unpacked:.2f}x our unpacked" if self.ratio_to_unpacked else ""
        target = f" (target {self.target})" if self.target else ""
        print(
            f"{self.model:8}{self.format:10}{self.work:8}{1e3 * self.seconds:9.2f} ms   "
            f"{self.peer} {1e3 * self.peer_seconds:9.2f} ms   {self.ratio:.2f}x{target}, "
            f"{100 * self.share_of_limit:.0f} % of {limit}{unpacked}",
            flush=True,
        )


@dataclass(frozen=True)
class Contest:
    """One model in one format on both sides."""

    model: str
    format: str
    llm: Llama
    peer: Peer
    unpacked: Llama | None

    def run(self, name: str, rounds: int) -> Result:
        work, llm = WORKS[name], self.llm
        theirs = partial(run_llamacpp, self.peer, llm.model.vocab_size, work)
        tried = {flash: theirs(flash) for flash in (True, False)}
        sides: dict[str, Callable[[], float]] = {
            "ours": lambda: run_ours(llm, work),
            "peer": lambda: theirs(min(tried, key=tried.get)),
            "limit": read_bandwidth if name == "decode" else matrix_rate,
        }
        if name == "prefill" and self.unpacked:
            sides["unpacked"] = lambda: run_ours(self.unpacked, work)
        figures = {side: median(found) for side, found in alternate(rounds, **sides).items()}
        share = self.effort(work, name == "decode") / figures["ours"] / figures["limit"]
        targets = TARGETS if self.model == "1.1b" else SMOLLM2_TARGETS
        targets = targets.get(name, {})
        return Result(
            self.model,
            self.format,
            TWINS[self.format],
            name,
            figures["ours"],
            figures["peer"],
            round(figures["peer"] / figures["ours"], 3),
            targets.get(self.format, targets.get("")),
            round(share, 3),
            round(figures["unpacked"] / figures["ours"], 3) if "unpacked" in figures else None,
        )

    def effort(self, work: Work, is_read: bool) -> float:
        """Bytes that a step reads, or operations of its linears; a prompt's output layer has one row."""
        linears = low_bit_linears(self.llm)
        if is_read:
            context = work.prompt_tokens + work.num_tokens // 2
            return packed_bytes(linears) + context * self.llm.model.cache_shape.bytes_per_token(DTYPE)
        rows = work.prompt_tokens if work.num_tokens == 1 else work.num_prompts
        output = self.llm.model.output
        sizes = [m.in_features * m.out_features * (rows if m is not output else work.num_prompts) for m in linears]
        return 2 * sum(sizes)


def prepare_model(model: str, folder: Path) -> tuple[Path, Path]:
    """The model as ours reads it, and as llama.cpp does."""
    if model == "smollm2":
        return default_model(), default_model()
    write_model(folder / "meta", TINYLLAMA)
    convert(folder / "meta", folder / "model.gguf", to="gguf", dtype="bf16")
    return folder / "meta", folder / "model.gguf"


def build(path: Path, **options: object) -> Llama:
    with redirect_stdout(sys.stderr):
        return Llama.build(path, max_seq_len=1024, max_batch_size=32, **options)


@contextmanager
def loaded(peer: Peer, source: Path, target: Path, type: str) -> Iterator[None]:
    """llama.cpp with the model in that type, in a file that is gone afterwards."""
    peer.ask(quantize=str(source), to=str(target), type=type)
    peer.ask(load=str(target))
    yield
    target.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--models", default="1.1b,smollm2")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--works", default=",".join(WORKS))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    limits, results = machine(), []
    print(limits, flush=True)
    for model in options.models.split(","):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            ours, theirs = prepare_model(model, folder)
            args = open_checkpoint(ours).args
            unpacked = build(ours, quantization="none") if "prefill" in options.works else None
            for format in options.formats.split(","):
                if args.dim % FORMATS[format].block or args.hidden_dim % FORMATS[format].block:
                    print(f"{model} {format}: its columns are not whole blocks", file=sys.stderr)
                    continue
                peer = Peer(options.peer_python, LLAMACPP, torch.get_num_threads())
                with loaded(peer, theirs, folder / "small.gguf", TWINS[format]):
                    contest = Contest(model, format, build(ours, quantization=format), peer, unpacked)
                    for work in options.works.split(","):
                        results.append(contest.run(work, options.rounds))
                        results[-1].show()
                    peer.close()
                del contest
                gc.collect()
    report({"machine": limits, "results": [asdict(result) for result in results]})


if __name__ == "__main__":
    main()
