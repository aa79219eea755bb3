"""The sampler against slow, obvious twins, against Hugging Face's processors, and against itself."""

import math
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.threads import threads

from llama import sampling
from llama.sampling import (
    SampleRow,
    SamplingError,
    SamplingParams,
    logprobs_of,
    outside_nucleus,
    sample,
    sample_top_p,
    top_logprobs,
    uniform,
)

NAN, INF = math.nan, math.inf
ALMOST_ONE = 1 - 2.0**-53


def row(params=None, tokens=(), num_prompt_tokens=0, key=(0, 0, 0), banned=(), allowed=None, **given):
    params = (params or SamplingParams(**given)).resolve()
    return SampleRow(params, list(tokens), num_prompt_tokens, tuple(key), banned, allowed and packed(allowed))


def packed(ids):
    """A bit for each id, in whole words of 32."""
    return sum(1 << id for id in set(ids)).to_bytes(4 * (max(ids) // 32 + 1), "little")


def drawing(*numbers):
    """The sampler with these random numbers, picked by the last integer of a row's key."""
    return patch.object(sampling, "uniform", lambda *key: numbers[key[-1]])


# ------------------------------------------------------------------------------------------------- the slow twins


def twin_changed(logits, row):
    """Penalties and bias, one token at a time, in float32; bans come after the processors and so are not here."""
    params, changed = row.params, logits.astype(np.float32).copy()
    answer = row.tokens[row.num_prompt_tokens :]
    for token in range(len(changed)):
        penalty = np.float32(params.repetition_penalty)
        if token in row.tokens:
            changed[token] = changed[token] * penalty if changed[token] < 0 else changed[token] / penalty
        if token in answer:
            taken = params.presence_penalty + params.frequency_penalty * answer.count(token)
            changed[token] -= np.float32(taken)
        if token in params.logit_bias:
            changed[token] += np.float32(params.logit_bias[token])
    return changed


def twin_ranking(logits):
    """Ids from the best to the worst logit, the lower id first among equals."""
    distances = (max(logits) - logits).tolist()  # in float32, in which tokens much alike may be equal
    return sorted(range(len(distances)), key=lambda token: (distances[token], token))


def twin_kept(logits, params):
    """The probabilities (float64, not normalised) of the tokens that temperature, top_k, top_p, min_p leave."""
    scaled = (logits.astype(np.float64) - max(logits)) / params.temperature
    order = twin_ranking(logits)
    order = order[: params.top_k or len(order)]
    mass = {token: math.exp(scaled[token]) for token in order}
    total, before, kept = sum(mass.values()), 0.0, {}
    for token in order:
        if before <= params.top_p * total and mass[token] >= params.min_p * mass[order[0]]:
            kept[token] = mass[token]
        before += mass[token]
    return kept


def twin_tokens(logits, row, draw, slack=1e-5):
    """The token at `draw` of the probabilities added up in the order of the vocabulary; {None}: there is none.

    All of those that float32 may come to: the draw and the thresholds may lie just beside a boundary.
    """
    changed = twin_changed(logits, row)
    changed[list(row.banned)] = -INF
    if row.allowed is not None:
        bits = int.from_bytes(row.allowed, "little")
        changed[[token for token in range(len(changed)) if not bits >> token & 1]] = -INF
    if not np.isfinite(max(changed)):
        return {None}
    if row.params.temperature <= 0:
        return {int(np.argmax(changed))}
    tokens = set()
    for by in (-slack, 0.0, slack):
        top_p, min_p = (min(1.0, max(0.0, x * (1 + by))) for x in (row.params.top_p, row.params.min_p))
        kept = twin_kept(changed, replace(row.params, top_p=top_p, min_p=min_p))
        total, passed = sum(kept.values()), 0.0
        for token in sorted(kept):
            before, passed = passed, passed + kept[token]
            if before < passed and before <= (draw + slack) * total and passed >= (draw - slack) * total:
                tokens.add(token)
    return tokens


@st.composite
def batches(draw):
    """(logits, rows, random numbers), with equal logits as common as they are in low precision."""
    vocab = draw(st.integers(1, 24))
    ids = st.integers(0, vocab - 1)
    logit = st.one_of(st.integers(-3, 3).map(float), st.floats(-20, 20, width=32))
    rows, logits = [], []
    for place in range(draw(st.integers(1, 5))):
        tokens = draw(st.lists(ids, max_size=8))
        params = SamplingParams(
            temperature=draw(st.sampled_from([0.0, -1.0, 0.3, 1.0, 2.5])),
            top_p=draw(st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))),
            top_k=draw(st.integers(0, vocab + 2)),
            min_p=draw(st.one_of(st.just(0.0), st.floats(0, 1))),
            repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.7])),
            presence_penalty=draw(st.sampled_from([0.0, 0.5, -1.0])),
            frequency_penalty=draw(st.sampled_from([0.0, 0.25, -0.5])),
            logit_bias=draw(st.dictionaries(ids, st.sampled_from([-INF, -5.0, 2.5]), max_size=3)),
        )
        banned = draw(st.lists(ids, max_size=2))
        allowed = draw(st.one_of(st.none(), st.lists(ids, min_size=1, max_size=5)))
        logits.append(draw(st.lists(logit, min_size=vocab, max_size=vocab)))
        rows.append(row(params, tokens, draw(st.integers(0, len(tokens))), (0, 0, place), banned, allowed))
    numbers = draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=len(rows), max_size=len(rows)))
    return torch.tensor(logits), rows, numbers


