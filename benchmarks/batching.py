"""Offline throughput of 32 ragged requests, side by side with those who do the same: one random model, the same work.

    python benchmarks/batching.py --peer-python /path/to/venv-with-llama-cpp-python/bin/python
    python benchmarks/batching.py --shape tiny --sides llama transformers padded     # seconds: does it run at all?

The model has TinyLlama's shape (1.1B) and random bfloat16 weights, written once in Meta's layout and converted for the
peers. 32 requests with prompts of 32 to 512 tokens want 16 to 256 tokens each, greedily, and never stop early. Every
side does all of it once a round (--rounds, default 1), one side after the other; loading and a short warm-up are not
timed. It takes 7 GB of temporary disk and 6 GB of memory. The sides:

    llama         Llama.complete with SamplingParams a request; no prompt shares a prefix
    llama.cpp     BF16 GGUF, all sequences decoded in parallel (`llama/bench/children/llamacpp.py`); left out without
                  --peer-python
    transformers  its continuous batching, with max_new_tokens a request
    padded        one batch in the reference's manner (`padded.py` there) with 8 of the requests (--padded-requests),
                  of all lengths; its rate stands for all of them, as if the rest ran in further batches of that size

The peers run at the best of their settings, found beforehand on a part of the work, which takes some minutes. The
figure is generated tokens a second. `same first token` is the share of the requests whose first token is this
engine's: random weights leave the best logits close together, so that most and not all of them agree. The limits of
the machine are measured before each side. The last line is JSON.

Run it on a machine that does nothing else: where threads outnumber the cores, each parallel loop waits for the
slowest of them, and the engine with the most loops seems the slowest.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from common.machine import machine, matrix_rate, read_bandwidth
from common.peers import LLAMACPP, PACKAGE_ROOT, PADDED, Peer
from common.shapes import TINY, TINYLLAMA, write_model
from common.timing import median, report, seconds

from llama import Llama, SamplingParams
from llama.checkpoint import convert
from llama.model import ModelArgs

TARGETS = {"padded": 8.0, "llama.cpp": 2.5, "transformers": 1.5}
NUM_REQUESTS = 32
SAMPLE_TOKENS = 8  # that a request generates, at most, while a peer's settings are compared


@dataclass(frozen=True)
class Shape:
    """A model, and the least and most tokens of the work's prompts and answers."""

    args: ModelArgs
    prompts: tuple[int, int]
    answers: tuple[int, int]


SHAPES = {
    "1.1B": Shape(
        TINYLLAMA,
        (32, 512),
        (16, 256),
    ),
    "tiny": Shape(
        TINY,
        (8, 64),
        (4, 16),
    ),
}


@dataclass(frozen=True)
class Request:
    number: int
    prompt: list[int]
    num_tokens: int  # to generate


@dataclass(frozen=True)
class Outcome:
    """What a side needed for some requests, and what it answered."""

    requests: list[Request]
    seconds: float
    tokens: list[list[int]]
    setting: str = ""

    def __post_init__(self) -> None:
        for request, tokens in zip(self.requests, self.tokens, strict=True):
            wanted = request.num_tokens
            assert len(tokens) == wanted, f"request {request.number}: {len(tokens)} tokens instead of {wanted}"

    @property
    def num_tokens(self) -> int:
        return sum(request.num_tokens for request in self.requests)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def first_tokens(self) -> dict[int, int]:
        return {r.number: tokens[0] for r, tokens in zip(self.requests, self.tokens, strict=True)}


