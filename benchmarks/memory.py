"""Memory of a low-bit model beside what its weights and cache need: TinyLlama's shape, random weights.

    python benchmarks/memory.py
    python benchmarks/memory.py --formats sym_int4 --saved

For each format a process of its own builds the model, answers a prompt of 512 tokens with 32, and tells how far its
anonymous resident memory grew over that after `import llama`: what it holds in the end, and the most at any moment.
Beside that stands what is needed: the packed linears once, the norms, and the keys and values of those tokens. An
embedding that is stored in 16 bits is looked up in the mapped file. `--saved` loads a directory that
`llama quantize` wrote, else the weights are packed while they load. Linux only. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from common.machine import Memory, machine
from common.peers import Peer
from common.shapes import TINYLLAMA, write_model
from common.timing import report
from common.works import low_bit_linears, packed_bytes

from llama import Llama, SamplingParams
from llama.checkpoint import open_checkpoint, save_low_bit
from llama.quantization import FORMATS

PROMPT, ANSWER = 512, 32
TARGET = 1.15


def measure(path: str, quantization: str | None) -> dict[str, int]:
    """Builds and runs the model here; all figures in bytes."""
    with Memory() as memory, redirect_stdout(sys.stderr):
        llm = Llama.build(path, quantization=quantization, max_seq_len=1024, max_batch_size=1)
        params = SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True)
        llm.complete([list(range(3, 3 + PROMPT))], params)
    model = llm.model
    packed = packed_bytes(low_bit_linears(llm))
    norms = sum(parameter.nbytes for name, parameter in model.named_parameters() if "norm" in name)
    tokens = PROMPT + ANSWER
    cache = tokens * model.cache_shape.bytes_per_token(model.norm.weight.dtype)
    return {"held": memory.held, "peak": memory.peak, "weights": packed + norms, "cache": cache}


def answer_requests() -> None:
    """The child: a line of JSON in, a line out."""
    for line in sys.stdin:
        print(json.dumps(measure(**json.loads(line))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--saved", action="store_true", help="load a low-bit directory")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        answer_requests()
        return
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "meta", TINYLLAMA)
        for format in options.formats.split(","):
            source, quantization = folder / "meta", format
            if options.saved:
                source, quantization = folder / format, None
                save_low_bit(open_checkpoint(folder / "meta"), source, format)
            child = Peer(sys.executable, __file__, "--child")
            found = child.ask(path=str(source), quantization=quantization)
            child.close()
            ratio = found["held"] / (found["weights"] + found["cache"])
            results.append({"format": format, "saved": options.saved, **found, "ratio": round(ratio, 3)})
            sizes = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in found.items())
            print(f"{format:10}{sizes}: held is {ratio:.2f} of what is needed (target {TARGET})", flush=True)
    report({"machine": machine(), "results": results})


if __name__ == "__main__":
    main()
