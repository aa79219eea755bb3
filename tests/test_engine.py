import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakSet

import pytest
import torch
from support import slow
from support.engines import checked
from support.tiny import ByteTokenizer, tiny_args, tiny_model, tiny_weights

from llama.answer import Event, Query
from llama.choice import StopText
from llama.engine import Engine
from llama.request import Slice, Step
from llama.rotary import DynamicScaling
from llama.runner import BLOCK_SIZE, Pack, Runner
from llama.sampling import SamplingParams
from llama.scheduler import Scheduler

GREEDY = dict(temperature=0.0, ignore_eos=True)


def make_engine(
    seed: int = 1,
    num_blocks: int = 64,
    dtype: torch.dtype = torch.float32,
    deterministic: bool = False,
    shaken: bool = False,
    shape: dict | None = None,
    **scheduling,
) -> Engine:
    model = tiny_model(tiny_args(max_seq_len=512, **shape or {})).to(dtype)
    model.prepare(BLOCK_SIZE if deterministic else None)
    engine = Engine(
        Runner(model, num_blocks, BLOCK_SIZE, dtype),
        Scheduler(num_blocks, BLOCK_SIZE, **scheduling),
        ByteTokenizer(),
        max_seq_len=256,
        seed=seed,
        stop_ids=ByteTokenizer.stop_ids,
    )
    return checked(engine, random.Random(seed), 0.5 * shaken)


def params(**fields) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, **fields}).resolve()


def events_of(engine: Engine, *requests: tuple[list[int], SamplingParams]) -> Iterator[Event]:
    """The requests' events; `request_id` is the place among the requests."""
    for events in engine.run([Query(*request) for request in requests]):
        yield from events


def run(engine: Engine, *requests: tuple[list[int], SamplingParams]) -> list[list[list[int]]]:
    """For each request, each choice's tokens."""
    tokens = [[[] for _ in range(p.n)] for _, p in requests]
    for event in events_of(engine, *requests):
        if event.token is not None:
            tokens[event.request_id][event.index].append(event.token)
    return tokens


def prompts(number: int) -> list[list[int]]:
    return [[(31 * i + 7 * j * j) % 256 for j in range(3 + 11 * i % 60)] for i in range(number)]


def test_greedy_tokens_equal_a_slow_implementation():
    args = tiny_args()
    weights = tiny_weights(args)
    batch = prompts(6)
    found = run(make_engine(), *[(prompt, params(**GREEDY)) for prompt in batch])
    assert [choices[0] for choices in found] == [slow.greedy(weights, args, prompt, 12) for prompt in batch]


@pytest.mark.parametrize("changes", [{}, {"chunk": 5}, {"shaken": True}, {"num_blocks": 9}], ids=str)
def test_dynamic_rope_scaling_stretches_each_request_for_the_length_that_it_may_reach(changes):
    shape = {"rope_scaling": DynamicScaling(4.0, 24)}
    args = tiny_args(**shape)
    weights = tiny_weights(args)
    batch = prompts(6)
    assert len(batch[1]) + 12 > 24 > len(batch[0]) + 12
    found = run(make_engine(shape=shape, **changes), *[(prompt, params(**GREEDY)) for prompt in batch])
    assert [choices[0] for choices in found] == [slow.greedy(weights, args, prompt, 12) for prompt in batch]


def test_under_dynamic_rope_scaling_a_prefix_is_shared_by_requests_that_are_stretched_alike():
    shape = {"rope_scaling": DynamicScaling(4.0, 64)}
    args = tiny_args(**shape)
    weights = tiny_weights(args)
    prompt = prompts(6)[5]
    engine = make_engine(shape=shape)
    requests = []
    add = engine.scheduler.add
    engine.scheduler.add = lambda request: (requests.append(request), add(request))

    def cached_tokens(max_tokens: int) -> int:
        [[tokens]] = run(engine, (prompt, params(**GREEDY, max_tokens=max_tokens)))
        assert tokens == slow.greedy(weights, args, prompt, max_tokens)
        return requests[-1].num_cached_tokens

    assert len(prompt) == 58
    assert [cached_tokens(6), cached_tokens(5), cached_tokens(12)] == [0, 48, 0]
    assert [cached_tokens(12), cached_tokens(11)] == [48, 0]


