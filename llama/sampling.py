"""The sampler: logits to tokens, all rows of a step at once.

The order is the usual one of Hugging Face's processors: penalties, bias, the caller's own processors, what the answer's
constraint allows, banned tokens; then temperature, top_k, top_p, min_p. A row's result depends on that row alone: its
randomness is one number made from its key, and its probabilities are added up as whole numbers, exactly, in whatever
order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from llama.masks import NO_IDS, allowed_ids, excluded_ids
from llama.sampling_params import SamplingError, SamplingParams


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What must be known of the request whose next token a row of logits decides."""

    params: SamplingParams  # resolved
    tokens: Sequence[int]  # the prompt, then the answer so far; read only for penalties and processors
    num_prompt_tokens: int
    key: tuple[int, ...]  # what this draw's randomness is made from: (seed, choice index, position)
    banned: Sequence[int] = ()  # ids that must not come now: what would stop, before min_tokens are there
    allowed: bytes | None = None  # what a constraint lets come now: one bit an id, the lowest first; None: all

    def __post_init__(self) -> None:
        assert self.params.is_resolved, "SamplingParams.resolve() first"

    @property
    def changes_logits(self) -> bool:
        """Whether anything besides temperature, top_k, top_p and min_p is asked for."""
        return self.allowed is not None or self.shifts_logits

    @property
    def shifts_logits(self) -> bool:
        """The same, and besides what a constraint allows."""
        params = self.params
        return bool(
            params.repetition_penalty != 1
            or params.presence_penalty
            or params.frequency_penalty
            or params.logit_bias
            or params.logits_processors
            or self.banned
        )


@dataclass(frozen=True)
class Sampled:
    """The outcome of a step; each list has one entry a row.

    A row is not `finite` when its largest logit is not a finite number: the model gave NaN or infinity, every
    token is masked, or its own processor failed. It gets token -1, and no other row is touched by it. A token
    with a logit of -inf is masked, which is in order as long as another is not.
    """

    tokens: list[int]
    finite: list[bool]
    logprobs: list[float | None]  # the chosen tokens', for rows whose params.logprobs is not None
    top: list[list[tuple[int, float]] | None]  # the params.logprobs best (id, logprob), best first
    errors: dict[int, Exception]  # row -> what its own logits processor raised


def uniform(*key: int) -> float:
    """A number in [0, 1), a pure function of the key's integers (64 bits of each count).

    Each integer picks an output of the SplitMix64 generator (Steele, Lea, Flood, "Fast splittable pseudorandom
    number generators", 2014) whose state is what the integers before it picked.
    """
    state, mask, golden = 0, 2**64 - 1, 0x9E3779B97F4A7C15
    for word in key:
        state = (state + (word + 1) * golden) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return (state >> 11) * 2.0**-53


def outside_nucleus(ranked: Tensor, limit: Tensor | float) -> Tensor:
    """What top-p drops: entries that are preceded by more than `limit` in sum.

    ranked: (..., n) probabilities, or whole-number weights, best first. -> (..., n) bool. A limit of 0 keeps the
    first; an entry that exactly the limit precedes is kept.
    """
    return ranked.cumsum(dim=-1) - ranked > limit


def sample_top_p(probs: Tensor, p: float) -> Tensor:
    """Draw from the nucleus by torch's global generator, token for token as the reference's function does.

    probs: (..., vocab), not changed. -> (..., 1) int64.
    """
    ranked, ids = probs.sort(dim=-1, descending=True)
    ranked = ranked.masked_fill(outside_nucleus(ranked, p), 0.0)
    ranked /= ranked.sum(dim=-1, keepdim=True)
    picks = torch.multinomial(ranked.reshape(-1, ranked.shape[-1]), num_samples=1)
    return ids.gather(-1, picks.reshape(*probs.shape[:-1], 1))


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Each row's log-softmax at one token: (rows, vocab) float32, (rows,) int64 -> (rows,) float32.

    Temperature and truncation have no part in it, as in the reference.
    """
    blocks = zip(_in_blocks(logits, logits.shape[-1]), _in_blocks(tokens, logits.shape[-1]), strict=True)
    return torch.cat([part.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1) for part, ids in blocks])


def top_logprobs(logits: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Each row's `num` best tokens (at most the vocabulary), best first, of equals the lower id first.

    logits: (rows, vocab) float32. -> ids (rows, num) int64, log-softmax there (rows, num) float32.
    """
    ids, logprobs = [], []
    for part in _in_blocks(logits, logits.shape[-1]):
        distances, nearest = _nearest(-part, 2 * num)  # some more: equals at the very end are there by chance
        order = distances.sort(dim=-1, stable=True).indices[:, :num]
        ids.append(nearest.gather(-1, order))
        logprobs.append(part.log_softmax(-1).gather(-1, ids[-1]))
    return torch.cat(ids), torch.cat(logprobs)