def over(num_batches, check):
    """Calls `check` with so many batches, always the same ones."""
    settings(max_examples=num_batches, deadline=None, derandomize=True)(given(batches())(check))()


FEW_AND_MANY = pytest.mark.parametrize("num_batches", [60, pytest.param(400, marks=pytest.mark.slow)])


@FEW_AND_MANY
@pytest.mark.parametrize("leading", [1, 2, 256])
def test_every_row_of_a_batch_gets_the_token_of_the_slow_twin(num_batches, leading):
    def check(batch):
        logits, rows, numbers = batch
        with drawing(*numbers), patch.object(sampling, "_LEADING", leading):
            sampled = sample(logits, rows)
        for i, token in enumerate(sampled.tokens):
            token = token if sampled.finite[i] else None
            assert token in twin_tokens(logits[i].numpy(), rows[i], numbers[i])

    over(num_batches // 2, check)


@FEW_AND_MANY
def test_penalties_and_bias_equal_the_twin_to_the_bit(num_batches):
    def check(batch):
        logits, rows, _ = batch
        seen = {}
        spied = [
            replace(
                r,
                params=replace(r.params, logits_processors=(lambda _, x, i=i: seen.setdefault(i, x.clone()),)),
            )
            for i, r in enumerate(rows)
        ]
        sample(logits, spied)
        for i, r in enumerate(rows):
            assert seen[i].tolist() == twin_changed(logits[i].numpy(), r).tolist()

    over(num_batches, check)


@FEW_AND_MANY
def test_a_batch_equals_its_rows_alone_and_any_amount_of_ranking(num_batches):
    def check(batch):
        logits, rows, _ = batch
        together = sample(logits, rows)
        for i, r in enumerate(rows):
            for leading in (1, 3):
                with patch.object(sampling, "_LEADING", leading):
                    alone = sample(logits[i : i + 1], [r])
                assert (alone.tokens, alone.finite) == ([together.tokens[i]], [together.finite[i]])

    over(num_batches, check)


# --------------------------------------------------------------------------------------------- a batch and its rows


def varied_rows(vocab, num):
    """Rows that use every feature, in turn, with different histories and keys."""
    given = [
        {"temperature": 0},
        {},
        {"top_k": 50},
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 1.5, "top_p": 0.99},
        {"temperature": 1.0, "top_p": 1.0, "min_p": 0.02},
        {"repetition_penalty": 1.3, "top_k": 700},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "temperature": 0},
        {"logit_bias": {3: 5.0, 5: -INF}, "temperature": 2.0, "top_p": 0.7},
        {"logits_processors": (lambda tokens, x: x * 0.5,)},
        {"temperature": 1.0, "top_p": 1.0, "top_k": vocab},
    ]
    return [
        row(
            tokens=[(7 * i + j * j) % vocab for j in range(20)],
            num_prompt_tokens=10,
            key=(i // 3, i % 3, i),
            banned=[i] if i % 4 == 0 else [],
            logprobs=(None, 0, 5, 20)[i % 4],
            **given[i % len(given)],
        )
        for i in range(num)
    ]


@pytest.fixture
def several_threads():
    with threads(4):
        yield


@pytest.mark.parametrize(("vocab", "low_precision"), [(33003, False), (33003, True), (2048, True)])
def test_a_row_alone_and_among_32_gets_the_same_token_and_logprob_to_the_bit(vocab, low_precision, several_threads):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(32, vocab, generator=generator) * 3
    if low_precision:
        logits = logits.bfloat16().float()  # many equals
    logits[4, 17] = NAN
    rows = varied_rows(vocab, 32)
    together = sample(logits, rows)
    assert together.finite == [i != 4 for i in range(32)]
    for i, r in enumerate(rows):
        alone = sample(logits[i : i + 1].clone(), [r])
        assert alone.tokens[0] == together.tokens[i]
        assert alone.logprobs[0] == together.logprobs[i]
        assert alone.top[0] == together.top[i]


def test_the_order_of_a_batch_and_the_size_of_a_block_change_nothing():
    logits = torch.randn(32, 5000, generator=torch.Generator().manual_seed(1)) * 3
    rows = varied_rows(5000, 32)
    expected = sample(logits, rows)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(2)).tolist()
    shuffled = sample(logits[order], [rows[i] for i in order])
    assert shuffled.tokens == [expected.tokens[i] for i in order]
    with patch.object(sampling, "_BLOCK", 3 * 5000):
        assert sample(logits, rows) == expected


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 6.0])
def test_ranking_a_few_tokens_chooses_as_ranking_all_does(spread):
    logits = (torch.randn(24, 9000, generator=torch.Generator().manual_seed(3)) * spread * 8).round() / 8
    rows = [
        row(temperature=1.0, top_p=(i % 8) / 7, top_k=(0, 3, 1500)[i % 3], min_p=(0.0, 0.01)[i % 2], key=(i,))
        for i in range(24)
    ]
    with patch.object(sampling, "_LEADING", 9000):
        expected = sample(logits, rows).tokens
    for leading in (1, 16, 256):
        with patch.object(sampling, "_LEADING", leading):
            assert sample(logits, rows).tokens == expected