@pytest.mark.parametrize("sampling", [GREEDY, dict(temperature=0.9, top_p=0.95, ignore_eos=True, seed=5)])
def test_a_request_alone_gives_what_it_gives_among_others(sampling):
    batch = prompts(8)
    together = run(make_engine(), *[(prompt, params(**sampling)) for prompt in batch])
    for prompt, choices in zip(batch, together, strict=True):
        assert run(make_engine(), (prompt, params(**sampling))) == [choices]


def test_chunks_of_a_prompt_give_what_the_whole_prompt_gives():
    batch = prompts(8)
    whole = run(make_engine(), *[(prompt, params(**GREEDY)) for prompt in batch])
    chunked = run(make_engine(chunk=5), *[(prompt, params(**GREEDY)) for prompt in batch])
    assert chunked == whole


def test_a_pool_that_is_too_small_for_all_gives_the_same_tokens_one_after_the_other():
    requests = [(prompt, params(**GREEDY, max_tokens=40)) for prompt in prompts(8)]
    roomy = run(make_engine(), *requests)
    engine = make_engine(num_blocks=9)
    assert run(engine, *requests) == roomy
    assert engine.stats().num_preemptions > 0


def test_unseeded_requests_draw_from_the_engines_seed_and_their_number():
    request = ([1, 2, 3], params(temperature=1.0, ignore_eos=True))
    first, second = run(make_engine(seed=1), request, request)
    assert first != second
    assert run(make_engine(seed=1), request, request) == [first, second]
    assert run(make_engine(seed=2), request, request) != [first, second]


def test_several_choices_share_the_prompt_and_differ():
    engine = make_engine()
    prompt = list(range(40))
    [choices] = run(engine, (prompt, params(n=4, temperature=1.0, seed=3, ignore_eos=True)))
    assert len({tuple(choice) for choice in choices}) == 4
    assert engine.stats().num_prompt_tokens == 40
    alone = run(make_engine(), (prompt, params(n=1, temperature=1.0, seed=3, ignore_eos=True)))
    assert alone == [choices[:1]]


def test_no_block_stays_referenced_after_finishes_and_aborts():
    engine = make_engine()
    ids = [engine.add(Query(prompt, params(**GREEDY))) for prompt in prompts(6)]
    events = engine.step() + engine.step()
    engine.abort(ids[1])
    engine.abort(ids[4])
    while engine.has_work:
        events += engine.step()
    assert engine.stats().num_referenced_blocks == 0
    assert [e.request_id for e in events if e.finish_reason == "abort"] == [ids[1], ids[4]]
    assert sorted(e.request_id for e in events if e.finish_reason) == ids
    engine.scheduler.check()


def test_a_loop_over_events_that_is_left_early_aborts_its_requests():
    engine = make_engine()
    events = events_of(engine, ([1, 2, 3], params(**GREEDY)))
    next(events)
    events.close()
    engine.step()
    assert engine.stats().num_referenced_blocks == 0
    assert not engine.has_work


def test_two_loops_that_take_turns_each_get_their_own_events():
    engine = make_engine()
    expected = run(make_engine(), ([1, 2, 3], params(**GREEDY)), ([9, 8], params(**GREEDY)))
    loops = [events_of(engine, (prompt, params(**GREEDY))) for prompt in ([1, 2, 3], [9, 8])]
    tokens = [[], []]
    for pair in zip(*loops, strict=True):
        for kept, event in zip(tokens, pair, strict=True):
            kept.append(event.token)
    assert [[t] for t in tokens] == expected


