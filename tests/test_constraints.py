"""Answers with a shape: whatever a model would say, what it says fits, and nobody else notices."""

import json
import random
import re
from dataclasses import replace

import jsonschema
import pytest
import torch
from llguidance import LLParserLimits
from support.constrained import random_answer
from support.schemas import SCHEMAS, drawn
from support.tiny import ByteTokenizer, tiny_args, tiny_model
from support.vocabularies import NAMES, SMOLLM2, make_files, package_file

from llama import Llama, SamplingParams
from llama import constraints as module
from llama.answer import Completion, Query
from llama.constraints import ConstraintError, Constraints
from llama.runner import BLOCK_SIZE
from llama.sampling_params import SamplingError
from llama.tokenizer import Tokenizer

WILD = dict(temperature=1.5, top_p=1.0, seed=7, max_tokens=160)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
REGEXES = ["[0-9]{3}-[a-f]{2}", "(yes|no)!?", "a(b|c)*d", "[^x]{1,9}", "[0-9]+\\.[0-9]{2}", "(?i)hello|world", "é+ñ?"]
LOSSY = ("nfkc", "gguf of nfkc")  # they drop more than one space in front, and lack most characters
GRAMMARS = {
    'root ::= "f(" arg ("," arg)* ")"\narg ::= [0-9]+ | "x"': r"f\((\d+|x)(,(\d+|x))*\)",
    'start: "f(" arg ("," arg)* ")"\narg: /[0-9]+/ | "x"': r"f\((\d+|x)(,(\d+|x))*\)",
    'root ::= "ab" "c"?': "abc?",
}
FEW_AND_MANY = pytest.mark.parametrize("number", [24, pytest.param(200, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def llm() -> Llama:
    return Llama(tiny_model(tiny_args(max_batch_size=32, max_seq_len=512)), ByteTokenizer(), chat_format="llama2")


@pytest.fixture(scope="module")
def constraints() -> Constraints:
    return Constraints(ByteTokenizer(), 264, ByteTokenizer.stop_ids)


def wild(**shape: object) -> SamplingParams:
    return SamplingParams(**{**WILD, **shape})


def assert_valid(text: str, schema: dict) -> None:
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def takes(constraints: Constraints, text: str, **shape: object) -> bool:
    """Whether an answer can be this text, and end there."""
    stop_ids = ByteTokenizer.stop_ids
    matcher = constraints.matcher(wild(**shape), stop_ids)
    for byte in text.encode():
        bits = matcher.allowed()
        if not bits[byte >> 3] >> (byte & 7) & 1:
            return False
        matcher.take(byte)
    bits = matcher.allowed()
    return any(bits[id >> 3] >> (id & 7) & 1 for id in stop_ids)


# ---- what is asked for is what comes


@FEW_AND_MANY
def test_every_answer_of_a_wild_model_is_what_its_schema_describes(llm, number):
    schemas = drawn(SCHEMAS, number)
    params = [wild(json_schema=schema, seed=seed) for seed, schema in enumerate(schemas)]
    completions = llm.complete(["Tell me."] * number, params)
    finished = [(c, schema) for c, schema in zip(completions, schemas, strict=True) if c.finish_reason != "length"]
    assert len(finished) > 0.8 * number
    for completion, schema in finished:
        assert completion.finish_reason == "stop", (completion.error, schema)
        assert_valid(completion.text, schema)


@pytest.mark.parametrize("regex", REGEXES)
def test_the_whole_answer_matches_its_regular_expression(llm, regex):
    for completion in llm.complete(["Tell me."], wild(regex=regex, n=4)):
        assert completion.finish_reason == "length" or re.fullmatch(regex, completion.text)
        assert completion.finish_reason in ("stop", "length")


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_an_answer_is_a_text_of_its_grammar(llm, grammar):
    for completion in llm.complete(["Tell me."], wild(grammar=grammar, n=4)):
        assert completion.finish_reason == "stop"
        assert re.fullmatch(GRAMMARS[grammar], completion.text)


# Of each keyword: a schema, and values of which some fit and others do not.
KEYWORDS = {
    "type": ({"type": ["integer", "null"]}, [1, None, "x", 1.5, [], {}, True]),
    "enum": ({"enum": [1, "a", [None], {"k": 2}]}, [1, "a", [None], {"k": 2}, 2, "b", []]),
    "const": ({"const": {"a": [1, True]}}, [{"a": [1, True]}, {"a": [1]}, {}]),
    "properties": ({"type": "object", "properties": {"a": {"type": "integer"}}}, [{"a": 1}, {"a": "x"}, {}, {"b": 1}]),
    "required": ({"type": "object", "required": ["a", "b"]}, [{"a": 1, "b": 2}, {"a": 1}, {}]),
    "additionalProperties": (
        {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "null"}},
        [{"a": 1}, {"a": 1, "b": None}, {"b": 1}],
    ),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^i_": {"type": "integer"}}, "additionalProperties": False},
        [{"i_a": 1}, {"i_a": "x"}, {"other": 1}, {}],
    ),
    "minProperties": ({"type": "object", "minProperties": 1}, [{"a": 1, "b": 2}, {"a": 1}, {}]),
    "maxProperties": ({"type": "object", "maxProperties": 1}, [{}, {"a": 1}, {"a": 1, "b": 2}]),
    "items": ({"type": "array", "items": {"type": "boolean"}}, [[], [True, False], [1]]),
    "prefixItems": ({"prefixItems": [{"type": "null"}], "items": False}, [[None], [1], [None, 1]]),
    "minItems": ({"type": "array", "minItems": 2}, [[1, 2], [1], []]),
    "maxItems": ({"type": "array", "maxItems": 1}, [[], [1], [1, 2]]),
    "uniqueItems": ({"type": "array", "uniqueItems": False}, [[1, 1], 1]),
    "minLength": ({"type": "string", "minLength": 2}, ["ab", "\n\t", "a", "", "😀", "😀é"]),
    "maxLength": ({"type": "string", "maxLength": 2}, ["ab", "abc", "😀é", '"\\'],),
    "pattern": ({"type": "string", "pattern": "^a+b"}, ["ab", "aabc", "b", "xab"]),
    "minimum": ({"type": "integer", "minimum": -3}, [-3, 0, 1000, -4]),
    "maximum": ({"type": "number", "maximum": 2.5}, [2.5, -7, 2.51, 3]),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 3}, [4, 3, 2]),
    "exclusiveMaximum": ({"type": "number", "exclusiveMaximum": 0.5}, [0.25, 0.5, 0.75]),
    "multipleOf": ({"type": "integer", "multipleOf": 4}, [8, 0, 6, -4]),
    "anyOf": ({"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 5}]}, ["x", 5, 4, None]),
    "allOf": ({"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 4}]}, [2, 4, 1, 5, "x"]),
    "oneOf": ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, ["x", 5, None]),
    "$ref": (
        {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}},
        [[], [[], [[]]], [1]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_a_keyword_lets_through_what_it_describes_and_nothing_else(constraints, keyword):
    schema, values = KEYWORDS[keyword]
    valid = [jsonschema.Draft202012Validator(schema).is_valid(value) for value in values]
    assert True in valid
    for value, is_valid in zip(values, valid, strict=True):
        for text in (json.dumps(value, ensure_ascii=False), json.dumps(value, ensure_ascii=False, indent=2)):
            assert takes(constraints, text, json_schema=schema) == is_valid, text


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "object", "properties": {"a": {"not": {"type": "null"}}}}, "not is not supported"),
        ({"if": {}, "then": {}}, "if, then is not supported"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems is not supported"),
        ({"type": "array", "contains": {}}, "contains is not supported"),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames is not supported"),
        ({"unevaluatedProperties": False}, "unevaluatedProperties is not supported"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired is not supported"),
        ({"type": "string", "format": "iri"}, "Unknown format: iri"),
        ({"type": "text"}, "Invalid type: text"),
        ({"$ref": "https://example.com/schema.json"}, "https://example.com/schema.json"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "integer", "minimum": 5, "maximum": 2}, "minimum (5) is greater than maximum (2)"),
        ({"type": "object", "minProperties": 2}, "minProperties 2 is not supported beside additionalProperties"),
    ],
)
def test_a_keyword_that_is_not_supported_is_refused_by_its_name(constraints, schema, named):
    with pytest.raises(ConstraintError) as refused:
        constraints.validate(wild(json_schema=schema))
    assert named in str(refused.value)
    assert refused.value.param == "json_schema"
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (dict(regex="(?=a)b"), "look-around"),
        (dict(regex="a{1"), "regex"),
        (dict(grammar='start: "a'), "grammar"),
        (dict(grammar='root ::= "a'), "line 1"),
        (dict(grammar="start: nowhere"), "nowhere"),
        (dict(grammar="start: start"), "no text can satisfy it"),
        (dict(grammar="start: <|secret|>"), "unknown special token"),
        (dict(grammar="a" * 70_000), "70000 characters, at most 65536"),
        (dict(json_schema="[" * 70 + "]" * 70), "a JSON schema"),
        (dict(json_schema={"enum": ["x" * 70_000]}), "characters, at most 65536"),
    ],
)
def test_what_cannot_be_a_constraint_is_refused_in_one_short_line(llm, shape, said):
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        llm.complete(["a"], wild(**shape))
    [name] = shape
    assert str(refused.value).startswith(name)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