def test_only_rows_with_a_wide_nucleus_are_looked_at_again():
    logits = torch.zeros(3, 9000)
    logits[0, 5] = logits[2, 7] = 30.0
    seen = []

    def noting(logits, rows):
        seen.extend(row.key for row in rows)
        return draw(logits, rows)

    draw = sampling._draw_from_all
    with patch.object(sampling, "_draw_from_all", noting):
        tokens = sample(logits, [row(key=(i,)) for i in range(3)]).tokens
    assert (tokens[0], tokens[2]) == (5, 7)
    assert seen == [(1,)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.one_of(st.sampled_from([0.0, 1.0, 2.5, INF]), st.floats(0, 2.0**100, width=32)), min_size=1),
    st.data(),
)
def test_selecting_keeps_what_sorting_would(distances, data):
    amounts = data.draw(st.lists(st.integers(0, 9), min_size=len(distances), max_size=len(distances)))
    limit = data.draw(st.integers(0, sum(amounts) + 1))
    kept, before = set(), 0
    for i in sorted(range(len(distances)), key=lambda i: (distances[i], i)):
        if before <= limit:
            kept.add(i)
        before += amounts[i]
    selected = sampling._selected(torch.tensor([distances]), torch.tensor([amounts]), torch.tensor([[limit]]))
    assert set(selected[0].nonzero().flatten().tolist()) == kept


def test_an_empty_batch_gives_empty_lists():
    sampled = sample(torch.empty(0, 10), [])
    assert (sampled.tokens, sampled.finite, sampled.logprobs, sampled.errors) == ([], [], [], {})


def test_the_callers_logits_are_left_as_they_were():
    logits = torch.randn(32, 3000, generator=torch.Generator().manual_seed(4))
    before = logits.clone()
    sample(logits, varied_rows(3000, 32))
    assert torch.equal(logits, before)


# ------------------------------------------------------------------------------------------------------ randomness


def test_uniform_is_splitmix64_and_stays_what_it_is():
    assert uniform(0) == (0xE220A8397B1DCDAF >> 11) * 2.0**-53  # the generator's published first output
    assert uniform(42, 0, 7) == 0.06851317113585664
    assert uniform(-1, 2, 3) == uniform(2**64 - 1, 2, 3)


def test_uniform_numbers_are_spread_evenly():
    counts = Counter(int(uniform(5, 0, i) * 50) for i in range(20000))
    chi_square = sum((counts[bin] - 400) ** 2 / 400 for bin in range(50))
    assert chi_square < 99  # 49 degrees of freedom: passed by chance once in 30,000


