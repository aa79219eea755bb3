"""What answers with a shape cost: a decoding step of 8 rows with constraints beside one without, and compiling.

    python benchmarks/constraints.py TOKENIZER [--layers 16] [--dim 2048] [--rounds 7]
    python benchmarks/constraints.py --answers [MODEL] [--suite DIR]

TOKENIZER is a vocabulary of Llama 3's (128,256 ids); the model has Llama 3.2 1B's shape, or as many layers as given,
and random bfloat16 weights (2.5 GB). Every row of the constrained side writes JSON of a schema that never ends. Both
sides take 16 steps by turns; medians of a step, and their ratio. Then how long it takes to compile a schema of 50
properties which was not seen before, and to make llguidance's vocabulary of ours, once a model, with the longest time
that another thread had to wait for it.

With --answers it is counted instead how many answers of MODEL (left out: the default one; "tiny": a random one) at
temperature 1.5 are valid for 200 generated schemas, for regular expressions and for grammars; it needs what the tests
need. DIR is the JSON-Schema test suite, which jsonschema's source archive has as `json`
(`pip download --no-deps --no-binary :all: jsonschema`): the schemas of draft 2020-12 that are taken are asked for too,
those that are refused are counted by the reason, and none of the suite's invalid values may be let through.
JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from common.timing import alternate, median, report, seconds

from llama import Llama, SamplingParams
from llama.answer import Query
from llama.constraints import ConstraintError, Constraints
from llama.model import ModelArgs, Transformer
from llama.tokenizer import Tokenizer

if TYPE_CHECKING:
    import jsonschema

NUM_ROWS, NUM_STEPS = 8, 16
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
        "address": {"type": ["string", "null"]},
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": PERSON, "minItems": 1000}


def random_model(vocab_size: int, dim: int, num_layers: int) -> Transformer:
    args = ModelArgs(
        dim=dim, n_layers=num_layers, n_heads=dim // 64, n_kv_heads=max(1, dim // 256), vocab_size=vocab_size,
        multiple_of=256, ffn_dim_multiplier=1.5, rope_theta=500000.0, max_seq_len=512, max_batch_size=NUM_ROWS,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = Transformer(args)
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight"):
            parameter.data.normal_(0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
    model.prepare()
    return model


def step_seconds(llm: Llama, **shape: object) -> float:
    """The median of a decoding step of 8 rows."""
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=1, ignore_eos=True, **shape).resolve()
    requests = [llm.engine.add(Query([1 + row, 2, 3], params)) for row in range(NUM_ROWS)]
    for _ in range(3):  # the prompts, and what is found out once
        llm.engine.step()
    taken = [seconds(llm.engine.step) for _ in range(NUM_STEPS)]
    assert llm.engine.stats().num_running == NUM_ROWS, "an answer has ended"
    for request in requests:
        llm.engine.abort(request)
    llm.engine.step()
    return median(taken)


def schema_of(num_properties: int, number: int) -> SamplingParams:
    kinds = (
        {"type": "string", "minLength": 1, "maxLength": 80},
        {"type": "integer", "minimum": 0, "maximum": 9999},
        {"type": "array", "items": {"type": "string"}, "maxItems": 8},
        {"enum": ["small", "medium", "large"]},
        {"anyOf": [{"type": "number"}, {"type": "null"}]},
    )
    properties = {f"field_{number}_{i}": kinds[i % len(kinds)] for i in range(num_properties)}
    return SamplingParams(json_schema={"type": "object", "properties": properties, "additionalProperties": False})


def longest_wait(work: threading.Thread) -> float:
    """How long this thread had to wait for another that works."""
    work.start()
    longest, last = 0.0, time.perf_counter()
    while work.is_alive():
        time.sleep(0.0005)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


def measure_costs(given: argparse.Namespace) -> dict[str, object]:
    tokenizer = Tokenizer(given.tokenizer)
    constraints = Constraints(tokenizer, tokenizer.n_words, tokenizer.stop_ids)
    building = threading.Thread(target=lambda: constraints.validate(SamplingParams(regex="a")))
    started = time.perf_counter()
    wait = longest_wait(building)
    built = time.perf_counter() - started
    numbers = iter(range(1000))
    compiling = [seconds(lambda: constraints.validate(schema_of(50, next(numbers)))) for _ in range(21)]
    llm = Llama(random_model(tokenizer.n_words, given.dim, given.layers), tokenizer)
    taken = alternate(
        given.rounds,
        plain=lambda: step_seconds(llm),
        constrained=lambda: step_seconds(llm, json_schema=ENDLESS),
    )
    plain, constrained = (median(taken[side]) * 1e3 for side in ("plain", "constrained"))
    ratio = median(b / a for a, b in zip(taken["plain"], taken["constrained"], strict=True))
    compile_ms = median(compiling[1:]) * 1e3
    print(
        f"a step of {NUM_ROWS} rows: {plain:.2f} ms, constrained {constrained:.2f} ms: {ratio:.3f} times (target 1.05)"
    )
    print(f"compiling 50 properties: {compile_ms:.1f} ms (target 50)")
    print(f"the vocabulary: {built:.2f} s, during which another thread waits for {wait * 1e3:.0f} ms at most")
    return {
        "plain_ms": plain,
        "constrained_ms": constrained,
        "ratio": ratio,
        "compile_ms": compile_ms,
        "vocabulary_s": built,
        "longest_wait_ms": wait * 1e3,
    }


def suite_cases(folder: Path) -> Iterator[dict[str, object]]:
    """The suite's schemas, but true and false, each with values that fit and others that do not."""
    for path in sorted((folder / "tests" / "draft2020-12").glob("*.json")):
        yield from (case for case in json.loads(path.read_text()) if isinstance(case["schema"], dict))