def test_a_deeply_nested_schema_is_refused(constraints):
    schema: dict = {}
    for _ in range(100):
        schema = {"properties": {"a": schema}}
    with pytest.raises(ConstraintError, match="nested more than 64 deep"):
        constraints.validate(wild(json_schema=schema))


def chained(num: int, rule: str, last: str) -> str:
    """Rules in Lark, each of which needs the next."""
    rules = [f"{rule[0]}{i}: {rule.replace('NEXT', f'{rule[0]}{i + 1}')[1:]}" for i in range(num)]
    return "\n".join([f"start: {rule[0]}0", *rules, f"{rule[0]}{num}: {last}"])


def referring(num: int) -> dict:
    """A schema whose references lead to one another."""
    links = {f"{i}": {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(num)}
    return {"$ref": "#/$defs/0", "$defs": {**links, f"{num}": {}}}


def test_long_chains_of_rules_and_references_do_not_end_the_process(constraints):
    """They did: llguidance descends them by recursion, and its stack was full at some thousand."""
    assert takes(constraints, "a", grammar=chained(3800, "rNEXT", '"a"'))
    assert takes(constraints, "a", grammar=chained(3800, "TNEXT", '"a"'))
    assert not takes(constraints, "a", grammar=chained(2900, 'rNEXT "b"', '"a"'))
    assert takes(constraints, "[[]]", json_schema=referring(1300))


@pytest.mark.parametrize(
    "shape",
    [
        *(dict(regex=start * 20_000 + "a" + end * 20_000) for start, end in ("()", "[]")),
        *(dict(grammar="start: " + s * 20_000 + '"a"' + e * 20_000) for s, e in ("()", "[]", ("~", ""))),
        dict(grammar="start: A\nA: " + "(" * 20_000 + '"a"' + ")" * 20_000),
        dict(grammar="root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000),
        dict(grammar="start: %json " + '{"items":' * 5000 + "{}" + "}" * 5000),
        dict(json_schema={"pattern": "(" * 20_000 + "a" + ")" * 20_000, "type": "string"}),
    ],
)
def test_brackets_without_end_are_refused(constraints, shape):
    with pytest.raises(ConstraintError) as refused:
        constraints.validate(wild(**shape))
    assert len(str(refused.value)) < 300


def test_one_constraint_at_most_is_given():
    with pytest.raises(SamplingError, match="regex must be left out beside json_schema"):
        SamplingParams(json_schema={}, regex="a")


def test_a_schema_is_the_same_as_a_mapping_and_as_text_and_keeps_its_order():
    schema = {"z": 1, "a": {"y": "é", "b": 2}}
    assert SamplingParams(json_schema=schema) == SamplingParams(json_schema=json.dumps(schema, indent=3))
    assert list(json.loads(SamplingParams(json_schema=schema).json_schema)) == ["z", "a"]


# ---- every vocabulary


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory) -> dict[str, Tokenizer]:
    files = make_files(tmp_path_factory.mktemp("vocabularies")) | {"smollm2": package_file(*SMOLLM2)}
    return {name: Tokenizer(path) for name, path in files.items()}


@pytest.mark.parametrize("name", [*NAMES, "smollm2"])
def test_the_text_of_an_answer_fits_with_every_kind_of_vocabulary(vocabularies, name):
    tokenizer, chance = vocabularies[name], random.Random(5)
    constraints = Constraints(tokenizer, tokenizer.n_words + 37, tokenizer.stop_ids)
    for regex in ("[a-z ]{1,9}!", " [a-z]{2}", "(ab|é|hello) ?[a-f]{1,3}", "[^\\n]{1,4}"):
        for _ in range(4):
            text = random_answer(constraints, tokenizer, chance, wild(regex=regex))
            assert name in LOSSY or re.fullmatch(regex, text), (regex, text)
    if name in LOSSY:
        with pytest.raises(ConstraintError, match=r"the vocabulary cannot spell b'\{'"):
            constraints.validate(wild(json_schema=PERSON))
        return
    for _ in range(3):
        assert_valid(random_answer(constraints, tokenizer, chance, wild(json_schema=PERSON)), PERSON)


# ---- how an answer ends


@pytest.mark.parametrize("more", [dict(min_tokens=30), dict(ignore_eos=True), dict(min_tokens=30, ignore_eos=True)])
def test_a_complete_answer_ends_whatever_else_was_asked_for(llm, more):
    [completion] = llm.complete(["a"], wild(regex="(true|false)", **more))
    assert (completion.text in ("true", "false"), completion.finish_reason) == (True, "stop")
    [completion] = llm.complete(["a"], wild(regex="", **more))
    assert (completion.text, completion.finish_reason) == ("", "stop")


@pytest.mark.parametrize("more", [dict(min_tokens=20), dict(ignore_eos=True)])
def test_an_answer_that_could_go_on_does_so_where_it_was_asked_to(llm, more):
    bias = {257: 1e9}  # it would stop at once
    [stopping] = llm.complete(["a"], wild(regex="a*", logit_bias=bias))
    [going_on] = llm.complete(["a"], wild(regex="a*", logit_bias=bias, **more))
    assert (stopping.text, stopping.finish_reason) == ("", "stop")
    assert going_on.text.startswith("a" * 20)


def test_an_answer_may_end_at_a_token_of_its_own_where_its_grammar_lets_it(llm):
    [completion] = llm.complete(["a"], wild(regex="[ab]*", stop_token_ids=(200,), logit_bias={200: 1e9}))
    assert (completion.text, completion.finish_reason) == ("", "stop")
    [completion] = llm.complete(["a"], wild(regex="[ab]{3}c*", stop_token_ids=(200,), logit_bias={200: 1e9}))
    assert (len(completion.text), completion.finish_reason) == (3, "stop")


def test_a_bias_or_a_processor_does_not_lift_a_constraint(llm):
    def only_x(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -100.0).index_fill(0, torch.tensor([ord("x")]), 100.0)

    params = wild(regex="[0-9]{4}", logit_bias={ord("x"): 1e9}, logits_processors=(only_x,))
    assert re.fullmatch("[0-9]{4}", llm.complete(["a"], params)[0].text)


def test_ids_beyond_the_vocabulary_and_control_tokens_are_never_allowed(constraints):
    matcher = constraints.matcher(wild(regex="(?s:.*)"), ())
    bits = matcher.allowed()
    assert [id for id in range(264) if bits[id >> 3] >> (id & 7) & 1] == [*range(0x80), *range(0xC2, 0xF5)]


# ---- nobody else notices


def answers(engine_llm: Llama, *requests: tuple[str, SamplingParams]) -> list[Completion]:
    queries = [Query(list(prompt.encode()), params.resolve()) for prompt, params in requests]
    completions = sorted(engine_llm.run(queries), key=lambda c: (c.place, c.index))
    assert engine_llm.engine.stats().num_referenced_blocks == 0
    return completions


DEAD = 'start: "a" tail\ntail: tail "b"'
ENDLESS = "start: e\ne: e e | /[ab]/"


def test_a_constraint_that_explodes_ends_its_own_answer_and_no_other(monkeypatch):
    monkeypatch.setattr(module, "LIMITS", LLParserLimits(max_lexer_states=60, verbose_errors=False))
    monkeypatch.setattr(module, "SLOW", 0.0)
    monkeypatch.setattr(module, "MOST_SECONDS", 0.05)
    llm = Llama(tiny_model(tiny_args(max_batch_size=32, max_seq_len=512)), ByteTokenizer(), chat_format="llama2")
    plain = ("hello", SamplingParams(**WILD, logprobs=1))
    [alone] = answers(llm, plain)
    exploding, dead, endless, beside = answers(
        llm,
        ("x", wild(regex="((a|b)*a(a|b){300}){50}")),
        ("x", wild(grammar=DEAD)),
        ("x", replace(wild(grammar=ENDLESS, ignore_eos=True), max_tokens=400)),
        plain,
    )
    assert exploding.error == "the constraint failed: lexer error: too many states: 60 >= 60"
    assert (dead.text, dead.error) == ("a", "the constraint failed: no text can satisfy it")
    assert endless.error == "the constraint takes too long: make it less ambiguous"
    assert {exploding.finish_reason, dead.finish_reason, endless.finish_reason} == {"error"}
    assert beside.tokens == alone.tokens
    assert answers(llm, plain)[0].tokens == alone.tokens
    assert answers(llm, ("x", wild(regex="(yes|no)")))[0].finish_reason == "stop"


def test_an_answer_without_a_constraint_has_the_same_bits_beside_one_with(monkeypatch):
    monkeypatch.setattr(module, "LIMITS", LLParserLimits(max_lexer_states=60, verbose_errors=False))
    model = tiny_model(tiny_args(max_batch_size=32))
    model.prepare(BLOCK_SIZE)
    llm = Llama(model, ByteTokenizer(), chat_format="llama2")
    plain = [(f"prompt {i}", SamplingParams(**{**WILD, "seed": i, "max_tokens": 40}, logprobs=3)) for i in range(4)]
    alone = answers(llm, *plain)
    shaped = [("x", wild(json_schema=PERSON, seed=i)) for i in range(4)]
    shaped[1:3] = ("x", wild(grammar=DEAD)), ("x", wild(regex="((a|b)*a(a|b){300}){50}"))
    assert answers(llm, *[one for pair in zip(plain, shaped, strict=True) for one in pair])[::2] == alone


def test_each_of_n_answers_stands_in_a_constraint_of_its_own(llm):
    together = llm.complete(["Who?"], wild(json_schema=PERSON, n=8))
    assert len({completion.text for completion in together}) > 1
    for completion in together:
        assert_valid(completion.text, PERSON)


def test_a_preempted_answer_goes_on_where_it_stood():
    def run(shaken: bool) -> list[Completion]:
        llm = Llama(tiny_model(tiny_args(max_batch_size=32)), ByteTokenizer(), chat_format="llama2")
        step, chance, scheduler = llm.engine.step, random.Random(1), llm.engine.scheduler

        def shaken_step() -> list:
            if shaken and scheduler.running and chance.random() < 0.5:
                scheduler.preempt(chance.choice(scheduler.running))
            return step()

        llm.engine.step = shaken_step
        found = answers(llm, *[("x", wild(json_schema=PERSON, seed=i)) for i in range(4)])
        assert bool(scheduler.stats().num_preemptions) == shaken
        return found

    assert run(shaken=True) == run(shaken=False)


def test_an_answer_that_is_left_leaves_nothing_behind(llm):
    stream = llm.stream(Query([1, 2, 3], wild(regex="a*", ignore_eos=True).resolve()))
    for _ in range(5):
        next(stream)
    stream.close()
    assert [c.finish_reason for c in answers(llm, ("x", wild(regex="(a|b)")))] == ["stop"]


# ---- guesses


@pytest.mark.parametrize("shape", [dict(json_schema=PERSON), dict(regex="(abc|abd)e?")])
def test_masks_behind_guesses_are_those_of_an_answer_that_took_them(constraints, shape):
    chance = random.Random(2)
    ahead, taken = (constraints.matcher(wild(**shape), ByteTokenizer.stop_ids) for _ in range(2))
    while not taken.is_complete:
        allowed = [id for id in range(256) if taken.allowed()[id >> 3] >> (id & 7) & 1]
        token = chance.choice(allowed)
        before = ahead.allowed()
        guessed = ahead.allowed([token])
        assert ahead.allowed([255]) == before  # a guess that cannot be right moves nothing
        assert ahead.allowed() == before
        taken.take(token)
        assert guessed == taken.allowed()
        ahead.take(token)
    assert ahead.is_complete


# ---- compiled once


def test_a_constraint_is_compiled_once_and_kept(llm, monkeypatch):
    compiled = []
    compile = Constraints._matcher
    monkeypatch.setattr(
        Constraints, "_matcher", lambda self, kind, *rest: compiled.append(kind) or compile(self, kind, *rest)
    )
    params = wild(regex="kept[0-9]")
    llm.complete(["a", "b"], params)
    llm.complete(["c"], replace(params, n=3))
    assert compiled == ["regex"]


def test_a_query_is_compiled_where_it_is_validated_and_without_the_engines_lock(llm):
    with llm.engine._lock:  # as while a step runs
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as pool:
            query = Query([1], wild(regex="elsewhere[0-9]").resolve())
            pool.submit(llm.validate, query).result(10)