@pytest.mark.parametrize(
    "other",
    [
        lambda i: (5, 0, i + 1),
        lambda i: (5, 1, i),
        lambda i: (6, 0, i),
        lambda i: (5, i, 0),
        lambda i: (i, 0, 5),
        lambda i: (0, 5, i),
    ],
)
def test_positions_choices_and_seeds_are_uncorrelated(other):
    a = np.array([uniform(5, 0, i) for i in range(20000)])
    b = np.array([uniform(*other(i)) for i in range(20000)])
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03
    cells = Counter(zip((a * 8).astype(int).tolist(), (b * 8).astype(int).tolist(), strict=True))
    assert sum((cells[x, y] - 312.5) ** 2 / 312.5 for x in range(8) for y in range(8)) < 116  # 63 degrees


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 1.4, "top_p": 0.8, "top_k": 8},
        {"temperature": 2.0, "top_p": 1.0, "min_p": 0.2},
        {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.8, "logit_bias": {2: 1.5}},
    ],
)
def test_twenty_thousand_draws_follow_the_exact_probabilities(given):
    logits = torch.tensor([[2.0, 1.0, -1.0, 0.5, 3.0, 0.0, 1.5, -2.0, 2.5, 0.25, 1.75, -0.5]])
    one = row(tokens=[0, 4, 7], num_prompt_tokens=3, **given)
    rows = [replace(one, key=(11, 0, i)) for i in range(20000)]
    counts = Counter(sample(logits.expand(20000, -1), rows).tokens)
    kept = twin_kept(twin_changed(logits[0].numpy(), rows[0]), rows[0].params)
    assert set(counts) == set(kept)
    expected = {token: 20000 * mass / sum(kept.values()) for token, mass in kept.items()}
    chi_square = sum((counts[token] - expected[token]) ** 2 / expected[token] for token in kept)
    assert chi_square < 37  # at most 11 degrees of freedom: once in 9,000


def test_the_same_key_gives_the_same_token_and_another_key_other_tokens():
    logits = torch.zeros(1, 1000)

    def tokens(*keys):
        return sample(logits.expand(len(keys), -1), [row(top_p=1.0, key=key) for key in keys]).tokens

    assert len(set(tokens((1, 0, 5), (1, 0, 5), (1, 0, 5)))) == 1
    assert len(set(tokens((1, 0, 5), (1, 0, 6), (1, 1, 5), (2, 0, 5)))) == 4


def test_the_global_generator_is_neither_read_nor_moved():
    logits, rows = torch.randn(32, 2000), varied_rows(2000, 32)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample(logits, rows)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert sample(logits, rows) == first


@pytest.mark.parametrize("given", [{"top_p": 1.0}, {"top_p": 0.999}, {"top_k": 4}, {"top_p": 1.0, "min_p": 0.1}])
@pytest.mark.parametrize("number", [0.0, ALMOST_ONE])
def test_the_ends_of_the_random_numbers_never_choose_a_masked_token(given, number):
    logits = torch.full((1, 4000), -INF)
    logits[0, [7, 8, 3000]] = torch.tensor([1.0, 2.0, 1.5])
    with drawing(number):
        assert sample(logits, [row(temperature=1.0, **given)]).tokens == [7 if number == 0 else 3000]


def test_a_share_that_ends_at_a_token_belongs_to_the_next():
    logits = torch.zeros(3, 4)
    with drawing(0.25 - 2.0**-50, 0.25, 0.75):
        assert sample(logits, [row(top_p=1.0, key=(i,)) for i in range(3)]).tokens == [0, 1, 3]


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 0.0, -3.0])
def test_a_vanishing_temperature_is_greedy(temperature):
    logits = torch.tensor([[3e38, -3e38, 1.0, -INF]])
    assert sample(logits, [row(temperature=temperature, top_p=1.0)]).tokens == [0]


def test_an_enormous_temperature_makes_all_but_masked_tokens_alike():
    logits = torch.tensor([[9.0, -9.0, -INF, 1.0]])
    with drawing(0.1, 0.4, 0.9):
        rows = [row(temperature=1e300, top_p=1.0, key=(i,)) for i in range(3)]
        assert sample(logits.expand(3, -1), rows).tokens == [0, 1, 3]


def test_the_lowest_of_equal_ids_is_the_best():
    logits = torch.tensor([[1.0, 5.0, 5.0, 5.0]])
    ways = ({"temperature": 0}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 0.0})
    assert sample(logits.expand(3, -1), [row(**way) for way in ways]).tokens == [1, 1, 1]
    assert [token for token, _ in sample(logits, [row(logprobs=2)]).top[0]] == [1, 2]


# ------------------------------------------------------------------------- Hugging Face's processors as an oracle


