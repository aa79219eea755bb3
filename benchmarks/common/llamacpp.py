"""llama.cpp generating for many sequences at once, measured from outside: a child process that speaks JSON lines.

Run by another interpreter that has llama-cpp-python 0.3.36 (and need not have torch); the one argument is the number of
threads. One request a line on standard input, one answer a line on standard output:

    {"load": "model.gguf"}  ->  {"vocab_size": 32000}
    {"prompts": [[1, 2], ...], "num_tokens": [16, ...], "flash": true}
        ->  {"seconds": 1.5, "prefill_seconds": 0.5, "tokens": [[3, ...], ...]}
    {"quantize": "model.gguf", "to": "small.gguf", "type": "q4_0"}  ->  {}     every matrix in that type

All prompts are computed in batches of up to 2048 tokens, whatever their sequences; then every step decodes one token of
every sequence that is not done. The next token is the likeliest one, found by numpy in microseconds: no sampler runs.
`flash` is flash attention. Every sequence has a key/value stream of its own, as `llama.h` advises where prefixes are
not shared: in one unified buffer each would be masked out for all others. Streams are computed together only where
their numbers are neighbours, so sequences are numbered by how much they generate: those under way are 0 ... k - 1.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence

import llama_cpp as cpp
import numpy as np

BATCH, MICRO_BATCH = 2048, 512  # tokens in a call of llama_decode, and in a pass through the model
CONTEXT_UNIT = 256  # llama.cpp rounds a sequence's context up to a multiple of this

Entry = tuple[int, int, int, bool]  # token, position, sequence, whether its logits are wanted


@cpp.llama_log_callback
def silent(level: int, text: bytes, user_data: object) -> None:
    """Takes llama.cpp's log, which would go to standard error."""


def chunks(entries: Sequence[Entry], size: int) -> Iterator[Sequence[Entry]]:
    for first in range(0, len(entries), size):
        yield entries[first : first + size]


class Model:
    """A GGUF file that is loaded, as llama.cpp's own programs load it."""

    def __init__(self, path: str, threads: int):
        self.threads = threads
        self.model = cpp.llama_model_load_from_file(path.encode(), cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocab_size = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(self.model))

    def context(self, num_sequences: int, length: int, flash: bool) -> Context:
        """A context with room for so many sequences of this length."""
        params = cpp.llama_context_default_params()
        params.n_ctx = num_sequences * -(-length // CONTEXT_UNIT) * CONTEXT_UNIT
        params.n_seq_max = num_sequences
        params.kv_unified = False
        params.n_batch, params.n_ubatch = BATCH, MICRO_BATCH
        params.n_threads = params.n_threads_batch = self.threads
        kinds = (cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED, cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED)
        params.flash_attn_type = kinds[flash]
        return Context(cpp.llama_init_from_model(self.model, params), self.vocab_size)


class Context:
    """llama.cpp's memory of sequences, and a batch to fill. Close it after use."""

    def __init__(self, context: object, vocab_size: int):
        if not context:
            raise RuntimeError("llama.cpp cannot make a context of that size")
        self.context = context
        self.vocab_size = vocab_size
        self.batch = cpp.llama_batch_init(BATCH, 0, 1)

    def close(self) -> None:
        cpp.llama_batch_free(self.batch)
        cpp.llama_free(self.context)

    def clear(self) -> None:
        cpp.llama_memory_clear(cpp.llama_get_memory(self.context), False)

    def decode(self, entries: Sequence[Entry]) -> dict[int, int]:
        """Computes one batch; the likeliest next token by sequence, where logits were wanted."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = cpp.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode gave status {status} for a batch of {len(entries)}")
        return {sequence: self._likeliest(i) for i, (_, _, sequence, wanted) in enumerate(entries) if wanted}

    def _likeliest(self, index: int) -> int:
        logits = cpp.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())

    def prefill(self, prompts: list[list[int]]) -> list[list[int]]:
        """The first token after each prompt, as a list of one."""
        entries = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        outputs: list[list[int]] = [[] for _ in prompts]
        for chunk in chunks(entries, BATCH):
            for sequence, token in self.decode(chunk).items():
                outputs[sequence].append(token)
        return outputs

    def generate(self, prompts: list[list[int]], outputs: list[list[int]], num_tokens: list[int]) -> None:
        """Fills `outputs` up to `num_tokens`, which must not grow from one prompt to the next."""
        for step in range(1, max(num_tokens)):
            active = [sequence for sequence, count in enumerate(num_tokens) if count > step]
            entries = [(outputs[s][-1], len(prompts[s]) + step - 1, s, True) for s in active]
            for sequence, token in self.decode(entries).items():
                outputs[sequence].append(token)


FILE_TYPES = {"q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q4_k": 14, "q6_k": 18}  # llama_ftype


def quantize(source: str, target: str, type: str, threads: int) -> dict:
    """Writes the model with every matrix in one type, the output layer too."""
    params = cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure, params.allow_requantize = threads, FILE_TYPES[type], True, True
    status = cpp.llama_model_quantize(source.encode(), target.encode(), params)
    if status != 0:
        raise RuntimeError(f"llama_model_quantize gave status {status} for {source}")
    return {}


def run(model: Model, prompts: list[list[int]], num_tokens: list[int], flash: bool) -> dict:
    """Continues each prompt; making the context and a first batch that warms it up are not timed."""
    order = sorted(range(len(prompts)), key=lambda i: -num_tokens[i])
    prompts, num_tokens = [prompts[i] for i in order], [num_tokens[i] for i in order]
    longest = max(len(prompt) + count for prompt, count in zip(prompts, num_tokens, strict=True))
    context = model.context(len(prompts), longest, flash)
    context.decode([(prompts[0][0], 0, 0, True)])
    context.clear()
    start = time.perf_counter()
    outputs = context.prefill(prompts)
    prefilled = time.perf_counter()
    context.generate(prompts, outputs, num_tokens)
    done = time.perf_counter()
    context.close()
    return {
        "seconds": done - start,
        "prefill_seconds": prefilled - start,
        "tokens": [tokens for _, tokens in sorted(zip(order, outputs, strict=True))],
    }


def main() -> None:
    """Answer requests until standard input ends."""
    cpp.llama_log_set(silent, None)
    cpp.llama_backend_init()
    threads, model = int(sys.argv[1]), None
    for line in sys.stdin:
        request = json.loads(line)
        if "load" in request:
            model = Model(request["load"], threads)
            answer = {"vocab_size": model.vocab_size}
        elif "quantize" in request:
            answer = quantize(request["quantize"], request["to"], request["type"], threads)
        else:
            answer = run(model, **request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
