"""Where guesses come from: the text so far, and a small model that runs ahead in the same blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import ByteTokenizer, tiny_args, tiny_model

from llama.answer import Query
from llama.choice import Choice
from llama.drafters import DraftModel, Guesses, NGrams
from llama.engine import Engine
from llama.runner import BLOCK_SIZE, Runner
from llama.sampling_params import SamplingParams
from llama.scheduler import Scheduler

# ---- n-grams


def looked_up(tokens: list[int], most: int) -> list[int]:
    """The same, slowly: what followed the latest other occurrence of the last three tokens, or else of two."""
    for size in (3, 2):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[-size:]:
                text = list(tokens)
                for position in range(start + size, start + size + most):
                    text.append(text[position])
                return text[len(tokens) :]
    return []


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 2), max_size=24),
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=6),
    st.integers(1, 7),
)
def test_ngrams_that_grow_with_a_text_find_what_a_search_finds(tokens, additions, most):
    ngrams = NGrams()
    assert [*ngrams.following(tokens, most).tokens] == looked_up(tokens, most)
    for added in additions:
        tokens += added
        assert [*ngrams.following(tokens, most).tokens] == looked_up(tokens, most)


def test_three_tokens_are_a_better_sign_than_two():
    tokens = [1, 2, 3, 50, 9, 2, 3, 60, 1, 2, 3]
    assert NGrams().following(tokens, 2).tokens == [50, 9]
    assert NGrams().following([*tokens[1:8], 2, 3], 2).tokens == [60, 2]


def test_a_text_that_repeats_itself_is_guessed_beyond_its_end():
    assert NGrams().following([5, 6, 5, 6, 5, 6], 7).tokens == [5, 6, 5, 6, 5, 6, 5]


def test_nothing_is_guessed_in_a_text_without_repetition():
    assert NGrams().following([1, 2, 3, 4], 7) == Guesses()


def test_the_more_tokens_are_as_they_were_the_likelier_is_it_that_the_next_is_too():
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    odds = [NGrams().following([*text, 50, *text[first:7]], 2).odds for first in (5, 4, 0)]
    assert odds[0][0] < odds[0][1] == odds[1][0] < odds[1][1] < odds[2][0] < odds[2][1] < 1
    assert odds[0][0] == pytest.approx(0.29, abs=0.01)


# ---- a draft model


class Counting(DraftModel):
    """Notes how many rows it ran, and which were right."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.num_rows: list[int] = []
        run = self.runner.run
        self.runner.run = lambda pack: self.num_rows.append(len(pack.tokens)) or run(pack)

    def propose(self, rooms):
        self.num_rows.clear()
        return super().propose(rooms)


def drafted_engine(seed: int = 0, num_blocks: int = 64, draft: dict | None = None, **options) -> Engine:
    """An engine of the tiny model 0, for which the tiny model `seed` drafts."""
    large, small = tiny_model(tiny_args()), tiny_model(tiny_args(**draft or {}), seed)
    runner = Runner(small, num_blocks, BLOCK_SIZE, torch.float32)
    drafter = Counting(runner, large.vocab_size, small.params.max_seq_len, **options)
    return Engine(
        Runner(large, num_blocks, BLOCK_SIZE, torch.float32),
        Scheduler(num_blocks, BLOCK_SIZE),
        ByteTokenizer(),
        max_seq_len=256,
        seed=1,
        stop_ids=ByteTokenizer.stop_ids,
        drafter=drafter,
    )


def begin(engine: Engine, prompt: list[int], **fields) -> Choice:
    """A choice whose prompt is computed, and whose first token is there."""
    params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": 60, **fields})
    request_id = engine.add(Query(prompt, params.resolve()))
    [choice] = engine._open[request_id]
    while not choice.tokens:
        engine.step()
    return choice


def asked(engine: Engine, choice: Choice, room: int) -> list[int]:
    """What is proposed for a choice, as in the midst of a step."""
    engine.scheduler.schedule()
    rooms = engine.scheduler.make_room({choice.request: room})
    guesses = engine.speculation.drafter.propose({choice: rooms[choice.request]})
    engine.scheduler.cancel(engine.scheduler._step)
    return guesses[choice].tokens