def distribution(logits, num=4000, **given):
    """The shares in which evenly spaced random numbers choose each token of one row of logits."""
    rows = [row(key=(i,), **given) for i in range(num)]
    with drawing(*((i + 0.5) / num for i in range(num))):
        tokens = sample(logits.expand(num, -1), rows).tokens
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]) / num


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.85, "min_p": 0.05},
        {"temperature": 3.0, "top_k": 30, "top_p": 0.95},
    ],
)
def test_temperature_top_k_top_p_and_min_p_mean_what_they_mean_in_transformers(given):
    hf = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(5)) * 2
    scores = hf.TemperatureLogitsWarper(given["temperature"])(None, logits)
    if "top_k" in given:
        scores = hf.TopKLogitsWarper(given["top_k"])(None, scores)
    if "top_p" in given:
        scores = hf.TopPLogitsWarper(given["top_p"])(None, scores)
    if "min_p" in given:
        scores = hf.MinPLogitsWarper(given["min_p"])(None, scores)
    expected = scores.softmax(-1)[0]
    shares = distribution(logits, **({"top_p": 1.0} | given))
    assert (shares - expected).abs().max() < 1.01 / 4000
    assert not shares[expected == 0].any()


def test_the_repetition_penalty_is_that_of_transformers_to_the_bit():
    hf = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(6)) * 4
    tokens = [1, 5, 5, 250, 7, 1]
    seen = []
    params = SamplingParams(repetition_penalty=1.3, logits_processors=[lambda _, x: seen.append(x.clone()) or x])
    sample(logits, [row(params, tokens, 2)])
    assert torch.equal(seen[0], hf.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([tokens]), logits)[0])


# ----------------------------------------------------------------------------------------- the reference's function


def oracle_top_p(probs, p):
    """The reference's rule, a token at a time; the draw itself must be torch's, to use its generator alike."""
    order = torch.argsort(probs, descending=True).tolist()
    kept, before = torch.zeros(len(order)), 0.0
    for rank, token in enumerate(order):
        if before <= p:
            kept[rank] = probs[token]
        before += probs[token].item()
    return order[torch.multinomial(kept / kept.sum(), 1).item()]


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 0.95, 1.0])
def test_sample_top_p_draws_the_references_tokens_from_the_same_generator(p):
    probs = (torch.randn(50, 64, generator=torch.Generator().manual_seed(7)) * 2).softmax(-1)
    before = probs.clone()
    for seed, row_probs in enumerate(probs):
        torch.manual_seed(seed)
        token = sample_top_p(row_probs, p)
        torch.manual_seed(seed)
        assert token.shape == (1,)
        assert token.item() == oracle_top_p(row_probs, p)
    assert torch.equal(probs, before)


def test_sample_top_p_keeps_the_leading_shape():
    probs = torch.rand(2, 3, 10).softmax(-1)
    assert sample_top_p(probs, 0.9).shape == (2, 3, 1)
    assert sample_top_p(probs[0], 0.0).tolist() == probs[0].argmax(-1, keepdim=True).tolist()


def test_a_batch_draws_as_its_rows_would_by_the_reference():
    probs = torch.randn(4, 20).softmax(-1)
    torch.manual_seed(3)
    ranked = probs.sort(-1, descending=True)
    kept = torch.where(ranked.values.cumsum(-1) - ranked.values > 0.7, 0.0, ranked.values)
    expected = ranked.indices.gather(-1, torch.multinomial(kept / kept.sum(-1, keepdim=True), 1))
    torch.manual_seed(3)
    assert torch.equal(sample_top_p(probs, 0.7), expected)


def test_the_nucleus_keeps_the_first_token_and_one_that_exactly_p_precedes():
    probs = torch.tensor([0.5, 0.25, 0.125, 0.125])
    assert outside_nucleus(probs, 0.0).tolist() == [False, True, True, True]
    assert outside_nucleus(probs, 0.5).tolist() == [False, False, True, True]
    assert outside_nucleus(probs, 0.74).tolist() == [False, False, True, True]
    assert outside_nucleus(probs, 1.0).tolist() == [False] * 4


def test_the_sampler_and_sample_top_p_share_one_mask_function():
    calls = []

    def only_the_first(ranked, limit):
        calls.append(limit)
        return torch.arange(ranked.shape[-1]).expand_as(ranked) > 0

    logits = torch.tensor([[0.0, 0.2, 0.1]])
    with patch.object(sampling, "outside_nucleus", only_the_first), drawing(ALMOST_ONE):
        assert sample_top_p(logits.softmax(-1), 0.99).item() == 1
        assert sample(logits, [row(top_p=0.99)]).tokens == [1]
    assert len(calls) == 2


# -------------------------------------------------------------------------------- non-finite rows, bans, processors


