"""What adapters beside a model cost a decoding step: rank 16 on every linear of each layer.

    OMP_NUM_THREADS=1 python benchmarks/adapters.py [--model MODEL | --shape 1.1b] [--quantization sym_int4]
        [--adapter-dtype bf16] [--rounds 9] [--cases 0 2]

The same engine answers the same prompts with and without adapters, in turns. Seconds are the processor's, of one
thread. A figure is the time with adapters over the time without, the median of the rounds. The aims for SmolLM2 in
sym_int4: 1.2 for one row, 1.3 for 8 rows of 4 adapters; 1.05 at 1.1B ("1.1b" has TinyLlama's shape, random weights and
the default model's tokenizer). The last line is JSON.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from common.machine import machine
from common.shapes import TINYLLAMA
from common.timing import alternate, median, report

from llama import Llama, SamplingParams
from llama.adapting import changes_of
from llama.answer import Query
from llama.checkpoint import Adapter, LowRank, default_model, expected_shapes, open_checkpoint
from llama.checkpoint.inventory import is_linear
from llama.device import SPELLINGS
from llama.model import ModelArgs, Transformer
from llama.quantization import pack_modules

RANK = 16
STEPS = 24
CONTEXT = 256
CASES = {  # the adapter of each row, by its number
    "1 row, 1 adapter": [1],
    "8 rows, 1 adapter": [1] * 8,
    "8 rows, 4 adapters": [1, 1, 2, 2, 3, 3, 4, 4],
    "8 rows, 4 of them base": [0, 0, 0, 0, 1, 1, 2, 2],
    "8 rows, all base": [0] * 8,
}


def random_adapter(args: ModelArgs, dtype: torch.dtype) -> Adapter:
    """Small numbers of rank 16 on every linear but the output layer, that this type holds exactly."""
    low_rank = {}
    for name, shape in expected_shapes(args):
        if is_linear(name) and name != "output.weight":
            a, b = torch.randn(RANK, shape[1]) * 1e-3, torch.randn(shape[0], RANK) * 1e-3
            low_rank[name.removesuffix(".weight")] = LowRank(a.to(dtype), b.to(dtype), 1.0)
    return Adapter(Path("random"), "peft", (Path("random"),), low_rank, is_half_split=False)


def random_model(args: ModelArgs, quantization: str) -> Transformer:
    """Random weights in blocks; every 16 rows of a linear are the same, which its product does not know."""
    with torch.device("meta"):
        model = Transformer(args)
    names = [name.removesuffix(".weight") for name, _ in expected_shapes(args) if is_linear(name)]
    pack_modules(model, dict.fromkeys(names, quantization))
    for name in names:
        linear = model.get_submodule(name)
        rows = linear.format.quantize(torch.randn(16, linear.in_features) * 0.02)
        linear.weight = rows.repeat(linear.out_features // 16, 1)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.randn(parameter.shape) if parameter.dim() == 2 else torch.ones(parameter.shape)
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    model.prepare()
    return model


def open_base(options: argparse.Namespace) -> Llama:
    """The model without adapters."""
    sizes = {"max_seq_len": 512, "max_batch_size": 24}
    if options.shape is None:
        return Llama.build(options.model, quantization=options.quantization, device="cpu", draft="none", **sizes)
    tokenizer = open_checkpoint(default_model()).open_tokenizer()
    return Llama(random_model(replace(TINYLLAMA, **sizes), options.quantization), tokenizer)


def step_time(llm: Llama, names: list[str | None]) -> float:
    """Seconds of one thread for the decoding steps of these requests; prompts are cached after the first time."""
    params = SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True).resolve()
    prompts = [[(7 * row + 3 * i) % 1000 + 10 for i in range(CONTEXT)] for row in range(len(names))]
    queries = [Query(prompt, params, adapter=name) for prompt, name in zip(prompts, names, strict=True)]
    start = time.thread_time()
    for _ in llm.run(queries, strict=True):
        pass
    return time.thread_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--shape", choices=["1.1b"])
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)), help="numbers of some; all if none")
    parser.add_argument("--adapter-dtype", choices=["fp32", "bf16"], default="fp32", help="what their numbers fit in")
    parser.add_argument("--quantization", default="sym_int4")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    limits = machine()
    print(limits, flush=True)
    torch.manual_seed(0)
    base = open_base(options)
    model: Transformer = base.model
    loaded = Llama(model, base.tokenizer, kv_cache_memory=None, checkpoint=base.checkpoint)
    for number in range(1, 5):
        changes = changes_of(random_adapter(model.params, SPELLINGS[options.adapter_dtype]), model)
        loaded.engine.load_adapter(str(number), bytes([number]), changes)
    figures = {}
    for case, numbers in [list(CASES.items())[number] for number in options.cases]:
        names = [str(number) if number else None for number in numbers]
        times = alternate(
            options.rounds,
            without=lambda names=names: step_time(base, [None] * len(names)),
            beside=lambda names=names: step_time(loaded, names),
        )
        ratios = [one / other for one, other in zip(times["beside"], times["without"], strict=True)]
        figures[case] = median(ratios)
        milliseconds = median(times["without"]) / STEPS * 1000
        print(f"{case:24} {median(ratios):.2f} (least {min(ratios):.2f}; {milliseconds:.1f} ms without)", flush=True)
    report(
        {
            "machine": limits,
            "shape": options.shape,
            "adapters": options.adapter_dtype,
            "quantization": options.quantization,
            "ratios": figures,
        }
    )


if __name__ == "__main__":
    main()