def test_prompt_logprobs_are_those_of_the_raw_logits_shifted_by_one():
    args = tiny_args()
    prompt = prompts(6)[5]
    scores = slow.logits(tiny_weights(args), args, prompt).log_softmax(-1)
    expected = [scores[i, token].item() for i, token in enumerate(prompt[1:])]
    for scheduling in ({}, {"chunk": 4}):
        engine = make_engine(**scheduling)
        [event] = events_of(engine, (prompt, params(prompt_logprobs=2, max_tokens=0)))
        assert event.finish_reason == "length"
        assert event.completion.prompt_logprobs[0] is None
        assert [entry.logprob for entry in event.completion.prompt_logprobs[1:]] == pytest.approx(expected, abs=1e-4)
        assert all(len(entry.top) == 2 for entry in event.completion.prompt_logprobs[1:])


def test_prompt_logprobs_are_complete_though_the_prefix_is_cached():
    engine = make_engine()
    prompt = list(range(50))
    run(engine, (prompt, params(**GREEDY)))
    [event] = events_of(engine, (prompt, params(prompt_logprobs=0, max_tokens=0)))
    assert None not in event.completion.prompt_logprobs[1:]


def test_logprobs_are_raw_whatever_the_temperature():
    args = tiny_args()
    engine = make_engine()
    events = list(events_of(engine, ([5, 6, 7], params(temperature=0.3, logprobs=3, seed=1, max_tokens=1))))
    scores = slow.logits(tiny_weights(args), args, [5, 6, 7])[-1].log_softmax(-1)
    entry = events[0].logprob
    assert entry.logprob == pytest.approx(scores[entry.token].item(), abs=1e-4)
    assert [token for token, _ in entry.top] == scores.topk(3).indices.tolist()


def test_a_token_that_is_not_finite_ends_its_own_request_alone():
    engine = make_engine()
    engine.runner.program.tok_embeddings.weight[200] = float("nan")
    good = run(make_engine(), ([1, 2, 3], params(**GREEDY)))
    ids = range(2)
    events = list(events_of(engine, ([1, 2, 3], params(**GREEDY)), ([1, 200, 3], params(**GREEDY))))
    bad = [event for event in events if event.request_id == ids[1]]
    assert [event.finish_reason for event in bad] == ["error"]
    assert "not finite" in bad[0].error
    assert [event.token for event in events if event.request_id == ids[0]] == good[0][0]
    assert engine.stats().num_referenced_blocks == 0


def test_stop_ids_end_an_answer_and_are_not_part_of_it():
    [[tokens]] = run(make_engine(), ([1, 2, 3], params(**GREEDY)))
    engine = make_engine()
    events = list(events_of(engine, ([1, 2, 3], params(**GREEDY, stop_token_ids=(tokens[4],)))))
    assert [e.token for e in events if e.token is not None] == tokens[: tokens.index(tokens[4])]
    assert events[-1].finish_reason == "stop"


def test_min_tokens_holds_the_end_back():
    [[tokens]] = run(make_engine(), ([1, 2, 3], params(**GREEDY)))
    stops = params(**GREEDY, stop_token_ids=(tokens[0],), min_tokens=6)
    [[later]] = run(make_engine(), ([1, 2, 3], stops))
    assert len(later) >= 6
    assert tokens[0] not in later[:6]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([1] * 257, "the prompt has 257 tokens, but max_seq_len is 256"),
        ([1, 264], "the prompt holds token 264"),
    ],
)
def test_a_prompt_that_cannot_run_is_refused_at_once(prompt, message):
    engine = make_engine()
    with pytest.raises(ValueError, match=message):
        engine.add(Query(prompt, params()))
    assert not engine.has_work


def test_an_answer_ends_where_the_context_does():
    engine = make_engine()
    events = list(events_of(engine, ([1] * 250, params(temperature=0.0, ignore_eos=True, max_tokens=99))))
    assert len(events) == 6
    assert events[-1].finish_reason == "length"