@pytest.mark.parametrize("given", [{"temperature": 0}, {}, {"temperature": 1.0, "top_p": 1.0, "min_p": 0.1}])
@pytest.mark.parametrize("spoilt", [NAN, INF])
def test_a_non_finite_row_is_reported_and_no_other_row_is_touched(given, spoilt):
    logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(8)) * 5
    rows = [row(key=(i,), logprobs=2, **given) for i in range(5)]
    expected = sample(logits, rows)
    logits[1, 2000] = spoilt
    logits[3] = spoilt
    sampled = sample(logits, rows)
    assert sampled.finite == [True, False, True, False, True]
    for i in range(5):
        assert sampled.tokens[i] == (expected.tokens[i] if sampled.finite[i] else -1)
        assert sampled.logprobs[i] == (expected.logprobs[i] if sampled.finite[i] else None)
        assert sampled.top[i] == (expected.top[i] if sampled.finite[i] else None)


@pytest.mark.parametrize("given", [{"temperature": 0}, {}, {"top_p": 1.0}])
def test_a_row_whose_every_token_is_masked_is_not_finite(given):
    logits = torch.zeros(2, 6)
    rows = [row(logit_bias=dict.fromkeys(range(6), -INF), **given), row(banned=range(5), **given)]
    sampled = sample(logits, rows)
    assert (sampled.tokens, sampled.finite) == ([-1, 5], [False, True])


def test_a_row_with_few_tokens_allowed_is_drawn_as_among_all_and_touches_nobody():
    """The rest of the vocabulary is not looked at: not even where a model gave what is no number."""
    chance = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 5000, generator=chance)
    few = [7, 8, 4096, 4999]
    rows = [
        row(temperature=1.5, key=(0, 0, 0)),
        row(temperature=1.5, key=(0, 0, 1), allowed=few),
        row(temperature=0, allowed=few),
        row(temperature=1.5, key=(0, 0, 3), allowed=[*range(3000), 4999]),
        row(temperature=1.5, key=(0, 0, 1), allowed=few, logit_bias={0: 0.0}),  # this one is drawn among all
        row(temperature=1.5, key=(0, 0, 5), allowed=[4999]),
    ]
    logits[4] = logits[1]
    logits[5, :100] = math.nan
    tokens = sample(logits, rows).tokens
    assert tokens[1] == tokens[4] in few
    assert tokens[2] == max(few, key=lambda id: logits[2, id].item())
    assert tokens[5] == 4999
    assert tokens == [sample(logits[i : i + 1], [rows[i]]).tokens[0] for i in range(6)]
    assert not any(sample(torch.full((1, 8), -math.inf), [row(temperature=1, allowed=[1, 2])]).finite)


def test_a_banned_token_is_not_lifted_by_bias_or_processor():
    logits = torch.tensor([[0.0, 9.0, 1.0]])
    params = SamplingParams(temperature=0, logit_bias={1: 100.0}, logits_processors=[lambda _, x: x.clamp(min=0.0)])
    assert sample(logits, [row(params)]).tokens == [1]
    assert sample(logits, [row(params, banned=(1, 1))]).tokens == [2]


def test_a_processor_sees_the_tokens_so_far_and_what_the_one_before_it_gave_once_a_draw():
    calls = []

    def note(tokens, logits):
        calls.append((tokens, logits.tolist()[:2]))
        return logits + 1

    params = SamplingParams(logits_processors=(note, note), logit_bias={1: 2.0}, temperature=1.0)
    sample(torch.zeros(1, 9000), [row(params, tokens=[4, 5])])  # so flat that it is looked at twice
    assert calls == [([4, 5], [0.0, 2.0]), ([4, 5], [1.0, 3.0])]


def test_a_failing_processor_ends_its_own_row_only():
    def fails(tokens, logits):
        raise KeyError("oh")

    rows = [row(key=(i,)) for i in range(4)]
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(9))
    expected = sample(logits, rows).tokens
    rows[1] = row(key=(1,), logits_processors=[fails])
    rows[2] = row(key=(2,), logits_processors=[lambda _, x: x[:3]])
    rows[3] = row(key=(3,), logits_processors=[lambda _, x: None], temperature=0)
    sampled = sample(logits, rows)
    assert sampled.tokens == [expected[0], -1, -1, -1]
    assert sampled.finite == [True, False, False, False]
    assert sorted(sampled.errors) == [1, 2, 3]
    assert isinstance(sampled.errors[1], KeyError)
    words = "logits_processors must be functions that return a tensor of shape (50,), got "
    assert str(sampled.errors[2]) == words + "(3,)"
    assert str(sampled.errors[3]) == words + "None"


def test_rows_that_are_not_resolved_are_an_error_of_the_caller():
    with pytest.raises(AssertionError, match="resolve"):
        SampleRow(SamplingParams(temperature=0.5), [], 0, (0,))


# -------------------------------------------------------------------------------------------------------- logprobs