def measure_suite(folder: Path) -> tuple[list[dict[str, object]], dict[str, object]]:
    """The schemas that are taken, and what becomes of all of them and of the suite's values."""
    from support.tiny import ByteTokenizer

    tokenizer = ByteTokenizer()
    constraints = Constraints(tokenizer, tokenizer.n_words, tokenizer.stop_ids)
    taken: list[dict[str, object]] = []
    refused: Counter[str] = Counter()
    values: Counter[str] = Counter()
    for case in suite_cases(folder):
        params = SamplingParams(json_schema=case["schema"])
        try:
            constraints.validate(params)
        except ConstraintError as error:
            refused[str(error).removeprefix("json_schema: ")[:40]] += 1
            continue
        taken.append(case["schema"])
        for test in case["tests"]:
            fits = takes(constraints, tokenizer, params, json.dumps(test["data"], ensure_ascii=False))
            values[f"{'valid' if test['valid'] else 'invalid'} {'taken' if fits else 'refused'}"] += 1
    print(f"the suite: {len(taken)} schemas taken, {sum(refused.values())} refused; of its values {dict(values)}")
    print(f"refused: {dict(refused.most_common())}")
    return taken, {"suite_taken": len(taken), "suite_refused": sum(refused.values()), **values}


def takes(constraints: Constraints, tokenizer: Tokenizer, params: SamplingParams, text: str) -> bool:
    """Whether an answer can be this text, a byte a token, and end there."""
    matcher = constraints.matcher(params, tokenizer.stop_ids)
    for token in (*text.encode(), tokenizer.eos_id):
        if not matcher.allowed()[token >> 3] >> (token & 7) & 1:
            return False
        if token != tokenizer.eos_id:
            matcher.take(token)
    return True


def measure_answers(given: argparse.Namespace) -> dict[str, object]:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import jsonschema
    from support.schemas import SCHEMAS, drawn
    from support.tiny import ByteTokenizer, tiny_args, tiny_model
    from test_constraints import GRAMMARS, REGEXES

    schemas = drawn(SCHEMAS, given.schemas)
    suite, told = measure_suite(given.suite) if given.suite else ([], {})
    checks: list[tuple[str, dict[str, object], Callable[[str], object]]] = [
        (kind, {"json_schema": schema}, partial(is_valid, jsonschema.Draft202012Validator(schema)))
        for kind, found in (("generated", schemas), ("suite", suite))
        for schema in found
    ]
    checks += [("regex", {"regex": regex}, partial(re.fullmatch, regex)) for regex in REGEXES for _ in range(4)]
    checks += [
        ("grammar", {"grammar": grammar}, partial(re.fullmatch, same))
        for grammar, same in GRAMMARS.items()
        for _ in range(4)
    ]
    if given.tokenizer == "tiny":
        llm = Llama(tiny_model(tiny_args(max_batch_size=32, max_seq_len=2048)), ByteTokenizer(), chat_format="llama2")
    else:
        llm = Llama.build(given.tokenizer, max_seq_len=1024, max_batch_size=32)
    params = [
        SamplingParams(temperature=1.5, top_p=1.0, seed=seed, max_tokens=200, **shape)
        for seed, (_, shape, _) in enumerate(checks)
    ]
    dialogs = [
        [{"role": "user", "content": f"Give an example for {json.dumps(shape)}"[:600]}] for _, shape, _ in checks
    ]
    ends: dict[str, Counter[str]] = defaultdict(Counter)
    for completion, (kind, _, check) in zip(llm.chat(dialogs, params), checks, strict=True):
        is_whole = completion.finish_reason == "stop"
        ends[kind][("valid" if check(completion.text) else "INVALID") if is_whole else completion.finish_reason] += 1
    for kind, counts in ends.items():
        print(f"{kind}: {dict(counts)}")
    return {**told, **ends}


def is_valid(validator: jsonschema.protocols.Validator, text: str) -> bool:
    return validator.is_valid(json.loads(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", nargs="?", help="a vocabulary; with --answers a model")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--answers", action="store_true")
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--suite", type=Path, metavar="DIR")
    given = parser.parse_args()
    if not given.answers and given.tokenizer is None:
        parser.error("give the TOKENIZER, or --answers")
    torch.set_num_threads(given.threads)
    report(measure_answers(given) if given.answers else measure_costs(given))


if __name__ == "__main__":
    main()
