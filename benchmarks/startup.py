"""Start-up: from the start of the process to the first token, and how long a large vocabulary takes to open.

    python benchmarks/startup.py [--before CHECKOUT] [--rounds 7]

The default model as it is stored, in a new process each time, from a warm file cache; `--before` is the folder of
another version of this project, whose runs alternate with ours. `import torch` alone takes its turn too: nothing here
can be faster. The vocabulary is Llama 3's, 128,256 tokens, in a GGUF file without weights. Seconds are the clock's; of
the processor's, which a busy machine changes less, there is a second figure. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from common.machine import processor
from common.timing import alternate, median, report

from llama import Tokenizer
from llama.files.gguf import write_gguf
from llama.vocabulary.gguf import as_value

HERE = Path(__file__).parent.parent
CODE = {
    "torch": "import torch",
    "first_token": """
from llama import Llama
llm = Llama.build()
next(text for text in llm.stream_text("The capital of France is") if text)
""",
    "vocabulary": """
from llama import Tokenizer
started, used = time.time(), time.process_time()
Tokenizer(sys.argv[1])
""",
}
AROUND = """
import os, sys, time
started, used = float(os.environ["STARTED"]), 0
{code}
print(time.time() - started, time.process_time() - used)
"""


def write_vocabulary(path: Path) -> None:
    """Llama 3's vocabulary as a GGUF file of metadata alone."""
    spec = find_spec("llama_models")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llama_models is not installed: see requirements-test.txt")
    source = Path(spec.submodule_search_locations[0], "llama3", "tokenizer.model")
    fields = Tokenizer(source).gguf_metadata()
    write_gguf(path, [], {key: as_value(key, value) for key, value in fields.items()}, lambda done: None)


def run(code: str, checkout: Path, *arguments: str) -> tuple[float, float]:
    """Seconds by the clock and of the processor, in a process of its own with the package from `checkout`."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "STARTED": str(time.time())}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # the first run compiles, as at a person's first start
    command = [sys.executable, "-c", AROUND.format(code=code), *arguments]
    done = subprocess.run(
        command, env=environment, cwd=checkout, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    clock, used = done.stdout.splitlines()[-1].split()
    return float(clock), float(used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    checkouts = {"now": HERE} | ({"before": options.before.resolve()} if options.before else {})
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder, "llama3.gguf")
        write_vocabulary(vocabulary)
        sides = {"import_torch": partial(run, CODE["torch"], HERE)}
        for name, checkout in checkouts.items():
            sides[f"first_token_{name}"] = partial(run, CODE["first_token"], checkout)
            sides[f"vocabulary_{name}"] = partial(run, CODE["vocabulary"], checkout, str(vocabulary))
        times = alternate(options.rounds, **sides)
    result: dict[str, object] = {"processor": processor(), "cores": os.cpu_count()}
    print(f"{processor()}, {os.cpu_count()} cores; medians of {options.rounds}, seconds")
    for name, pairs in times.items():
        clock, used = (round(median(values), 2) for values in zip(*pairs, strict=True))
        print(f"{name:20} {clock:6.2f} by the clock, {used:6.2f} of the processor")
        result[name] = {"clock": clock, "processor": used}
    report(result)


if __name__ == "__main__":
    main()