def test_logprobs_are_the_models_own_whatever_is_done_to_the_logits():
    logits = torch.randn(32, 3000, generator=torch.Generator().manual_seed(10)) * 3
    rows = varied_rows(3000, 32)
    sampled = sample(logits, rows)
    expected = logits.double().log_softmax(-1)
    for i, r in enumerate(rows):
        if r.params.logprobs is None:
            assert sampled.logprobs[i] is None
            assert sampled.top[i] is None
            continue
        assert sampled.logprobs[i] == pytest.approx(expected[i, sampled.tokens[i]].item(), abs=1e-5)
        best = twin_ranking(logits[i])
        assert [token for token, _ in sampled.top[i]] == best[: r.params.logprobs]
        assert [x for _, x in sampled.top[i]] == pytest.approx(expected[i, best[: r.params.logprobs]].tolist())


def test_a_chosen_token_has_the_same_logprob_alone_and_among_the_best():
    sampled = sample(torch.randn(4, 700) * 3, [row(temperature=0, logprobs=1) for _ in range(4)])
    assert [best for (best,) in sampled.top] == list(zip(sampled.tokens, sampled.logprobs, strict=True))


@pytest.mark.parametrize("block", [1, 2 * 901, 1 << 22])
def test_prompt_logprobs_equal_a_log_softmax_row_by_row(block):
    logits = (torch.randn(7, 901, generator=torch.Generator().manual_seed(11)) * 16).round() / 8
    tokens = torch.arange(7) * 100
    with patch.object(sampling, "_BLOCK", block):
        logprobs = logprobs_of(logits, tokens)
        ids, top = top_logprobs(logits, 20)
    for i, of_row in enumerate(logits.double().log_softmax(-1)):
        assert logprobs[i].item() == pytest.approx(of_row[tokens[i]].item(), abs=1e-5)
        best = twin_ranking(logits[i])[:20]
        assert ids[i].tolist() == best
        assert top[i].tolist() == pytest.approx(of_row[best].tolist(), abs=1e-5)


def test_there_are_no_more_best_tokens_than_tokens_and_no_rows_of_none():
    ids, logprobs = top_logprobs(torch.zeros(2, 3), 20)
    assert ids.tolist() == [[0, 1, 2]] * 2
    assert logprobs.shape == (2, 3)
    assert logprobs_of(torch.empty(0, 5), torch.empty(0, dtype=torch.int64)).shape == (0,)
    assert top_logprobs(torch.empty(0, 50), 4)[0].shape == (0, 4)


# ---------------------------------------------------------------------------------------------------- the parameters


def test_what_is_not_given_comes_from_the_model_and_else_from_the_reference():
    reference = SamplingParams().resolve()
    assert (reference.temperature, reference.top_p, reference.top_k) == (0.6, 0.9, 0)
    assert (reference.min_p, reference.repetition_penalty) == (0.0, 1.0)
    config = {"temperature": 0.3, "top_k": 40, "top_p": None, "eos_token_id": [2], "do_sample": True}
    mine = SamplingParams(temperature=0.9, n=2).resolve(config)
    assert (mine.temperature, mine.top_k, mine.top_p, mine.n) == (0.9, 40, 0.9, 2)
    assert SamplingParams().resolve(config).temperature == 0.3


def test_a_zero_that_is_given_is_not_taken_for_something_missing():
    zeros = SamplingParams(temperature=0, top_p=0, top_k=0, min_p=0)
    resolved = zeros.resolve({"temperature": 1.0, "top_p": 0.5, "top_k": 50, "min_p": 0.5})
    assert (resolved.temperature, resolved.top_p, resolved.top_k, resolved.min_p) == (0, 0, 0, 0)


def test_a_model_that_says_not_to_sample_is_greedy_unless_a_temperature_is_given():
    config = {"do_sample": False, "temperature": 0.7}
    assert SamplingParams().resolve(config).temperature == 0.0
    assert SamplingParams(temperature=0.5).resolve(config).temperature == 0.5


def test_resolved_parameters_resolve_to_themselves():
    params = SamplingParams(seed=3).resolve({"top_p": 0.4})
    assert params.resolve({"top_p": 0.8}) is params


def test_a_bad_value_in_a_models_configuration_is_refused_by_name():
    with pytest.raises(SamplingError, match=r"^top_p must be a number from 0 to 1 or None, got 'all'$"):
        SamplingParams().resolve({"top_p": "all"})


