"""Guesses change how soon an answer comes, and nothing else."""

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import chain, product

import pytest
import torch
from support.engines import checked
from support.tiny import ByteTokenizer, tiny_args, tiny_model

from llama import SamplingParams
from llama.answer import Completion, Logprob, Query
from llama.attention import CompiledRows, rows_alone, short_span
from llama.cache import Span
from llama.drafters import Drafter, DraftModel, Guesses, Lookup
from llama.engine import Engine
from llama.runner import BLOCK_SIZE, Runner
from llama.scheduler import Scheduler
from llama.speculation import MOST_GUESSES, Outlook, Speculation, StepCosts

GREEDY = dict(temperature=0.0, ignore_eos=True)


class SameCosts:
    """Steps of any size take as long as each other: all guesses are tried."""

    single = 1.0

    def __call__(self, num_rows: int) -> float:
        return 1.0

    def record(self, num_rows: int, seconds: float, guessed: bool) -> None:
        pass


class Told:
    """Guesses what it was told will come, by the prompt's length; wrongly at some places, if at all."""

    odds = None

    def __init__(self, answers: dict[int, list[int]], wrong: float = 0.0):
        self.answers = answers
        self.wrong = wrong
        self.chance = random.Random(7)

    def propose(self, rooms):
        found = {}
        for choice, room in rooms.items():
            request = choice.request
            done = len(request.tokens) - request.num_prompt_tokens
            guesses = self.answers[request.num_prompt_tokens][done : done + room]
            guesses = [(g + 1) % 256 if self.chance.random() < self.wrong else g for g in guesses]
            found[choice] = Guesses(guesses, [0.99] * len(guesses))
        return found


def make_engine(
    drafter: Drafter | None = None,
    num_blocks: int = 64,
    deterministic: bool = False,
    shaken: bool = False,
    dtype: torch.dtype = torch.float32,
    **scheduling,
) -> Engine:
    """An engine that tries all guesses, and checks itself after each step."""
    model = tiny_model(tiny_args(max_seq_len=512)).to(dtype)
    model.prepare(BLOCK_SIZE if deterministic else None)
    engine = Engine(
        Runner(model, num_blocks, BLOCK_SIZE, dtype),
        Scheduler(num_blocks, BLOCK_SIZE, **scheduling),
        ByteTokenizer(),
        max_seq_len=256,
        seed=1,
        stop_ids=ByteTokenizer.stop_ids,
        drafter=drafter,
    )
    engine.speculation.costs = SameCosts()
    return checked(engine, random.Random(1), 0.3 * shaken)


def draft_model(seed: int, num_blocks: int = 64) -> DraftModel:
    """The tiny model itself, with seed 0, or another one."""
    model = tiny_model(tiny_args(max_seq_len=512), seed)
    return DraftModel(Runner(model, num_blocks, BLOCK_SIZE, torch.float32), model.vocab_size, 512, max_step_tokens=64)


def params(**fields) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 30, **fields}).resolve()


def answers(engine: Engine, *queries: tuple[list[int], SamplingParams]) -> list[list[Completion]]:
    """Each query's completions, whose tokens and texts are those of their events."""
    found: dict[tuple[int, int], Completion] = {}
    texts, tokens = defaultdict(str), defaultdict(list)
    for events in engine.run([Query(*query) for query in queries]):
        for event in events:
            key = event.request_id, event.index
            texts[key] += event.text
            tokens[key] += [] if event.token is None else [event.token]
            if event.completion is not None:
                found[key] = replace(event.completion, num_cached_tokens=0)
    assert all(
        found[key].text == text and found[key].tokens[-len(tokens[key]) :] == tokens[key] for key, text in texts.items()
    )
    return [[found[place, index] for index in range(query[1].n)] for place, query in enumerate(queries)]


def assert_same(found: list[list[Completion]], expected: list[list[Completion]]) -> None:
    """All but the last digits of logprobs, which depend on how many rows a product has."""
    for own, wanted in zip(chain.from_iterable(found), chain.from_iterable(expected), strict=True):
        assert replace(own, logprobs=None, prompt_logprobs=None) == replace(wanted, logprobs=None, prompt_logprobs=None)
        for name in ("logprobs", "prompt_logprobs"):
            assert flat(getattr(own, name)) == pytest.approx(flat(getattr(wanted, name)), abs=1e-4)