_BLOCK = 1 << 22  # logits worked on at once: bounds a large batch's scratch memory, and keeps it near caches


def _in_blocks(rows: Tensor | Sequence, vocab_size: int) -> Iterator:
    """Slices of as many rows as make _BLOCK logits; of no rows, one empty slice."""
    size = max(1, _BLOCK // vocab_size)
    return (rows[start : start + size] for start in range(0, max(1, len(rows)), size))


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[SampleRow]) -> Sampled:
    """Choose a token for each row of logits (rows, vocab) float32, which are not changed.

    Tokens leave the device together: once for rows whose logits are drawn from as they are, once for those with
    penalties and the like, and again for rows with an uncommonly wide nucleus and for logprobs.
    """
    assert logits.dtype == torch.float32, logits.dtype
    assert logits.shape[0] == len(rows), (logits.shape, len(rows))
    if logits.device.type not in ("cpu", "cuda"):
        logits = logits.cpu()  # float64 is needed, which others may lack
    few = {i: ids for i, row in enumerate(rows) if len(ids := _few_allowed(row, logits.shape[-1]))}
    plain = [i for i, row in enumerate(rows) if not row.changes_logits]
    changing = [i for i, row in enumerate(rows) if row.changes_logits and i not in few]
    changed = logits[changing] if changing else logits
    errors = _change(changed, [rows[i] for i in changing]) if changing else {}
    chosen = _choose(logits, [(i, rows[i]) for i in plain])
    chosen += _choose(changed, [(place, rows[i]) for place, i in enumerate(changing)])
    chosen += _choose_among(few, logits, rows)
    tokens = [token for _, token in sorted(zip([*plain, *changing, *few], chosen, strict=True))]
    logprobs, top = _logprobs_asked_for(logits, rows, tokens)
    return Sampled(
        tokens=tokens,
        finite=[token != _NOT_FINITE for token in tokens],
        logprobs=logprobs,
        top=top,
        errors={changing[place]: error for place, error in errors.items()},
    )


def _logprobs_asked_for(logits: Tensor, rows: Sequence[SampleRow], tokens: list[int]) -> tuple[list, list]:
    logprobs, top = [None] * len(rows), [None] * len(rows)
    asking = [i for i, row in enumerate(rows) if row.params.logprobs is not None and tokens[i] != _NOT_FINITE]
    if asking:
        chosen = torch.tensor([tokens[i] for i in asking], device=logits.device)
        for i, logprob in zip(asking, logprobs_of(logits[asking], chosen).tolist(), strict=True):
            logprobs[i], top[i] = logprob, []
    ranking = [i for i in asking if rows[i].params.logprobs]
    if ranking:
        best = top_logprobs(logits[ranking], max(rows[i].params.logprobs for i in ranking))
        for i, *pairs in zip(ranking, *(part.tolist() for part in best), strict=True):
            top[i] = list(zip(*pairs, strict=True))[: rows[i].params.logprobs]
    return logprobs, top


def _change(logits: Tensor, rows: Sequence[SampleRow]) -> dict[int, Exception]:
    """All that changes logits, in place on (rows, vocab); -> what processors raised, by row."""
    _penalise_repetition(logits, rows)
    _add(logits, [_answer_penalties(row) for row in rows])
    _add(logits, [row.params.logit_bias for row in rows])
    errors = _process(logits, rows)
    _constrain(logits, rows)
    logits[_places([set(row.banned) for row in rows], logits.device)] = -math.inf  # last: nothing lifts a ban
    return errors


