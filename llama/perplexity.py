"""How well a model predicts a text: the measure on which claims of quality rest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llama.answer import Query
from llama.files.errors import CheckpointError
from llama.files.text import read_text
from llama.generation import Llama
from llama.sampling_params import SamplingParams

WINDOW = 2048  # tokens, where the model's context is longer


@dataclass(frozen=True)
class Perplexity:
    num_tokens: int  # that were predicted
    perplexity: float  # exp of their mean negative log-probability
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


def decoded_text(path: Path, encoding: str = "utf-8") -> str:
    """A file's text, without a byte order mark. Raises ValueError, in one line, where it is not in this encoding."""
    try:
        text = read_text(path, encoding)
    except CheckpointError as error:
        raise ValueError(f"{error}; give the text's own with --encoding, as latin-1 or gb18030") from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def perplexity(
    llm: Llama,
    text: str,
    window: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    adapter: str | None = None,
) -> Perplexity:
    """The perplexity of `text` under a sliding window.

    Every token but the first is predicted once, from the tokens before it in a window of `window` tokens that moves
    on by `stride` (half a window if None), so that all but the first window's see at least window - stride others.
    A BOS stands before each window where the tokenizer wants one. `progress` gets (tokens done, tokens in all).
    `adapter` is the name of one beside the model.
    """
    bos = [llm.tokenizer.bos_id] if llm.tokenizer.add_bos else []
    longest = llm.max_seq_len
    window = window or min(WINDOW, longest)
    stride = stride or max(1, window // 2)
    if not len(bos) < window <= longest or not 0 < stride <= window - len(bos):
        raise ValueError(
            f"window is {window} and stride {stride}: a window has {len(bos) + 1} to {longest} tokens, "
            f"a stride 1 to {window - len(bos)}"
        )
    tokens = llm.tokenizer.encode(text, bos=False, eos=False)
    total = len(tokens) - 1 + len(bos)
    if total < 1:
        raise ValueError(f"the text has {len(tokens)} token(s): give one of two or more")
    params = SamplingParams(max_tokens=0, prompt_logprobs=0).resolve()
    fresh: list[int] = []  # how many of each window's last tokens no window before it has predicted

    def windows() -> Iterator[Query]:
        end = 0
        while end < len(tokens):
            previous, end = end, min(len(tokens), end + (stride if end else window - len(bos)))
            part = bos + tokens[max(0, end - window + len(bos)) : end]
            fresh.append(min(end - previous, len(part) - 1))
            yield Query(part, params, adapter=adapter)

    started = time.perf_counter()
    negative, done = 0.0, 0
    for completion in llm.run(windows()):
        if completion.finish_reason == "error":
            raise RuntimeError(completion.error)
        number = fresh[completion.place]
        negative -= sum(entry.logprob for entry in completion.prompt_logprobs[-number:])
        done += number
        if progress:
            progress(done, total)
    return Perplexity(done, math.exp(negative / done), time.perf_counter() - started)