@pytest.mark.parametrize("size", range(1, 8))
def test_text_in_pieces_of_any_size_stops_at_the_same_place(size):
    text = "one two thr three four"
    stop = StopText(("three", "fou"))
    shown = ""
    for start in range(0, len(text), size):
        piece, stopped = stop.push(text[start : start + size])
        shown += piece
        if stopped:
            break
    assert stopped
    assert shown == "one two thr "


def test_what_only_looked_like_a_stop_string_is_shown_in_the_end():
    stop = StopText(("three",))
    assert stop.push("a thr") == ("a ", False)
    assert stop.flush("") == "thr"


def test_a_step_survives_its_journey_as_integers():
    engine = make_engine()
    engine.add(Query(list(range(40)), params()))
    engine.add(Query([1, 2, 3], params()))
    step = engine.scheduler.schedule()
    batch = Pack.of(step, [1, 1], BLOCK_SIZE)
    assert Pack.from_ints(batch.to_ints()) == batch


def bits(engine: Engine, *requests: tuple[list[int], SamplingParams]) -> list[list[tuple]]:
    """For each request its tokens with their logprobs, and its prompt's logprobs, to the last bit."""
    found = [[] for _ in requests]
    for event in events_of(engine, *requests):
        prompt_logprobs = event.completion and event.completion.prompt_logprobs
        found[event.request_id] += [event.logprob, prompt_logprobs]
    return found


def mixed_requests() -> list[tuple[list[int], SamplingParams]]:
    kinds = [GREEDY, dict(temperature=1.0, seed=3, ignore_eos=True), dict(temperature=0.0, prompt_logprobs=1)]
    return [
        (prompt, params(max_tokens=24, logprobs=3, **kinds[i % 3]))
        for i, prompt in enumerate([*prompts(7), list(range(100)), [*range(100), 7, 7, 7]])
    ]


SITUATIONS = {
    "all together": {},
    "prompts in chunks": {"chunk": 7},
    "small steps": {"max_step_tokens": 20},
    "a pool of 40 blocks, and preemption at random": {"num_blocks": 40, "shaken": True},
    "no cached prefixes": {"prefix_caching": False},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS.keys())
def test_a_deterministic_engine_gives_the_same_bits_in_every_situation(situation, dtype):
    requests = mixed_requests()
    alone = [bits(make_engine(dtype=dtype, deterministic=True), request)[0] for request in requests]
    engine = make_engine(dtype=dtype, deterministic=True, **situation)
    assert bits(engine, *requests) == alone
    if "shaken" in situation:
        assert engine.stats().num_preemptions > 10
    assert bits(engine, *requests[::-1]) == alone[::-1]  # now with whatever prefixes are cached


def test_an_engine_that_is_not_deterministic_does_differ_in_low_bits():
    requests = mixed_requests()
    alone = [bits(make_engine(), request)[0] for request in requests]
    assert bits(make_engine(chunk=7), *requests) != alone


def test_deterministic_logits_equal_the_slow_ones_too():
    args = tiny_args()
    prompt = prompts(6)[5]
    engine = make_engine(deterministic=True)
    assert run(engine, (prompt, params(**GREEDY))) == [[slow.greedy(tiny_weights(args), args, prompt, 12)]]


def many_requests(number: int) -> list[tuple[list[int], SamplingParams]]:
    """Ragged prompts, some with a common beginning; greedy and seeded sampling."""
    chance = random.Random(1)
    common = [chance.randrange(256) for _ in range(48)]
    requests = []
    for i in range(number):
        prompt = [chance.randrange(256) for _ in range(chance.randrange(1, 60))]
        sampling = GREEDY if i % 2 else dict(temperature=1.0, top_p=0.95, seed=i, ignore_eos=True)
        requests.append(
            (
                common + prompt if i % 3 == 0 else prompt,
                params(max_tokens=chance.randrange(1, 40), **sampling),
            )
        )
    return requests