def flat(entries: list[Logprob | None] | None) -> list[float]:
    """The numbers of logprobs: each token's, and those of the likeliest in its place."""
    found = [entry for entry in entries or () if entry is not None]
    return [number for entry in found for number in (entry.logprob, *(value for _, value in entry.top))]


def repetitive(rng: random.Random, length: int) -> list[int]:
    words = [[rng.randrange(256) for _ in range(rng.randint(2, 5))] for _ in range(3)]
    return [token for _ in range(length) for token in rng.choice(words)][:length]


def mixed_queries(number: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts with repetitions, and all that a sampler can be asked for."""
    rng = random.Random(11)
    queries = []
    for i in range(number):
        max_tokens = rng.randint(1, 30)
        fields = dict(
            temperature=rng.choice([0.0, 0.0, 0.3, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            top_k=rng.choice([0, 5]),
            seed=rng.choice([None, i]),
            max_tokens=max_tokens,
            min_tokens=min(max_tokens, rng.choice([0, 4])),
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=tuple(rng.sample(range(256), 6)),
            stop=rng.choice([(), ("a",), ("e", "qu")]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            presence_penalty=rng.choice([0.0, 0.5]),
            frequency_penalty=rng.choice([0.0, 0.2]),
            logprobs=rng.choice([None, 0, 2]),
            prompt_logprobs=rng.choice([None, None, None, 0]),
            echo=rng.random() < 0.1,
            logit_bias=dict.fromkeys(rng.sample(range(256), 3), 30.0) if rng.random() < 0.5 else {},
            n=rng.choice([1, 1, 1, 2]),
        )
        queries.append((repetitive(rng, rng.randint(2, 50)), params(**fields)))
    return queries


FEW_AND_MANY = pytest.mark.parametrize("number", [24, pytest.param(200, marks=pytest.mark.slow)])
SITUATIONS = {
    "room for all": {"max_running": 16},
    "a small pool": {"num_blocks": 11, "max_running": 8},
    "preemption at random": {"num_blocks": 48, "max_running": 12, "shaken": True},
    "short chunks and steps": {"max_running": 12, "chunk": 5, "max_step_tokens": 24},
}


@pytest.fixture(scope="module")
def plain() -> Callable[[int], list[list[Completion]]]:
    """What the first so many of the mixed queries get without guesses."""
    return cache(lambda number: answers(make_engine(), *mixed_queries(number)))


# ---- equality


@FEW_AND_MANY
@pytest.mark.parametrize("situation", SITUATIONS)
def test_lookup_changes_no_answer(plain, situation, number):
    engine = make_engine(Lookup(), **SITUATIONS[situation])
    assert_same(answers(engine, *mixed_queries(number)), plain(number))
    stats = engine.stats()
    assert 10 < stats.num_accepted_tokens < stats.num_draft_tokens
    assert stats.num_preemptions > 0 or situation not in ("a small pool", "preemption at random")
    assert stats.num_referenced_blocks == 0


@FEW_AND_MANY
@pytest.mark.parametrize(("seed", "situation"), [(0, "room for all"), (0, "preemption at random"), (3, "a small pool")])
def test_a_draft_model_changes_no_answer(plain, situation, seed, number):
    options = SITUATIONS[situation]
    engine = make_engine(draft_model(seed, options.get("num_blocks", 64)), **options)
    assert_same(answers(engine, *mixed_queries(number)), plain(number))
    stats = engine.stats()
    assert stats.num_draft_tokens > 100
    if seed == 0:  # the model itself is never wrong, as long as all that it has stored is right
        assert stats.num_accepted_tokens == stats.num_draft_tokens
    else:
        assert stats.num_accepted_tokens < stats.num_draft_tokens


def test_with_deterministic_not_a_bit_changes():
    few = params(**GREEDY, logprobs=0, logit_bias={70: 30.0, 80: 30.0, 90: 30.0})
    queries = [(repetitive(random.Random(i), 20 + i), few) for i in range(3)]
    engine = make_engine(Lookup(), deterministic=True, dtype=torch.bfloat16)
    alone = [answers(make_engine(deterministic=True, dtype=torch.bfloat16), query)[0] for query in queries]
    assert answers(engine, *queries) == alone
    assert engine.stats().num_accepted_tokens > 0


# ---- what ends an answer, and what must not be guessed


def told(wrong: float = 0.0, max_tokens: int = 30, **fields) -> tuple[Engine, list[int]]:
    """An engine that guesses the tokens which it will answer to [1, 2, 3], and those."""
    [[plain]] = answers(make_engine(), ([1, 2, 3], params(**GREEDY, max_tokens=max_tokens)))
    return make_engine(Told({3: plain.tokens}, wrong), **fields), plain.tokens


def step_sizes(engine: Engine, max_tokens: int = 30) -> list[int]:
    """How many tokens each step brings of the answer to [1, 2, 3]."""
    engine.add(Query([1, 2, 3], params(**GREEDY, max_tokens=max_tokens)))
    sizes = []
    while engine.has_work:
        sizes.append(len(engine.step()))
    return sizes


@pytest.mark.parametrize("has_amx", [False, True])
def test_a_token_and_its_guesses_are_attended_row_by_row_at_any_context(monkeypatch, has_amx):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_amx})
    for dtype, context in product((torch.float32, torch.bfloat16), (100, 4096, 4097)):
        num_rows = min(MOST_GUESSES + 1, rows_alone(torch.device("cpu"), dtype)(context))
        span = Span(0, num_rows, context, ((0, context),))
        in_tiles = CompiledRows.plan([span], torch.arange(0), None, short=short_span(dtype)).tiles.spans
        assert num_rows >= 16
        assert not in_tiles  # else their bits would not be their own


def test_no_more_guesses_are_tried_than_keep_their_rows_bits():
    engine, _ = told()
    engine.speculation.rows_alone = lambda num_seen: 5
    assert step_sizes(engine) == [1, 5, 5, 5, 5, 5, 4]


def test_right_guesses_save_steps():
    engine, _ = told(max_tokens=50)
    sizes = step_sizes(engine, max_tokens=50)
    assert sizes == [1, 32, 17]  # the first brings the prompt; the last has no room for more
    assert engine.stats().num_draft_tokens == engine.stats().num_accepted_tokens == 31 + 16
    assert engine.stats().num_drafts == 2


@pytest.mark.parametrize("end", [dict(stop_token_ids=True), dict(stop=True), dict(max_tokens=6)])
def test_an_answer_ends_in_the_midst_of_right_guesses(end):
    engine, tokens = told()
    text = ByteTokenizer().decode(tokens)
    values = {"stop_token_ids": (tokens[5],), "stop": text[4:6], "max_tokens": 6}
    query = [1, 2, 3], params(**{**GREEDY, **{name: values[name] for name in end}})
    assert answers(engine, query) == answers(make_engine(), query)
    assert engine.stats().num_referenced_blocks == 0
    assert not engine.scheduler.running


def test_wrong_guesses_leave_nothing_that_a_later_request_finds():
    engine, tokens = told(wrong=0.4)
    [[first]] = answers(engine, ([1, 2, 3], params(**GREEDY)))
    assert first.tokens == tokens
    assert engine.stats().num_accepted_tokens < engine.stats().num_draft_tokens
    later = [1, 2, 3, *tokens, 9]
    engine.speculation.drafter = Lookup()
    request_id = engine.add(Query(later, params(**GREEDY)))
    [choice] = engine._open[request_id]
    while engine.has_work:
        engine.step()
    assert choice.request.num_cached_tokens == 32
    assert [choice.tokens] == [c.tokens for c in answers(make_engine(), (later, params(**GREEDY)))[0]]


def test_a_request_is_ended_between_steps_that_guess():
    engine, tokens = told(wrong=0.3)
    first, second = (engine.add(Query([1, 2, 3], params(**GREEDY))) for _ in range(2))
    events = engine.step() + engine.step()
    engine.abort(first)
    while engine.has_work:
        events += engine.step()
    assert [event.token for event in events if event.request_id == second and event.token is not None] == tokens
    assert [event.finish_reason for event in events if event.request_id == first][-1] == "abort"
    assert engine.stats().num_referenced_blocks == 0


def test_choices_of_one_prompt_are_guessed_when_each_has_a_request_of_its_own():
    query = repetitive(random.Random(5), 40), params(temperature=0.7, seed=2, n=3, ignore_eos=True, max_tokens=40)
    engine = make_engine(draft_model(seed=0))
    assert answers(engine, query) == answers(make_engine(), query)
    assert engine.stats().num_accepted_tokens == engine.stats().num_draft_tokens > 0


@pytest.mark.parametrize(
    "fields",
    [
        dict(regex="[a-z]{4,9}( [a-z]{2,5}){2,9}"),
        dict(logits_processors=(lambda tokens, logits: logits + len(tokens) % 2,)),
    ],
    ids=["a constraint", "a processor"],
)
def test_what_may_have_a_state_is_not_guessed(fields):
    engine, _ = told()
    engine.speculation.drafter.answers[3] = [97] * 40
    query = [1, 2, 3], params(temperature=1.0, seed=1, **fields)
    assert answers(engine, query) == answers(make_engine(), query)
    assert engine.stats().num_draft_tokens == 0
    engine.speculation.drafter.answers[3] = [97] * 40
    answers(engine, ([1, 2, 3], params(temperature=1.0, seed=1)))
    assert engine.stats().num_draft_tokens > 0


def test_nothing_is_guessed_in_a_step_that_reads_a_prompt():
    engine, _ = told(max_step_tokens=16)
    engine.add(Query([1, 2, 3], params(**GREEDY)))
    engine.step()
    engine.add(Query(list(range(100, 180)), params(**GREEDY, max_tokens=1)))
    sizes = [len(engine.step()) for _ in range(7)]
    assert sizes[:5] == [1] * 5
    assert max(sizes) == 16


def test_prompts_of_one_token_may_ask_for_a_vector_or_several_answers():
    engine = make_engine(Lookup())
    engine.speculation.costs = StepCosts()
    several = params(temperature=1.0, seed=3, n=3, max_tokens=5)
    for _ in range(4):
        engine.add(Query([7], params(max_tokens=1), pooling="mean"))
        events = engine.step()
        assert events[-1].completion.embedding
    assert answers(engine, ([7], several)) == answers(make_engine(), ([7], several))


# ---- what pays


def paying(costs: dict[int, float]) -> tuple[Speculation, object]:
    speculation = Speculation(Lookup())
    show(speculation.costs, costs)
    return speculation, Named()


def show(seen: StepCosts, costs: dict[int, float]) -> None:
    """Steps that take so long, each size three times between plain ones."""
    for num_rows, cost in [*costs.items()] * 3:
        for _ in range(3):
            seen.record(1, costs[1], guessed=False)
        seen.record(num_rows, cost, guessed=num_rows > 1)


class Named:
    """Stands for a choice."""


FLAT = {1: 1.0, 2: 1.01, 3: 1.1, 4: 1.17, 5: 1.34, 6: 1.44, 8: 2.06}
STEEP = {1: 1.0, 2: 1.79, 3: 2.39, 4: 2.09, 5: 2.19, 6: 2.26, 8: 2.29}


@pytest.mark.parametrize(
    ("costs", "odds", "expected"),
    [
        (FLAT, 0.05, 0),
        (FLAT, 0.3, 1),
        (FLAT, 0.6, 3),
        (FLAT, 0.95, 5),
        (STEEP, 0.5, 0),
        (STEEP, 0.7, 7),
        (STEEP, 0.95, 7),
    ],
)
def test_as_many_are_tried_as_make_tokens_come_fastest(costs, odds, expected):
    speculation, choice = paying(costs)
    assert speculation._fit(1, {choice: [odds] * 7}) == ({choice: expected} if expected else {})


def test_the_likeliest_guesses_of_all_choices_come_first():
    speculation, sure = paying({1: 1.0, 2: 1.0, 3: 1.05, 4: 1.1, 5: 1.6, 8: 3.0})
    assert speculation._fit(2, {Named(): [0.3] * 7, sure: [0.9] * 7}) == {sure: 2}


def test_a_slow_drafter_is_asked_for_less():
    speculation, choice = paying(FLAT)
    counts = [speculation._fit(1, {choice: [0.8] * 7}, round_cost).get(choice, 0) for round_cost in (0.0, 0.2, 0.9)]
    assert counts[0] > counts[1] > counts[2] == 0


def test_costs_are_found_whatever_else_the_machine_does():
    chance, costs = random.Random(2), StepCosts()
    for step in range(400):
        busy = 4.0 if step // 40 % 2 else 1.0  # for a while
        size = chance.choice([1, 1, 1, 1, 2, 8])
        seconds = 0.02 * STEEP[size] * busy * chance.lognormvariate(0, 0.3) * (1 + step / 400)
        costs.record(size, seconds, guessed=size > 1)
    assert costs(1) == 1.0
    assert costs(2) == pytest.approx(STEEP[2], rel=0.2)
    assert costs(8) == pytest.approx(STEEP[8], rel=0.2)
    assert costs(2) < costs(4) < costs(5) < costs(8)  # between what was seen
    assert costs(16) == pytest.approx(1.8 * costs(8))


def test_a_size_that_was_dear_once_is_tried_again_after_a_while():
    costs = StepCosts()
    show(costs, {1: 1.0, 4: 20.0})
    assert costs(4) == pytest.approx(20.0)
    for _ in range(2 * StepCosts.FOREVER):
        costs.record(1, 1.0, guessed=False)
    assert costs(4) < 2


def test_odds_follow_what_comes_whether_it_was_tried_or_not():
    outlook = Outlook()
    assert outlook.odds(0.4) == pytest.approx(0.4)
    for _ in range(20):
        outlook.guesses = Guesses([5, 6, 7], [0.4] * 3)
        outlook.judge([5])  # of three guesses none was tried
    assert outlook.odds(0.4) > 0.9
    for _ in range(20):
        outlook.guesses = Guesses([5, 6, 7], [0.4] * 3)
        outlook.judge([6])
    assert outlook.odds(0.4) < 0.1 < outlook.odds(0.9)
    for _ in range(500):
        outlook.judge([1])
    assert outlook.odds(0.4) == pytest.approx(0.4, abs=0.01)


def test_what_was_to_be_expected_changes_no_odds():
    outlook, often = Outlook(), random.Random(3)
    for _ in range(2000):
        usual = often.choice([0.3, 0.6, 0.9])
        outlook.guesses = Guesses([5], [usual])
        outlook.judge([5 if often.random() < usual else 6])
    assert abs(outlook.more) < 1.5


def test_guesses_that_do_not_pay_are_not_tried():
    engine, tokens = told(wrong=1.0)
    engine.speculation.costs = StepCosts()
    show(engine.speculation.costs, STEEP)
    engine.speculation.costs.record = lambda num_rows, seconds, guessed: None
    [[completion]] = answers(engine, ([1, 2, 3], params(**GREEDY)))
    assert completion.tokens == tokens
    assert 0 < engine.stats().num_draft_tokens < 60  # of some 200: until the odds are known


def test_now_and_then_a_step_is_plain_to_compare_others_with():
    engine, _ = told()
    engine.speculation.costs = costs = StepCosts()
    answers(engine, ([1, 2, 3], params(**GREEDY)))
    assert [rows for _, rows, _ in costs._plain] == [1, 1, 1]  # then 16 rows at a time
    assert costs.single is not None
    for _ in range(StepCosts.LATELY):
        costs.record(8, 1.0, guessed=True)
    assert costs.single is None


def test_a_batch_is_compared_with_steps_of_its_own_size():
    costs = StepCosts()
    for size in [1] * 9 + [4] * 200:
        costs.record(size, {1: 1.0, 4: 2.0}[size], guessed=False)
    assert costs(4) == pytest.approx(2.0)
    for _ in range(3):
        costs.record(12, 5.0, guessed=True)
    assert costs(12) / costs(4) == pytest.approx(2.5)
