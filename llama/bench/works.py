"""What is measured: a prompt, an answer after contexts of several lengths, answers of several requests at once."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """So many prompts of one length, and how many tokens each generates; 1: how soon the first one comes."""

    num_prompts: int
    prompt_tokens: int
    num_tokens: int

    @property
    def is_prompt(self) -> bool:
        return self.num_tokens == 1

    @property
    def length(self) -> int:
        """Tokens of a prompt and its answer."""
        return self.prompt_tokens + self.num_tokens

    @property
    def tokens(self) -> int:
        """How many tokens the seconds that are measured compute: the prompt's, or one step's."""
        return self.prompt_tokens if self.is_prompt else self.num_prompts

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """New ones each time, so that nobody has begun with them before."""
        return [random.choices(range(3, vocab_size), k=self.prompt_tokens) for _ in range(self.num_prompts)]


WORKS = {
    "prompt-512": Work(1, 512, 1),
    "context-0": Work(1, 1, 33),
    "context-512": Work(1, 512, 33),
    "context-4096": Work(1, 4096, 17),
    "batch-1": Work(1, 32, 33),
    "batch-8": Work(8, 32, 17),
    "batch-32": Work(32, 32, 17),
}
"""By name: a context is what lies before an answer; a batch answers that many prompts of 32 tokens at once."""


@dataclass(frozen=True)
class Effort:
    """What a model's weights ask of the machine, as our side tells it when it has loaded them."""

    weight_bytes: int  # of all linears, which every step reads
    kv_bytes_per_token: int
    inner_products: int  # multiplications of a row with all linears but the output layer
    output_products: int

    def bytes_read(self, work: Work) -> int:
        """By one step in the midst of the answers."""
        context = work.prompt_tokens + work.num_tokens // 2
        return self.weight_bytes + work.num_prompts * context * self.kv_bytes_per_token

    def operations(self, work: Work) -> int:
        """Of the linears, in a prompt or in one step; a prompt's output layer has one row."""
        return 2 * (self.inner_products * work.tokens + self.output_products * work.num_prompts)
