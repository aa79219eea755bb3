"""Answers that a constraint allows, taken at random without any model."""

import random

import numpy as np

from llama import SamplingParams
from llama.constraints import Constraints
from llama.tokenizer import StreamDecoder, Tokenizer


def random_answer(
    constraints: Constraints, tokenizer: Tokenizer, chance: random.Random, params: SamplingParams, limit: int = 10_000
) -> str | None:
    """The text of an answer that takes any allowed token each time; None where it goes on beyond so many."""
    matcher = constraints.matcher(params, tokenizer.stop_ids)
    decoder, texts = StreamDecoder(tokenizer), []
    while not matcher.is_complete:
        bits = np.frombuffer(matcher.allowed(), np.uint8)
        assert matcher.error is None
        token = int(chance.choice(np.flatnonzero(np.unpackbits(bits, bitorder="little"))))
        if token in tokenizer.stop_ids:
            break
        matcher.take(token)
        texts.append(decoder.push(token))
        if len(texts) == limit:
            return None
    return "".join(texts) + decoder.flush()