def _places(ids: Sequence[Collection[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every id, where ids[i] are of row i."""
    lengths = torch.tensor([len(of_row) for of_row in ids])
    columns = torch.tensor(list(chain.from_iterable(ids)), dtype=torch.int64)
    return torch.arange(len(ids)).repeat_interleave(lengths).to(device), columns.to(device)


def _penalise_repetition(logits: Tensor, rows: Sequence[SampleRow]) -> None:
    """Weaken each token seen by a factor (CTRL, Keskar et al. 2019; negative logits as Hugging Face does)."""
    penalties = [row.params.repetition_penalty for row in rows]
    places = _places([set(row.tokens) if row.params.repetition_penalty != 1 else () for row in rows], logits.device)
    factors = torch.tensor(penalties, dtype=torch.float32, device=logits.device)[places[0]]
    scores = logits[places]
    logits[places] = torch.where(scores < 0, scores * factors, scores / factors)


def _answer_penalties(row: SampleRow) -> dict[int, float]:
    """What OpenAI's presence and frequency penalties add to the answer's tokens."""
    presence, frequency = row.params.presence_penalty, row.params.frequency_penalty
    if not presence and not frequency:
        return {}
    counts = Counter(row.tokens[row.num_prompt_tokens :])
    return {token: -(presence + frequency * count) for token, count in counts.items()}


def _add(logits: Tensor, additions: Sequence[Mapping[int, float]]) -> None:
    values = list(chain.from_iterable(of_row.values() for of_row in additions))
    logits[_places(additions, logits.device)] += torch.tensor(values, dtype=logits.dtype, device=logits.device)


def _process(logits: Tensor, rows: Sequence[SampleRow]) -> dict[int, Exception]:
    errors = {}
    for i, row in enumerate(rows):
        try:
            for processor in row.params.logits_processors:
                result = processor(list(row.tokens), logits[i])
                if not isinstance(result, Tensor) or result.shape != logits[i].shape:
                    given = tuple(result.shape) if isinstance(result, Tensor) else result
                    allowed = f"functions that return a tensor of shape {tuple(logits[i].shape)}"
                    raise SamplingError("logits_processors", allowed, given)
                logits[i] = result
        except Exception as error:  # the caller's code may end its own request, never the others' step
            errors[i] = error
            logits[i] = math.nan
    return errors


def _constrain(logits: Tensor, rows: Sequence[SampleRow]) -> None:
    """Mask what the constraints of rows do not allow."""
    places = [i for i, row in enumerate(rows) if row.allowed is not None]
    if not places:
        return
    excluded = excluded_ids([rows[i].allowed for i in places], logits.shape[-1], logits.device)
    if len(places) == len(rows):
        logits.masked_fill_(excluded, -math.inf)
    else:
        logits[places] = logits[places].masked_fill_(excluded, -math.inf)


def _few_allowed(row: SampleRow, vocab_size: int) -> np.ndarray:
    """The ids, in order, that come into question where nothing but a constraint changes logits and it allows few."""
    is_shifted = row.allowed is None or row.shifts_logits
    return NO_IDS if is_shifted else allowed_ids(row.allowed, vocab_size, most=_LEADING)


def _choose_among(few: Mapping[int, np.ndarray], logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """A token for each row that has few in question: they are drawn from in a row of their own.

    It always has the same width: how many others there are does not change a sum's low bits.
    """
    if not few:
        return []
    ids = np.zeros((len(few), _LEADING), np.int64)
    masked = np.ones(ids.shape, bool)
    for place, of_row in enumerate(few.values()):
        ids[place, : len(of_row)], masked[place, : len(of_row)] = of_row, False
    columns = torch.from_numpy(ids).to(logits.device)
    short = logits[torch.tensor(list(few), device=logits.device)[:, None], columns]
    short.masked_fill_(torch.from_numpy(masked).to(logits.device), -math.inf)
    chosen = _choose(short, [(place, rows[i]) for place, i in enumerate(few)])
    return [int(ids[place, column]) if column >= 0 else column for place, column in enumerate(chosen)]


Draw = Callable[[Tensor, Sequence[SampleRow]], Tensor]  # logits (n, vocab), their n rows -> tokens (n,) int64

_NOT_FINITE, _UNDECIDED = -1, -2  # in a token's place: there is none; this way of drawing did not find it
_LEADING = 256  # so many tokens are ranked at first: most nuclei of a language model end among them


def _choose(logits: Tensor, rows: Sequence[tuple[int, SampleRow]]) -> list[int]:
    """A token for each (place in logits, row), or _NOT_FINITE."""
    tokens, ways = [_UNDECIDED] * len(rows), [iter(_ways(row.params)) for _, row in rows]
    while waiting := [i for i, token in enumerate(tokens) if token == _UNDECIDED]:
        groups: dict[Draw, list[int]] = {}
        for i in waiting:
            groups.setdefault(next(ways[i]), []).append(i)
        blocks = [(draw, block) for draw, group in groups.items() for block in _in_blocks(group, logits.shape[-1])]
        drawn = [
            draw(_rows_at(logits, [rows[i][0] for i in block]), [rows[i][1] for i in block]) for draw, block in blocks
        ]
        order = chain.from_iterable(block for _, block in blocks)
        drawn = drawn[0] if len(drawn) == 1 else torch.cat(drawn)
        for i, token in zip(order, drawn.tolist(), strict=True):
            tokens[i] = token
    return tokens


def _ways(params: SamplingParams) -> tuple[Draw, ...]:
    """How a row's token may be found, the quickest first; every way that decides comes to the same token.

    The last always decides, and the first does where the row is not finite.
    """
    if params.temperature <= 0:
        return (_draw_best,)
    return (_draw_from_leading, _draw_from_all) if params.top_k or params.top_p < 1 else (_draw_from_all,)


def _rows_at(logits: Tensor, places: list[int]) -> Tensor:
    """These rows (ascending): a view where they are neighbours, else a copy."""
    first, end = places[0], places[-1] + 1
    return logits[first:end] if end - first == len(places) else logits[places]


def _draw_best(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    if logits.device.type == "cpu":  # numpy takes 6 us for a row of 49,152 where torch takes 144
        numbers = logits.numpy()
        ids = numbers.argmax(axis=-1).tolist()
        return torch.tensor([id if math.isfinite(numbers[row, id]) else _NOT_FINITE for row, id in enumerate(ids)])
    ids = logits.argmax(dim=-1, keepdim=True)
    return ids.where(logits.gather(-1, ids).isfinite(), _NOT_FINITE).squeeze(-1)


def _draw_from_all(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Find by selection which tokens are kept; without top_k and top_p, there is nothing to select."""
    draw, temperature, top_k, top_p, min_p = _columns(rows, logits.device)
    distances, probs, finite = _probabilities(logits, temperature)
    weights = _weights(probs)
    if any(row.params.top_k for row in rows):
        limit = top_k.clamp(max=logits.shape[-1]).to(torch.int64) - 1
        weights.masked_fill_(~_selected(distances, torch.ones_like(weights), limit), 0)
    least = min_p * weights.amax(dim=-1, keepdim=True)
    if any(row.params.top_p < 1 for row in rows):
        limit = (top_p * weights.sum(dim=-1, keepdim=True)).to(torch.int64)
        weights.masked_fill_(~_selected(distances, weights, limit), 0)
    if any(row.params.min_p for row in rows):
        weights.masked_fill_(weights < least, 0)
    return _inverse(weights, draw).squeeze(-1).where(finite, _NOT_FINITE)


def _selected(distances: Tensor, amounts: Tensor, limit: Tensor) -> Tensor:
    """The nearest tokens up to where more than `limit` (rows, 1) int64 of their amounts has been added up.

    distances (rows, vocab) float32, 0 or more; amounts (rows, vocab) int64 -> (rows, vocab) bool, what sorting by
    (distance, id) and `outside_nucleus` would keep. A radix selection: the bits of such a float rise with it, so
    amounts are added up by the upper bits, then by the lower ones of those in whose midst the limit lies.
    """
    keys = distances.view(torch.int32)
    selected = torch.zeros_like(keys, dtype=torch.bool)
    at_limit = ~selected
    for shift, num_bits in ((15, 16), (0, 15)):
        digits = ((keys >> shift) & (2**num_bits - 1)).to(torch.int64)
        amounts = amounts.where(at_limit, 0)
        sums = amounts.new_zeros(len(keys), 2**num_bits).scatter_add_(-1, digits, amounts)
        last = (~outside_nucleus(sums, limit)).sum(dim=-1, keepdim=True) - 1
        selected |= at_limit & (digits < last)
        at_limit &= digits == last
        limit = limit - (sums.cumsum(dim=-1) - sums).gather(-1, last)
    return selected | (at_limit & ~outside_nucleus(amounts.where(at_limit, 0), limit))


def _draw_from_leading(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Rank a few of the best tokens, and draw where it is certain that no other would be kept."""
    draw, temperature, top_k, top_p, min_p = _columns(rows, logits.device)
    distances, probs, finite = _probabilities(logits, temperature)
    distances, ids = _nearest(distances, _LEADING)
    distances, order = distances.sort(dim=-1, stable=True)  # equals: the lower id first
    ranked = _weights(probs.gather(-1, ids)).gather(-1, order)
    num, vocab_size = ranked.shape[-1], logits.shape[-1]

    ranked.masked_fill_(torch.arange(num, device=ranked.device) >= top_k, 0)
    total = ranked.sum(dim=-1, keepdim=True)
    if num < vocab_size and not all(row.params.top_k for row in rows):
        total = total.where(top_k < math.inf, _weights(probs).sum(dim=-1, keepdim=True))
    ranked.masked_fill_(outside_nucleus(ranked, (top_p * total).to(torch.int64)), 0)
    ranked.masked_fill_(ranked < min_p * ranked[:, :1], 0)

    kept = torch.zeros_like(ranked).scatter(-1, order, ranked)  # by id again, the order of every draw
    tokens = ids.gather(-1, _inverse(kept, draw)).squeeze(-1)
    if num < vocab_size:
        doubtful = distances == distances[:, -1:]  # others as far away may have been left out
        undecided = ((ranked > 0) & doubtful).any(dim=-1) | ((num < top_k) & (top_k < math.inf)).squeeze(-1)
        tokens = tokens.where(~undecided, _UNDECIDED)
    return tokens.where(finite, _NOT_FINITE)


def _nearest(distances: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Each row's `num` smallest distances and their ids, by id; or all of them, where leaving out saves little.

    Of several equal to the largest, some may be left out.
    """
    vocab_size = distances.shape[-1]
    if 4 * num >= vocab_size:
        return distances, torch.arange(vocab_size, device=distances.device).expand_as(distances)
    values, ids = distances.topk(num, dim=-1, largest=False, sorted=False)
    ids, order = ids.sort(dim=-1)
    return values.gather(-1, order), ids


def _columns(rows: Sequence[SampleRow], device: torch.device) -> tuple[Tensor, ...]:
    """Each row's random number, temperature, top_k (off: inf), top_p and min_p, as (rows, 1) float64 each."""
    table = []
    for row in rows:
        params = row.params
        top_k = params.top_k or math.inf
        table.append((uniform(*row.key), params.temperature, top_k, params.top_p, params.min_p))
    return torch.tensor(table, dtype=torch.float64, device=device).unsqueeze(-1).unbind(1)


def _probabilities(logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How far each logit is below its row's largest, and the softmax at the row's temperature (both rows, vocab);
    whether the row has one (rows,).
    """
    peaks = logits.amax(dim=-1, keepdim=True)
    distances = peaks - logits
    divisors = -temperature.clamp(1e-30, 1e30).float()  # normal in float32: 0 / 0 and inf / inf cannot arise
    return distances, (distances / divisors).softmax(dim=-1), peaks.isfinite().squeeze(-1)


def _weights(probs: Tensor) -> Tensor:
    """Probabilities in units of 2**-52, int64: every sum of a row's is exact, here and as float64."""
    return (probs * 2.0**52).to(torch.int64)


def _inverse(weights: Tensor, draw: Tensor) -> Tensor:
    """The column (rows, 1) where the share `draw` (rows, 1) of a row's sum falls; its weight is never 0."""
    sums = weights.cumsum(dim=-1)
    total = sums[:, -1:]
    target = torch.minimum((draw * total).to(torch.int64), total - 1)
    found = torch.searchsorted(sums, target, right=True)
    return found.clamp_(max=weights.shape[-1] - 1)  # past the end in rows of NaN only
