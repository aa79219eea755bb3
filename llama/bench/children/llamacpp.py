"""llama.cpp, as `lines.py` says, and its fork ik_llama.cpp: run by an interpreter that has llama-cpp-python 0.3.36, or
ik-llama-cpp-python, and need not have torch.

"pack" writes a file with every matrix in one type, the output layer too. "logits" writes what follows each of `tokens`
to the file `to`: float32, (tokens, vocab_size). "run" takes `num_tokens` also as one number a prompt, and `flash`,
whether attention is flash attention. All prompts are computed in batches of up to 2048 tokens, whatever their
sequences; then every step decodes one token of every sequence that is not done. The next token is the likeliest one,
found by numpy in microseconds: no sampler runs. Every sequence has a key/value stream of its own, as `llama.h` advises
where prefixes are not shared: in one unified buffer each would be masked out for all others. Streams are computed
together only where their numbers are neighbours, so sequences are numbered by how much they generate: those under way
are 0 ... k - 1.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from lines import answer_lines

try:
    import llama_cpp as cpp

    IS_FORK = False
except ImportError:
    from ik_llama_cpp import _ctypes_api as cpp  # the older interface that the fork keeps

    IS_FORK = True

BATCH, MICRO_BATCH = 2048, 512  # tokens in a call of llama_decode, and in a pass through the model
CONTEXT_UNIT = 256  # llama.cpp rounds a sequence's context up to a multiple of this
FILE_TYPES = {"q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q4_k": 14, "q6_k": 18}  # llama_ftype

Entry = tuple[int, int, int, bool]  # token, position, sequence, whether its logits are wanted


def chunks(entries: Sequence[Entry], size: int) -> Iterator[Sequence[Entry]]:
    for first in range(0, len(entries), size):
        yield entries[first : first + size]


class Model:
    """A GGUF file that is loaded, as llama.cpp's own programs load it; the fork's at its best, packed anew."""

    def __init__(self, path: str, threads: int):
        self.threads = threads
        params = cpp.llama_model_default_params()
        if IS_FORK:
            params.repack_tensors = True
        self.model = cpp.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocab_size = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(self.model))

    def context(self, num_sequences: int, length: int, flash: bool) -> Context:
        """A context with room for so many sequences of this length."""
        params = cpp.llama_context_default_params()
        params.n_ctx = num_sequences * -(-length // CONTEXT_UNIT) * CONTEXT_UNIT
        params.n_seq_max = num_sequences
        params.n_batch, params.n_ubatch = BATCH, MICRO_BATCH
        params.n_threads = params.n_threads_batch = self.threads
        if IS_FORK:
            params.flash_attn = flash
        else:
            params.kv_unified = False
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
        if IS_FORK:
            cpp.llama_kv_cache_clear(self.context)
        else:
            cpp.llama_memory_clear(cpp.llama_get_memory(self.context), False)

    def decode(self, entries: Sequence[Entry]) -> dict[int, int]:
        """Computes one batch; the likeliest next token by sequence, where logits were wanted."""
        self._compute(entries)
        return {entry[2]: int(self._logits(i).argmax()) for i, entry in enumerate(entries) if entry[3]}

    def logits(self, tokens: list[int]) -> Iterator[np.ndarray]:
        """What follows each token of one sequence: (vocab_size,), good until the next one is asked for."""
        for chunk in chunks([(token, position, 0, True) for position, token in enumerate(tokens)], BATCH):
            self._compute(chunk)
            yield from (self._logits(i) for i in range(len(chunk)))

    def _compute(self, entries: Sequence[Entry]) -> None:
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = cpp.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode gave status {status} for a batch of {len(entries)}")

    def _logits(self, index: int) -> np.ndarray:
        """Of one entry of the last batch, in llama.cpp's own memory."""
        return np.ctypeslib.as_array(cpp.llama_get_logits_ith(self.context, index), (self.vocab_size,))

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

    def generate(self, prompts: list[list[int]], outputs: list[list[int]], num_tokens: list[int]) -> Iterator[float]:
        """Fills `outputs` up to `num_tokens`, which must not grow from prompt to prompt; yields each step's seconds."""
        for step in range(1, max(num_tokens)):
            started = time.perf_counter()
            active = [sequence for sequence, count in enumerate(num_tokens) if count > step]
            entries = [(outputs[s][-1], len(prompts[s]) + step - 1, s, True) for s in active]
            for sequence, token in self.decode(entries).items():
                outputs[sequence].append(token)
            yield time.perf_counter() - started


def pack(path: str, to: str, type: str, threads: int) -> dict:
    if IS_FORK:  # its bindings have no quantizer, its wheel brings the program
        program = Path(cpp.__file__).parent / "bin" / "llama-quantize"
        command = [program, "--pure", "--allow-requantize", path, to, type, str(threads)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"llama-quantize ended with status {done.returncode}: {done.stderr.strip()[-200:]}")
        return {}
    params = cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure, params.allow_requantize = threads, FILE_TYPES[type], True, True
    status = cpp.llama_model_quantize(path.encode(), to.encode(), params)
    if status != 0:
        raise RuntimeError(f"llama_model_quantize gave status {status} for {path}")
    return {}


MODEL: list[Model] = []  # the one that is loaded


def load(path: str, threads: int, **unused: object) -> dict:
    """A context is made for each run, so that `max_seq_len` and the like mean nothing here."""
    MODEL[:] = [Model(path, threads)]
    return {"vocab_size": MODEL[0].vocab_size}


def run(prompts: list[list[int]], num_tokens: int | list[int], flash: bool) -> dict:
    """Continues each prompt; making the context and a first batch that warms it up are not timed."""
    wanted = [num_tokens] * len(prompts) if isinstance(num_tokens, int) else num_tokens
    order = sorted(range(len(prompts)), key=lambda i: -wanted[i])
    prompts, wanted = [prompts[i] for i in order], [wanted[i] for i in order]
    longest = max(len(prompt) + count for prompt, count in zip(prompts, wanted, strict=True))
    context = MODEL[0].context(len(prompts), longest, flash)
    context.decode([(prompts[0][0], 0, 0, True)])
    context.clear()
    started = time.perf_counter()
    outputs = context.prefill(prompts)
    first = time.perf_counter() - started
    steps = list(context.generate(prompts, outputs, wanted))
    context.close()
    answers = [tokens for _, tokens in sorted(zip(order, outputs, strict=True))]
    return {"first_seconds": first, "step_seconds": steps, "tokens": answers}


def logits(tokens: list[int], to: str) -> dict:
    context = MODEL[0].context(1, len(tokens), flash=False)
    with open(to, "wb") as file:
        for row in context.logits(tokens):
            row.tofile(file)
    context.close()
    return {}


if not IS_FORK:
    silent = cpp.llama_log_callback(lambda level, text, user_data: None)  # its log would go to standard error
    cpp.llama_log_set(silent, None)
cpp.llama_backend_init()
answer_lines(load=load, run=run, logits=logits, pack=pack)
