"""Loading: seconds and anonymous memory, ours beside transformers and safetensors, in turns.

    python benchmarks/load.py [--layers 8] [--dim 2048] [--dtype bf16] [--rounds 3]

A random model is written once to a temporary directory (Hugging Face's files, and Meta's). Every measurement is a
process of its own: after the imports it notes its anonymous resident memory (RssAnon), loads, reads one value of every
page of every parameter, so that what is mapped counts as loaded, and reports the seconds and the highest growth of
RssAnon on the way. The sides:

    ours_hf, ours_meta   open_checkpoint, a Transformer on the meta device, load_weights
    ours_cast            ours_hf with the other of bf16 and fp32, so that every weight is converted
    transformers         LlamaForCausalLM.from_pretrained
    transformers_cast    the same with the other type
    load_file            safetensors' load_file, assigned to transformers' model on the meta device

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common.machine import Memory, machine
from common.shapes import write_model
from common.timing import alternate, median, report

from llama.checkpoint import convert, load_weights, open_checkpoint
from llama.device import DTYPES
from llama.model import ModelArgs, Transformer

OTHER = {"bf16": "fp32", "fp32": "bf16"}
PAGE = 4096
SIDES = {
    # name: (which directory, whose code, whether the type changes)
    "ours_hf": ("hf", "ours", False),
    "transformers": ("hf", "transformers", False),
    "load_file": ("hf", "load_file", False),
    "ours_meta": ("meta", "ours", False),
    "ours_cast": ("hf", "ours", True),
    "transformers_cast": ("hf", "transformers", True),
}


def load_ours(path: Path, dtype: torch.dtype) -> torch.nn.Module:
    checkpoint = open_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(checkpoint.args)
    load_weights(model, checkpoint, dtype=dtype)
    return model


def load_transformers(path: Path, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(path, dtype=dtype)


def load_with_load_file(path: Path, dtype: torch.dtype) -> torch.nn.Module:
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(path))
    model.load_state_dict(load_file(path / "model.safetensors"), assign=True)
    return model


LOADERS = {"ours": load_ours, "transformers": load_transformers, "load_file": load_with_load_file}


def measure(path: Path, loader: str, dtype: torch.dtype) -> dict[str, float]:
    """One load in this process."""
    if loader != "ours":
        from safetensors.torch import load_file
        from transformers import (
            LlamaForCausalLM,  # imported here, so that the time of importing does not count
        )

        del load_file, LlamaForCausalLM
    torch.zeros(1 << 20).to(torch.bfloat16)
    with Memory() as memory:
        started = time.perf_counter()
        model = LOADERS[loader](path, dtype)
        for parameter in model.parameters():
            parameter.detach().view(-1).view(torch.uint8)[::PAGE].sum()
        elapsed = time.perf_counter() - started
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    return {"seconds": elapsed, "growth": memory.peak, "nbytes": nbytes}


def in_a_process_of_its_own(path: Path, loader: str, dtype: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(path), loader, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_both(folder: Path, args: argparse.Namespace) -> None:
    """A random model, as a Hugging Face directory and as Meta's."""
    shape = ModelArgs(
        dim=args.dim,
        n_layers=args.layers,
        n_heads=args.dim // 64,
        n_kv_heads=args.dim // 256,
        vocab_size=args.vocab,
    )
    write_model(folder / "meta", shape, DTYPES[args.dtype])
    convert(folder / "meta", folder / "hf", "hf", max_shard_size="1000GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dtype", choices=list(OTHER), default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        path, loader, dtype = args.measure
        print(json.dumps(measure(Path(path), loader, DTYPES[dtype])))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}

    def side(name: str) -> float:
        directory, loader, cast = SIDES[name]
        dtype = OTHER[args.dtype] if cast else args.dtype
        found[name].append(in_a_process_of_its_own(folder / directory, loader, dtype))
        return found[name][-1]["seconds"]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_both(folder, args)
        seconds = alternate(args.rounds, **{name: lambda name=name: side(name) for name in SIDES})
    show(args, seconds, found)


def show(args: argparse.Namespace, seconds: dict[str, list[float]], found: dict[str, list[dict[str, float]]]) -> None:
    rows = {}
    for name in SIDES:
        weights = found[name][-1]["nbytes"]
        growth = max(one["growth"] for one in found[name][1:])
        rows[name] = {"seconds": median(seconds[name]), "anonymous": growth, "weights": weights}
        print(
            f"{name:18} {rows[name]['seconds']:7.3f} s   weights {weights / 1e6:8.1f} MB   "
            f"anonymous growth {growth / 1e6:8.1f} MB = {growth / weights:5.2f} of the weights"
        )
    ratios = {
        "time_transformers_over_ours": rows["transformers"]["seconds"] / rows["ours_hf"]["seconds"],
        "time_load_file_over_ours": rows["load_file"]["seconds"] / rows["ours_hf"]["seconds"],
        "time_transformers_cast_over_ours": rows["transformers_cast"]["seconds"] / rows["ours_cast"]["seconds"],
        "memory_transformers_over_ours": rows["transformers"]["anonymous"] / max(1, rows["ours_hf"]["anonymous"]),
    }
    for name, ratio in ratios.items():
        print(f"{name:34} {ratio:6.2f}")
    settings = {"layers": args.layers, "dim": args.dim, "vocab": args.vocab, "dtype": args.dtype}
    report({"benchmark": "load", "machine": machine(), "model": settings, "rows": rows, "ratios": ratios})


if __name__ == "__main__":
    main()
