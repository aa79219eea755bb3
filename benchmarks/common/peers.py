"""Other engines, each in a child process of its own interpreter."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
LLAMACPP, GGML, CHECKOUT = HERE / "llamacpp.py", HERE / "ggml.py", HERE / "checkout.py"

TWINS = {  # the type of llama.cpp's that has as many bits as a format of ours
    "sym_int4": "q4_0", "asym_int4": "q4_1", "sym_int5": "q5_0", "asym_int5": "q5_1", "sym_int8": "q8_0",
    "nf4": "q4_0", "q4_0": "q4_0", "q4_1": "q4_1", "q5_0": "q5_0", "q5_1": "q5_1", "q8_0": "q8_0",
    "q4_k": "q4_k", "q6_k": "q6_k", "zero_int4": "q4_1",
}  # fmt: skip


class Peer:
    """A child process that runs a script and answers each line of JSON with one."""

    def __init__(self, python: str, script: str | Path, *arguments: object, **environment: str):
        self.child = subprocess.Popen(
            [python, str(script), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )

    def ask(self, **request: object) -> dict:
        self.child.stdin.write(json.dumps(request) + "\n")
        self.child.stdin.flush()
        answer = self.child.stdout.readline()
        if not answer:
            raise RuntimeError(f"the peer ended with status {self.child.wait()} at {str(request)[:200]}")
        return json.loads(answer)

    def close(self) -> None:
        self.child.stdin.close()
        self.child.wait()
