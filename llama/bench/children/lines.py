"""How every side of a comparison is spoken to: a process that answers each line of JSON with one.

The scripts beside this one are run by path, each by an interpreter that has what it measures and need have nothing
else: Python's own library is all that stands here. The requests:

    {"do": "load", "path": ..., "threads": 2, "max_seq_len": 4128, "max_batch_size": 32, ...}
        ->  {"vocab_size": 32000, ...}
    {"do": "run", "prompts": [[1, 2], ...], "num_tokens": 16, ...}    every prompt as long, ids from 3 up
        ->  {"first_seconds": 0.5, "step_seconds": [0.1, ...], "tokens": [[3, ...], ...]}
    {"do": "memory"}  ->  {"bytes": ...}    the most that was resident, what is mapped counted too; null: not known

`first_seconds` passes until every prompt has its first token, then each step gives every prompt one more. Nothing is
sampled: the likeliest token comes next, and no end ends it. Whatever a person can cause is answered by {"error": ...}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable


def answer_lines(**handlers: Callable[..., dict]) -> None:
    """Answers until standard input ends; what handlers print, and what C libraries do, goes to standard error."""
    handlers = {"memory": memory, **handlers}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = handlers[request.pop("do")](**request)
        except (ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
            answer = {"error": f"{error}" or type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


def memory() -> dict:
    if sys.platform == "linux":  # where getrusage begins with what the process had that started this one
        with open("/proc/self/status") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return {"bytes": int(fields["VmHWM"].split()[0]) * 1024}
    try:
        import resource
    except ImportError:  # not a POSIX system
        return {"bytes": None}
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2)
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