@dataclass
class Work:
    """What every side is given. `settings` remembers what a side found out to be its best."""

    directory: Path  # with the model as meta/, hf/ and model.gguf
    requests: list[Request]
    peer_python: str | None
    padded_requests: int
    settings: dict[str, str] = field(default_factory=dict)

    def some(self, count: int) -> list[Request]:
        """`count` of the requests, evenly taken from the shortest to the longest."""
        by_length = sorted(self.requests, key=lambda r: len(r.prompt) + r.num_tokens)
        stride = len(by_length) // count
        return by_length[stride // 2 :: stride][:count]

    def at_best(
        self,
        side: str,
        settings: list[str],
        part: list[Request],
        run: Callable[[list[Request], str], Outcome],
    ) -> Outcome:
        """All the work, in the setting that is the fastest at the beginning of a part of it, tried once."""
        if side not in self.settings:
            part = [replace(r, num_tokens=min(SAMPLE_TOKENS, r.num_tokens)) for r in part]
            needed = {setting: run(part, setting).seconds for setting in settings}
            print(f"  {side}, settings:", {s: f"{t:.2f} s" for s, t in needed.items()}, flush=True)
            self.settings[side] = min(needed, key=needed.get)
        return run(self.requests, self.settings[side])


def make_requests(shape: Shape) -> list[Request]:
    rng = random.Random(0)
    prompts = [rng.choices(range(3, shape.args.vocab_size), k=rng.randint(*shape.prompts)) for _ in range(NUM_REQUESTS)]
    return [Request(number, prompt, rng.randint(*shape.answers)) for number, prompt in enumerate(prompts)]


# --- the sides: each loads the model, does the work, and lets go of the model


def run_llama(work: Work) -> Outcome:
    longest = max(len(r.prompt) + r.num_tokens for r in work.requests)
    llm = Llama.build(work.directory / "meta", max_seq_len=longest, max_batch_size=NUM_REQUESTS, dtype="bf16")
    params = [SamplingParams(temperature=0.0, max_tokens=r.num_tokens, ignore_eos=True) for r in work.requests]
    llm.complete([[5] * 16], replace(params[0], max_tokens=4))
    completions = []
    elapsed = seconds(lambda: completions.extend(llm.complete([r.prompt for r in work.requests], params)))
    return Outcome(work.requests, elapsed, [completion.tokens for completion in completions])


FLASH = ["flash attention", "no flash attention"]


def ask(peer: Peer, requests: list[Request], setting: str, **options: object) -> Outcome:
    prompts, num_tokens = [r.prompt for r in requests], [r.num_tokens for r in requests]
    answer = peer.ask(do="run", prompts=prompts, num_tokens=num_tokens, **options)
    return Outcome(requests, answer["first_seconds"] + sum(answer["step_seconds"]), answer["tokens"], setting)


def run_llamacpp(work: Work) -> Outcome:
    peer = Peer(work.peer_python, LLAMACPP)
    try:
        peer.ask(do="load", path=str(work.directory / "model.gguf"), threads=torch.get_num_threads())
        settings = {name: partial(ask, peer, flash=flash) for name, flash in zip(FLASH, (True, False), strict=True)}
        return work.at_best("llama.cpp", FLASH, work.some(8), lambda part, name: settings[name](part, name))
    finally:
        peer.close()


# transformers gathers every request's keys and values into one sequence and masks what is not a row's own, so that its
# scheduler matters: decoding and prompts in one step ("fifo") or apart. Its fused attention repeats keys and values for
# grouped heads unless an environment variable forbids it, which is up to twice as fast. Its compiled mode pads them to
# thousands of tokens, and is left out.
GROUPED = "TRANSFORMERS_SDPA_FORCE_GQA"
SETTINGS = ["sdpa, prefill_first", "sdpa, fifo", "eager, prefill_first"]
PAGE = 16


def batching_config(requests: list[Request], scheduler: str) -> object:
    from transformers import ContinuousBatchingConfig

    pages = sum(-(-(len(r.prompt) + r.num_tokens) // PAGE) for r in requests)
    return ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=pages + 8,
        max_batch_tokens=512,
        max_requests_per_batch=len(requests),
        allow_block_sharing=False,
        scheduler_type=scheduler,
        safety_margin=0.0,
    )


def answers(manager: object, requests: list[Request]) -> dict[int, list[int]]:
    """What transformers generates for each request, by its number."""
    for request in requests:
        manager.add_request(request.prompt, str(request.number), max_new_tokens=request.num_tokens)
    found: dict[int, list[int]] = {}
    while len(found) < len(requests):
        output = manager.get_result(timeout=1)
        if output is None and not manager.is_running():
            raise RuntimeError("transformers' thread ended") from manager.background_thread_status.fatal_error
        if output is not None and output.error is not None:
            raise RuntimeError(f"transformers: {output.error}")
        if output is not None and output.is_finished():
            found[int(output.request_id)] = output.generated_tokens
    return found


def run_batch(model: torch.nn.Module, requests: list[Request], setting: str) -> Outcome:
    """transformers' continuous batching; making its cache and a first request that warms it up are not timed."""
    from transformers import GenerationConfig

    attention, scheduler = setting.split(", ")
    model.set_attn_implementation(attention)
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    config = batching_config(requests, scheduler)
    with model.continuous_batching_context_manager(greedy, continuous_batching_config=config) as manager:
        answers(manager, [Request(-1, [5] * 16, 4)])
        tokens: dict[int, list[int]] = {}
        elapsed = seconds(lambda: tokens.update(answers(manager, requests)))
    return Outcome(requests, elapsed, [tokens[r.number] for r in requests], setting)


def run_transformers(work: Work) -> Outcome:
    from transformers import AutoModelForCausalLM

    os.environ[GROUPED] = "1"
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # errors are raised here
    model = AutoModelForCausalLM.from_pretrained(work.directory / "hf", dtype=torch.bfloat16).eval()
    return work.at_best("transformers", SETTINGS, work.requests, partial(run_batch, model))


def run_padded(work: Work) -> Outcome:
    requests = work.some(work.padded_requests)
    peer = Peer(sys.executable, PADDED, PYTHONPATH=str(PACKAGE_ROOT))
    try:
        peer.ask(do="load", path=str(work.directory / "meta"), threads=torch.get_num_threads(), dtype="bfloat16")
        peer.ask(do="run", prompts=[[5] * 16], num_tokens=2)
        return ask(peer, requests, f"{len(requests)} of {len(work.requests)} requests")
    finally:
        peer.close()


SIDES = {
    "llama": run_llama,
    "llama.cpp": run_llamacpp,
    "transformers": run_transformers,
    "padded": run_padded,
}


# --- the comparison


def measure(side: str, work: Work) -> tuple[Outcome, dict[str, object]]:
    """One run of a side, and its row of the result."""
    limits = {
        "read_GB_per_s": round(read_bandwidth() / 1e9, 1),
        "bf16_TFLOP_per_s": round(matrix_rate(torch.bfloat16) / 1e12, 2),
    }
    outcome = SIDES[side](work)
    gc.collect()  # the model is gone before the next one comes
    row = {
        "tokens_per_s": round(outcome.tokens_per_s, 2),
        "seconds": round(outcome.seconds, 2),
        "tokens": outcome.num_tokens,
        "setting": outcome.setting,
        **limits,
    }
    print(f"{side:13}", row, flush=True)
    return outcome, row


def agreement(ours: Outcome, theirs: Outcome) -> float:
    """The share of their requests whose first token is ours too."""
    first = ours.first_tokens
    same = [first[number] == token for number, token in theirs.first_tokens.items()]
    return round(sum(same) / len(same), 3)


def compare(sides: list[str], work: Work, rounds: int) -> dict[str, object]:
    """Every side in turn, `rounds` times; ratios of the medians of tokens per second."""
    rows: dict[str, list[dict]] = {side: [] for side in sides}
    outcomes: dict[str, Outcome] = {}
    for _ in range(rounds):
        for side in sides:
            outcomes[side], row = measure(side, work)
            rows[side].append(row)
    result: dict[str, object] = {"runs": rows}
    rates = {side: median([row["tokens_per_s"] for row in rows[side]]) for side in sides}
    for side, target in TARGETS.items():
        if side in rates and "llama" in rates:
            comparison = {
                "ratio": round(rates["llama"] / rates[side], 2),
                "target": target,
                "same_first_token": agreement(outcomes["llama"], outcomes[side]),
            }
            print(
                f"llama / {side:13} {comparison['ratio']:6.2f}  (target {target}; "
                f"same first token: {comparison['same_first_token']:.0%})"
            )
            result[f"llama / {side}"] = comparison
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B", choices=SHAPES)
    parser.add_argument("--peer-python", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, metavar="SIDE", help=", ".join(SIDES))
    parser.add_argument(
        "--padded-requests", type=int, default=8, choices=(4, 8, 16, 32), help="how many the padded batch has"
    )
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    sides, shape = options.sides, SHAPES[options.shape]
    if "llama.cpp" in sides and options.peer_python is None:
        print("llama.cpp: left out, as no --peer-python was given")
        sides = [side for side in sides if side != "llama.cpp"]
    limits = machine()
    print(limits)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_model(directory / "meta", shape.args)
        if "llama.cpp" in sides:
            convert(directory / "meta", directory / "model.gguf", to="gguf", dtype="bf16")
        if "transformers" in sides:
            convert(directory / "meta", directory / "hf", to="hf", dtype="bf16")
        work = Work(directory, make_requests(shape), options.peer_python, options.padded_requests)
        given = {
            "requests": len(work.requests),
            "prompt_tokens": sum(len(r.prompt) for r in work.requests),
            "tokens": sum(r.num_tokens for r in work.requests),
        }
        print(given, flush=True)
        report({"machine": limits, "shape": options.shape, "work": given, **compare(sides, work, options.rounds)})


if __name__ == "__main__":
    main()
