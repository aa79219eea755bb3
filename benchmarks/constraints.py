"""What answers with a shape cost: a decoding step of 8 rows with constraints beside one without, and compiling.

    python benchmarks/constraints.py TOKENIZER [--layers 16] [--dim 2048] [--rounds 7]
    python benchmarks/constraints.py --answers [MODEL]

TOKENIZER is a vocabulary of Llama 3's (128,256 ids); the model has Llama 3.2 1B's shape, or as many layers as given,
and random bfloat16 weights (2.5 GB). Every row of the constrained side writes JSON of a schema that never ends. Both
sides take 16 steps by turns; medians of a step, and their ratio. Then how long it takes to compile a schema of 50
properties which was not seen before, and to make llguidance's vocabulary of ours, once a model, with the longest time
that another thread had to wait for it.

With --answers it is counted instead how many answers of MODEL (left out: the default one) at temperature 1.5 are valid
for 200 generated schemas; it needs what the tests need. JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path

import torch
from common.timing import alternate, median, report, seconds

from llama import Llama, SamplingParams
from llama.answer import Query
from llama.constraints import Constraints
from llama.model import ModelArgs, Transformer
from llama.tokenizer import Tokenizer

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


def measure_answers(given: argparse.Namespace) -> dict[str, object]:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import jsonschema
    from support.schemas import SCHEMAS, drawn

    llm = Llama.build(given.tokenizer, max_seq_len=512, max_batch_size=32)
    schemas = drawn(SCHEMAS, given.schemas)
    params = [
        SamplingParams(temperature=1.5, top_p=1.0, seed=seed, max_tokens=200, json_schema=schema)
        for seed, schema in enumerate(schemas)
    ]
    dialogs = [[{"role": "user", "content": f"Give an example for {json.dumps(schema)}"[:600]}] for schema in schemas]
    ends: dict[str, int] = {}
    for completion, schema in zip(llm.chat(dialogs, params), schemas, strict=True):
        end = completion.finish_reason
        if end == "stop":
            is_valid = jsonschema.Draft202012Validator(schema).is_valid(json.loads(completion.text))
            end = "valid" if is_valid else "invalid"
        ends[end] = ends.get(end, 0) + 1
    print(f"{given.schemas} schemas: {ends}")
    return {"schemas": given.schemas, **ends}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", nargs="?", help="a vocabulary; with --answers a model")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--answers", action="store_true")
    parser.add_argument("--schemas", type=int, default=200)
    given = parser.parse_args()
    if not given.answers and given.tokenizer is None:
        parser.error("give the TOKENIZER, or --answers")
    torch.set_num_threads(given.threads)
    report(measure_answers(given) if given.answers else measure_costs(given))


if __name__ == "__main__":
    main()
