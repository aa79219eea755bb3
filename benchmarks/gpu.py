"""Whole models on a GPU: steps that are captured as graphs, the same without graphs, and transformers.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --shapes 8b --precisions sym_int4 --works 1x4096,32x512

Weights are random, in the shapes of real models. A work is how many requests of how many tokens: first their prompts
are computed, then a token of each at every step. Sides take turns; times are of the host's clock, which waits for each
step's tokens as a client does, medians of all steps. Shares are of the card's own limits, measured before: what a
step has to read (weights, keys and values) of the bandwidth of a large copy, a prompt's products of the rate of a large
one.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from common.gpu import limits
from common.timing import alternate, median, report

from llama import SamplingParams
from llama.answer import Query
from llama.bench.shapes import MODEL_SHAPES, write_vocabulary
from llama.bench.works import Effort, Work
from llama.building import make_engine
from llama.compiled.captured import CapturedStep
from llama.engine import Engine
from llama.linear import Linear
from llama.model import ModelArgs, Transformer
from llama.quantization import LowBitLinear, pack_modules
from llama.runner import BLOCK_SIZE, Program
from llama.tokenizer import Tokenizer

DEVICE = torch.device("cuda")


def make_model(args: ModelArgs, precision: str) -> Transformer:
    """On the GPU: normal weights in bfloat16, or any bytes that are weights of a low-bit format."""
    with torch.device("meta"):
        model = Transformer(args)
    if precision != "bf16":
        pack_modules(model, {name: precision for name, linear in model.named_modules() if isinstance(linear, Linear)})
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                made = torch.empty(weight.shape, dtype=torch.bfloat16, device=DEVICE)
                made = made.normal_(0, 0.02) if weight.dim() == 2 else made.fill_(1)
                setattr(module, name, torch.nn.Parameter(made, requires_grad=False))
        if isinstance(module, LowBitLinear):  # bytes below 60 keep every scale an ordinary number
            size = module.out_features, module.format.packed_columns(module.in_features)
            module.weight = torch.randint(0, 60, size, dtype=torch.uint8, device=DEVICE)
    model.prepare()
    return model


def effort_of(model: Transformer) -> Effort:
    linears = [module for module in model.modules() if isinstance(module, Linear | LowBitLinear)]
    return Effort(
        weight_bytes=sum(linear.weight.nbytes for linear in linears),
        kv_bytes_per_token=model.cache_shape.bytes_per_token(torch.bfloat16),
        inner_products=sum(one.in_features * one.out_features for one in linears if one is not model.output),
        output_products=model.output.in_features * model.output.out_features,
    )


class Ours:
    """One engine, whose steps are graphs or the model's own."""

    def __init__(self, engine: Engine, program: Program):
        self.engine = engine
        self.program = program

    def run(self, num_prompts: int, length: int, num_tokens: int) -> tuple[float, list[float]]:
        """Seconds until all have a token, and of each step from then on."""
        self.engine.runner.program = self.program
        for _ in range(num_prompts):
            tokens = random.choices(range(3, self.engine.runner.vocab_size), k=length)
            self.engine.add(Query(tokens, greedy(num_tokens)))
        started, answering = time.perf_counter(), set()
        while len(answering) < num_prompts:
            answering |= {event.request_id for event in self.engine.step()}
        first, steps = time.perf_counter() - started, []
        while self.engine.has_work:
            started = time.perf_counter()
            self.engine.step()
            steps.append(time.perf_counter() - started)
        return first, steps


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True).resolve()


class Transformers:
    """Its eager model with a cache that grows, each step's tokens read back."""

    def __init__(self, args: ModelArgs):
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=args.dim, intermediate_size=args.hidden_dim, num_hidden_layers=args.n_layers,
            num_attention_heads=args.n_heads, num_key_value_heads=args.n_kv_heads, vocab_size=args.vocab_size,
            max_position_embeddings=args.max_seq_len, attn_implementation="sdpa", dtype=torch.bfloat16,
        )  # fmt: skip
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(DEVICE):
                self.model = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        self.vocab_size = args.vocab_size

    @torch.inference_mode()
    def run(self, num_prompts: int, length: int, num_tokens: int) -> tuple[float, list[float]]:
        tokens = torch.randint(3, self.vocab_size, (num_prompts, length), device=DEVICE)
        torch.cuda.synchronize()
        cache, times = None, []
        for _ in range(num_tokens):
            started = time.perf_counter()
            output = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, tokens = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            tokens.tolist()
            times.append(time.perf_counter() - started)
        return times[0], times[1:]


def line(figure: dict) -> str:
    prompts = figure["requests"] * figure["prompt_tokens"] / figure["prompt_seconds"]
    return (
        f"{figure['shape']:5} {figure['precision']:9} {figure['requests']:2} x {figure['prompt_tokens']:4} "
        f"{figure['side']:12} prompts {prompts:9.0f} tokens/s ({100 * figure['share_of_rate']:2.0f} % of rate)  "
        f"step {1e3 * figure['step_seconds']:6.2f} ms, {figure['requests'] / figure['step_seconds']:6.0f} tokens/s "
        f"({100 * figure['share_of_bandwidth']:2.0f} % of bandwidth)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1.1b,8b")
    parser.add_argument("--precisions", default="bf16,sym_int4")
    parser.add_argument("--works", default="1x512,1x4096,8x512,32x512", help="requests x tokens")
    parser.add_argument("--tokens", type=int, default=48, help="that each request generates")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vs", choices=("transformers", "nobody"), default="transformers")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU; llama bench measures processors")
    works = [tuple(map(int, work.split("x"))) for work in options.works.split(",")]
    bandwidth, rate = (measured() for measured in limits().values())
    print(f"{torch.cuda.get_device_name()}: copies {bandwidth / 1e12:.2f} TB/s, products {rate / 1e12:.0f} TFLOP/s")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in options.shapes.split(","):
            args = MODEL_SHAPES[shape]
            write_vocabulary(Path(folder) / "tokenizer.model", args.vocab_size)
            tokenizer = Tokenizer(Path(folder) / "tokenizer.model")
            for precision in options.precisions.split(","):
                model = make_model(args, precision)
                effort = effort_of(model)
                room = max(requests * (length + options.tokens + BLOCK_SIZE) for requests, length in works)
                memory = max(room, args.max_seq_len) * effort.kv_bytes_per_token
                engine = make_engine(model, tokenizer, seed=0, kv_cache_memory=memory)
                sides = {"graphs": Ours(engine, CapturedStep(model)), "eager": Ours(engine, model)}
                if precision == "bf16" and options.vs == "transformers":
                    sides["transformers"] = Transformers(args)
                for requests, length in works:
                    turns = {
                        name: lambda side=side: side.run(requests, length, options.tokens)  # noqa: B023
                        for name, side in sides.items()
                    }
                    read = effort.bytes_read(Work(requests, length, options.tokens))
                    prompts = requests * effort.operations(Work(1, length, 1))
                    for name, runs in alternate(options.rounds, **turns).items():
                        first = median([first for first, _ in runs])
                        step = median([seconds for _, steps in runs for seconds in steps])
                        results.append(
                            {
                                "shape": shape, "precision": precision, "side": name, "requests": requests,
                                "prompt_tokens": length, "prompt_seconds": first, "step_seconds": step,
                                "share_of_bandwidth": round(read / step / bandwidth, 3),
                                "share_of_rate": round(prompts / first / rate, 3),
                            }
                        )  # fmt: skip
                        print(line(results[-1]), flush=True)
                del model, engine, sides, turns
                torch.cuda.empty_cache()
    report({"card": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results})


if __name__ == "__main__":
    main()