def test_parameters_take_the_usual_forms_and_cannot_be_changed():
    bias = {3: 1}
    params = SamplingParams(stop="\n", stop_token_ids=[2], logit_bias=bias, temperature=1, top_k=np.int64(4))
    bias[4] = 2
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("\n",), (2,), {3: 1.0})
    assert (type(params.temperature), type(params.top_k)) == (float, int)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(0.2, 0.8) == SamplingParams(top_p=0.8, temperature=0.2)
    with pytest.raises(FrozenInstanceError):
        params.n = 2


BAD = [
    ("temperature", [NAN, INF, -INF, True, "hot", 10**400], "a finite number (0 or less: greedy) or None"),
    ("top_p", [NAN, INF, -0.1, 1.0001, True, "1"], "a number from 0 to 1 or None"),
    ("min_p", [NAN, INF, -0.1, 1.0001, False], "a number from 0 to 1 or None"),
    ("top_k", [NAN, -1, 2.0, True, 2**64], "a whole number, 0 (off) or more or None"),
    ("repetition_penalty", [NAN, INF, 0, -1.0, 101, True], "a number from 0.01 to 100 (1: off) or None"),
    ("presence_penalty", [NAN, 2.5, -2.5, None, True], "a number from -2 to 2"),
    ("frequency_penalty", [NAN, 2.5, -INF, None, False], "a number from -2 to 2"),
    ("seed", [1.5, NAN, True, 2**63, -(2**63) - 1], "a whole number of 64 bits or None"),
    ("max_tokens", [-1, 1.0, True, INF], "a whole number, 0 or more or None"),
    ("min_tokens", [-1, 1.0, True, None], "a whole number, 0 or more"),
    ("logprobs", [-1, 21, True, 1.0], "a whole number from 0 to 20 or None"),
    ("prompt_logprobs", [-1, 21, False], "a whole number from 0 to 20 or None"),
    ("n", [0, -1, True, 1.0, None], "a whole number, 1 or more"),
    ("ignore_eos", [1, None, "yes"], "True or False"),
    ("echo", [0, None], "True or False"),
    ("stop", ["", ["a", ""], [1], None, 5, b"x"], "a text or a list of texts, none of them empty"),
    ("stop_token_ids", [5, None, "12"], "a list of token ids"),
    ("logit_bias", [None, [1], 3], "a mapping of token ids to numbers"),
    ("logits_processors", [None, abs, [1]], "a list of functions"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), [(n, v, words) for n, bad, words in BAD for v in bad])
def test_a_bad_value_is_refused_in_one_line_by_name_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(SamplingError) as refused:
        SamplingParams(**{name: value})
    message = str(refused.value)
    assert message.startswith(f"{name} must be {allowed}, got ")
    assert "\n" not in message
    assert len(message) < 160
    assert refused.value.param == name
    assert isinstance(refused.value, ValueError)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"stop_token_ids": [1, -2]},
            "stop_token_ids must be made of token ids (whole numbers, 0 or more), got -2",
        ),
        (
            {"stop_token_ids": [True]},
            "stop_token_ids must be made of token ids (whole numbers, 0 or more), got True",
        ),
        (
            {"logit_bias": {"7": 1.0}},
            "logit_bias must be made of token ids (whole numbers, 0 or more), got '7'",
        ),
        (
            {"logit_bias": {7: NAN}},
            "logit_bias must be made of numbers up to 1e30 in size, or -inf (never), got nan",
        ),
        (
            {"logit_bias": {7: INF}},
            "logit_bias must be made of numbers up to 1e30 in size, or -inf (never), got inf",
        ),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens must be at most max_tokens (4), got 5"),
    ],
)
def test_bad_contents_are_refused_with_the_one_that_is_bad(given, message):
    with pytest.raises(SamplingError) as refused:
        SamplingParams(**given)
    assert str(refused.value) == message


@pytest.mark.parametrize("given", [{"logit_bias": {100: 1.0}}, {"stop_token_ids": (2, 100)}])
def test_a_token_outside_the_vocabulary_is_refused(given):
    params = SamplingParams(**given)
    params.validate(101)
    name = next(iter(given))
    with pytest.raises(SamplingError) as refused:
        params.validate(100)
    assert str(refused.value) == f"{name} must be made of ids from 0 to 99 (the vocabulary), got 100"


def test_values_at_the_ends_of_their_ranges_are_taken():
    SamplingParams(temperature=-5, top_p=0, min_p=1, repetition_penalty=0.01, presence_penalty=-2)
    SamplingParams(logprobs=0, prompt_logprobs=20, max_tokens=0, min_tokens=0, seed=-(2**63), top_k=10**9)
    SamplingParams(logit_bias={0: -INF, 1: -100}, max_tokens=5, min_tokens=5)