def take(engine: Engine, choice: Choice, tokens: list[int]) -> None:
    """As if the large model had sampled these in a step."""
    engine.scheduler.schedule()
    engine.scheduler.make_room({choice.request: len(tokens) - 1})
    engine.scheduler.advance(engine.scheduler.widen({choice.request: tokens[:-1]}))
    for token in tokens:
        engine.scheduler.append(choice.request, token)


PROMPT = [(7 * i) % 251 for i in range(40)]


@pytest.mark.parametrize("sampling", [{}, dict(temperature=1.0, top_p=0.95, seed=3, presence_penalty=0.4)])
def test_the_same_model_guesses_every_token_because_it_draws_with_the_same_keys(sampling):
    engine = drafted_engine()
    choice = begin(engine, PROMPT, **sampling)
    guesses = asked(engine, choice, 7)
    before = len(choice.tokens)
    while len(choice.tokens) < before + 7:
        engine.step()
    assert choice.tokens[before : before + 7] == guesses


def test_what_was_guessed_right_is_not_read_again():
    engine = drafted_engine()
    drafter, choice = engine.speculation.drafter, begin(engine, PROMPT)
    guesses = asked(engine, choice, 5)
    assert drafter.num_rows == [len(PROMPT) + 1, 1, 1, 1, 1]  # the last guess is not read: nothing comes behind it
    take(engine, choice, [*guesses[:2], (guesses[2] + 1) % 256])
    guesses = asked(engine, choice, 2)
    assert drafter.num_rows == [1, 1]
    take(engine, choice, [(guesses[0] + 1) % 256, 250])
    asked(engine, choice, 1)
    assert drafter.num_rows == [2]


def test_a_long_prompt_is_read_in_parts_and_nothing_is_guessed_until_the_end():
    engine = drafted_engine(max_step_tokens=16)
    drafter, choice = engine.speculation.drafter, begin(engine, PROMPT)
    assert [asked(engine, choice, 3), drafter.num_rows] == [[], [16]]
    assert [asked(engine, choice, 3), drafter.num_rows] == [[], [16]]
    assert len(asked(engine, choice, 3)) == 3
    assert drafter.num_rows == [len(PROMPT) + 1 - 32, 1, 1]


def test_blocks_that_requests_share_are_read_once():
    engine = drafted_engine()
    drafter, first = engine.speculation.drafter, begin(engine, PROMPT)
    asked(engine, first, 2)
    asked(engine, first, 2)
    second = begin(engine, [*PROMPT, 9])
    assert second.request.num_cached_tokens == 32
    asked(engine, second, 1)
    assert drafter.num_rows == [len(second.request.tokens) - 32]


def test_a_request_that_was_preempted_keeps_what_its_blocks_keep():
    engine = drafted_engine()
    drafter, choice = engine.speculation.drafter, begin(engine, PROMPT)
    asked(engine, choice, 4)
    asked(engine, choice, 4)
    engine.scheduler.preempt(choice.request)
    engine.step()
    asked(engine, choice, 1)
    assert drafter.num_rows == [len(choice.request.tokens) - 32]


@pytest.mark.parametrize("size", [256, 272])
def test_tables_of_one_vocabulary_may_be_padded_to_different_sizes(size):
    engine = drafted_engine(seed=2, draft={"vocab_size": size})
    choice = begin(engine, PROMPT, logit_bias={263: 1.0})
    assert all(token < engine.runner.vocab_size for token in asked(engine, choice, 7))
    while engine.has_work:
        engine.step()
    plain = begin(drafted_engine(draft={"max_seq_len": 1}), PROMPT, logit_bias={263: 1.0})
    assert plain.tokens[0] == choice.tokens[0]
    assert len(choice.tokens) == 60


def test_a_draft_model_stops_where_its_context_ends():
    engine = drafted_engine(draft={"max_seq_len": len(PROMPT) + 4})
    choice = begin(engine, PROMPT)
    assert len(asked(engine, choice, 7)) == 3
    take(engine, choice, [1, 2, 3])
    assert asked(engine, choice, 7) == []


def test_nothing_is_guessed_behind_an_end():
    engine = drafted_engine()
    guesses = asked(engine, begin(engine, PROMPT), 7)
    engine = drafted_engine()
    choice = begin(engine, PROMPT, stop_token_ids=(guesses[3],))
    assert asked(engine, choice, 7) == guesses[: guesses.index(guesses[3])]