@pytest.mark.parametrize("number", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_many_requests_give_the_same_tokens_in_every_situation(number):
    requests = many_requests(number)
    alone = [run(make_engine(prefix_caching=False), request)[0] for request in requests]
    together = make_engine(num_blocks=400, max_running=32, prefix_caching=False)
    assert run(together, *requests) == alone
    assert run(make_engine(num_blocks=400, max_running=32, chunk=16), *requests) == alone
    shaken = make_engine(num_blocks=40, shaken=True)
    assert run(shaken, *requests) == alone
    stats = shaken.stats()
    assert stats.num_preemptions >= 0.4 * number
    assert stats.num_referenced_blocks == 0
    assert run(shaken, *requests[:8]) == alone[:8]  # with whatever prefixes are cached by now


def test_the_paged_cache_gives_the_logits_of_the_contiguous_one():
    prompt = list(range(60))
    engine = make_engine(chunk=11, num_blocks=9)
    engine.add(Query(list(range(200, 230)), params(**GREEDY)))  # so that the next one starts somewhere else
    engine.step()
    entries = next(
        event.completion.prompt_logprobs
        for event in events_of(engine, (prompt, params(prompt_logprobs=0, max_tokens=0)))
    )
    logits = tiny_model(tiny_args())(torch.tensor([prompt]), 0)[0].log_softmax(-1)
    expected = [logits[i, token].item() for i, token in enumerate(prompt[1:])]
    assert [entry.logprob for entry in entries[1:]] == pytest.approx(expected, abs=1e-4)


def test_a_second_turn_of_a_conversation_computes_only_what_is_new():
    engine = make_engine()
    prompt = list(range(40))
    [[answer]] = run(engine, (prompt, params(**GREEDY, max_tokens=20)))
    computed = []
    forward = engine.runner.run
    engine.runner.run = lambda pack: computed.append(len(pack.tokens)) or forward(pack)
    second = prompt + answer + [1, 2, 3]
    assert run(engine, (second, params(**GREEDY))) == run(make_engine(), (second, params(**GREEDY)))
    assert computed[0] == len(second) - (len(prompt) + len(answer) - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_a_logits_processor_changes_its_own_request_alone_and_its_failure_ends_it_alone():
    def only_seven(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor([7]), 0.0)

    def failing(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("a processor's own fault")

    plain = params(**GREEDY)
    [[expected]] = run(make_engine(), ([1, 2, 3], plain))
    engine = make_engine()
    processors = dict(logits_processors=(only_seven,))
    kinds = (plain, params(**GREEDY, **processors), params(logits_processors=(failing,)))
    ids = range(3)
    events = list(events_of(engine, *[([1, 2, 3], kind) for kind in kinds]))
    tokens = [[e.token for e in events if e.request_id == i and e.token is not None] for i in ids]
    assert tokens == [expected, [7] * 12, []]
    assert "a processor's own fault" in next(e.error for e in events if e.finish_reason == "error")


def test_a_step_that_fails_ends_its_requests_and_not_the_engine():
    engine = make_engine(prefix_caching=False)
    expected = run(make_engine(), ([1, 2, 3], params(**GREEDY)))
    ids = [engine.add(Query(prompt, params(**GREEDY))) for prompt in prompts(3)]
    engine.step()
    forward = engine.runner.run

    def fail(pack):
        engine.runner.run = forward
        raise MemoryError("no room")

    engine.runner.run = fail
    with pytest.raises(MemoryError):
        engine.step()
    events = engine.step()
    assert sorted(event.request_id for event in events) == ids
    assert {(event.finish_reason, event.error) for event in events} == {("error", "the step failed: no room")}
    assert engine.stats().num_referenced_blocks == 0
    assert run(engine, ([1, 2, 3], params(**GREEDY))) == expected


# ---- nothing is lost, nothing is kept


def test_a_step_that_fails_loses_no_event_of_other_requests():
    engine = make_engine(prefix_caching=False)
    aborted, other = (engine.add(Query(prompt, params(**GREEDY))) for prompt in prompts(2))
    engine.step()
    engine.abort(aborted)  # its event is queued when the next step fails
    engine.runner.run, run_step = None, engine.runner.run
    with pytest.raises(TypeError):
        engine.step()
    engine.runner.run = run_step
    assert [(e.request_id, e.finish_reason) for e in engine.step()] == [(aborted, "abort"), (other, "error")]
    assert not engine.has_work


def test_a_step_that_fails_while_it_samples_ends_its_requests_too(monkeypatch):
    engine = make_engine(prefix_caching=False)
    request = engine.add(Query([1, 2, 3], params(**GREEDY, n=3)))
    with monkeypatch.context() as patch:
        patch.setattr("llama.engine.sample", None)
        with pytest.raises(TypeError):
            engine.step()
    assert [(e.request_id, e.index, e.finish_reason) for e in engine.step()] == [
        (request, index, "error") for index in range(3)
    ]
    assert engine.stats().num_referenced_blocks == 0
    assert len(run(engine, ([1, 2, 3], params(**GREEDY)))[0][0]) == 12


def test_whoever_waits_for_a_request_that_is_gone_is_told():
    engine = make_engine()
    events = events_of(engine, ([1, 2, 3], params(**GREEDY)))
    first = next(events)
    assert first.finish_reason is None
    engine.abort(0)
    assert [event.finish_reason for event in events] == ["abort"]
    events = events_of(engine, ([1, 2, 3], params(**GREEDY)))
    next(events)
    engine._inboxes.clear()  # as if its last event had gone elsewhere
    engine.abort(1)
    with pytest.raises(RuntimeError, match="a request is gone"):
        list(events)


def test_streams_that_are_left_early_leave_nothing_behind():
    engine = make_engine()
    for _ in range(5):
        events = events_of(engine, ([1, 2, 3], params(**GREEDY)), ([4, 5], params(**GREEDY)))
        next(events)
        events.close()
    assert engine.step() != []
    assert not engine.has_work
    kept = (engine._choices, engine._open, engine._events, engine._inboxes)
    assert [len(each) for each in kept] == [0, 0, 0, 0]


def test_queries_are_answered_though_the_first_hundreds_are_all_refused():
    engine = make_engine()
    queries = [([], params())] * 600 + [([1, 2, 3], params(**GREEDY))]
    ends = [event for event in events_of(engine, *queries) if event.completion]
    assert [event.request_id for event in ends] == list(range(601))
    assert {event.error for event in ends[:600]} == {"the prompt is empty: give at least one token"}
    assert ends[600].finish_reason == "length"


def test_run_holds_the_prompts_in_flight_and_no_more(monkeypatch):
    monkeypatch.setattr("llama.engine.MAX_OPEN", 64)

    class Prompt(list):
        alive = WeakSet()
        __hash__ = object.__hash__

    def queries() -> Iterator[Query]:
        for i in range(3000):
            prompt = Prompt([i % 256, 1 + i % 7])
            Prompt.alive.add(prompt)
            yield Query(prompt, params(**{**GREEDY, "max_tokens": 1 + i % 4}))
            del prompt
            most.append(len(Prompt.alive))

    most, engine = [], make_engine()
    ended = [event for events in engine.run(queries()) for event in events if event.completion]
    assert sorted(event.request_id for event in ended) == list(range(3000))
    assert max(most) <= 128


@pytest.mark.parametrize("sampling", [GREEDY, dict(temperature=0.9, seed=5, ignore_eos=True)])
def test_threads_that_share_an_engine_get_what_each_would_get_alone(sampling):
    batch = prompts(8)
    alone = [run(make_engine(), (prompt, params(**sampling))) for prompt in batch]
    engine = make_engine()
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(run, engine, (batch[i % 8], params(**sampling))) for i in range(400)]
        found = [call.result() for call in calls]
    assert found == [alone[i % 8] for i in range(400)]
    assert engine.stats().num_referenced_blocks == 0


def test_a_stream_that_is_collected_in_the_middle_of_a_step_is_aborted_after_it():
    engine = make_engine()
    stream = events_of(engine, ([1, 2, 3], params(**GREEDY)))
    next(stream)
    run_step = engine.runner.run

    def collect(pack):
        stream.close()  # as the garbage collector may at any moment
        return run_step(pack)

    engine.runner.run = collect
    other = engine.add(Query([4, 5], params(**GREEDY)))
    events = engine.step()
    engine.runner.run = run_step
    assert {event.request_id: event.finish_reason for event in events} == {0: "abort", other: None}
    engine.scheduler.check()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_is_told_that_it_cannot_use_its_parents_model():
    engine = make_engine()
    run(engine, ([1, 2, 3], params(**GREEDY)))
    process = os.fork()
    if process == 0:
        try:
            run(engine, ([1, 2, 3], params(**GREEDY)))
        except RuntimeError as error:
            os._exit(0 if "a forked child cannot use it" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


# ---- guesses: nothing assumes that a slice yields one token


class Guessing(Scheduler):
    """Puts guesses behind every slice that samples: right ones, wrong ones, or right ones and then a wrong one."""

    def __init__(self, *args, answers: dict[int, list[int]], chance: random.Random, **options):
        super().__init__(*args, **options)
        self.answers = answers  # by the prompt's length: the tokens that will come
        self.chance = chance

    def schedule(self) -> Step:
        step = super().schedule()
        slices = [self._guessed(part) for part in step.slices]
        self._step = Step(tuple(slices), step.copies)
        return self._step

    def _guessed(self, part: Slice) -> Slice:
        request = part.request
        room = min(request.max_total_tokens - len(request.tokens) - 1, 4)
        if not part.num_sampled or len(part.tokens) > 1 or room < 1:
            return part
        done = len(request.tokens) - request.num_prompt_tokens
        guesses = self.answers[request.num_prompt_tokens][done : done + room]
        at = self.chance.randrange(2 * room)
        guesses[at : at + 1] = [(token + 1) % 256 for token in guesses[at : at + 1]]
        num_blocks = self._num_blocks_for(part.stop + len(guesses)) - len(request.blocks)
        if num_blocks > 0:
            self._grow(request, num_blocks)
        return Slice(request, part.start, [*part.tokens, *guesses])


@pytest.mark.parametrize("sampling", [{}, dict(temperature=0.9, seed=5, repetition_penalty=1.3, logprobs=2)])
def test_guesses_change_how_many_tokens_a_step_brings_and_never_which(sampling):
    batch = [list(range(3, 3 + n)) for n in (5, 17, 40)]
    kinds = params(**{**GREEDY, **sampling, "max_tokens": 30})
    plain = run(make_engine(), *[(prompt, kinds) for prompt in batch])
    engine = make_engine()
    answers = {len(prompt): choices[0] for prompt, choices in zip(batch, plain, strict=True)}
    engine.scheduler = Guessing(64, BLOCK_SIZE, answers=answers, chance=random.Random(3))
    calls, run_step = [], engine.runner.run
    engine.runner.run = lambda pack: calls.append(pack) or run_step(pack)
    assert run(engine, *[(prompt, kinds) for prompt in batch]) == plain
    assert len(calls) < 25  # of 30 without guesses
    engine.scheduler.check()
    second = [*batch[2], *plain[2][0], 9]  # finds what guesses left in the cache
    assert run(engine, (second, params(**GREEDY, max_tokens=1))) == run(
        make_engine(), (second, params(**GREEDY, max_tokens=1))
    )


def test_an_answer_that_ends_among_right_guesses_ends_there():
    [[tokens]] = run(make_engine(), ([1, 2, 3], params(**GREEDY, max_tokens=30)))
    stop = tokens[6]
    until = params(**GREEDY, max_tokens=30, stop_token_ids=(stop,))
    [[expected]] = run(make_engine(), ([1, 2, 3], until))
    engine = make_engine()
    engine.scheduler = Guessing(64, BLOCK_SIZE, answers={3: tokens}, chance=random.Random(0))
    assert run(engine, ([1, 2, 3], until)) == [[expected]]
    assert engine.stats().num_referenced_blocks == 0
