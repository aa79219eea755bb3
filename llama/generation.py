"""`Llama`: a model and its tokenizer, ready to answer. The reference's calls, and what people ask for beyond them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from llama import parallel
from llama.cache import free_memory
from llama.chat import (
    B_INST,
    B_SYS,
    E_INST,
    E_SYS,
    SPECIAL_TAGS,
    UNSAFE_ERROR,
    Dialog,
    Message,
    Role,
    choose_format,
)
from llama.checkpoint import default_model, load_weights, open_checkpoint
from llama.engine import Engine, Event, Logprob
from llama.model import ModelArgs, Transformer
from llama.runner import Runner
from llama.sampling import SamplingParams, sample_top_p
from llama.scheduler import Scheduler
from llama.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "B_INST",
    "B_SYS",
    "E_INST",
    "E_SYS",
    "SPECIAL_TAGS",
    "UNSAFE_ERROR",
    "ChatPrediction",
    "Completion",
    "CompletionPrediction",
    "Dialog",
    "Llama",
    "Message",
    "Role",
    "sample_top_p",
]

BLOCK_SIZE = 16  # tokens in a block of the cache
MEMORY_SHARE = 0.5  # of the memory that is free after loading, for keys and values

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class CompletionPrediction(TypedDict, total=False):
    generation: str
    tokens: list[str]  # not required
    logprobs: list[float]  # not required


class ChatPrediction(TypedDict, total=False):
    generation: Message
    tokens: list[str]  # not required
    logprobs: list[float]  # not required


@dataclass(frozen=True)
class Completion:
    """One answer. With `echo`, text and tokens begin with the prompt's."""

    text: str
    tokens: list[int]  # without the token that ended it
    finish_reason: Literal["stop", "length", "error"]
    logprobs: list[Logprob] | None = None  # of the generated tokens
    prompt_logprobs: list[Logprob | None] | None = None  # the first token has none
    error: str | None = None  # what went wrong, where the finish reason is "error"


class Llama:
    @staticmethod
    def build(
        ckpt_dir: str | Path | None = None,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int | None = None,
        max_batch_size: int | None = None,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        kv_cache_memory: int | None = None,
        chat_format: str | None = None,
    ) -> Llama:
        """Loads a checkpoint of any format.

        Args:
            ckpt_dir: a Meta or Hugging Face directory or a .gguf file; None is the embedded default model.
            tokenizer_path: None looks in the checkpoint, beside it, and one directory above.
            max_seq_len: the most tokens of a prompt and its answer together; None is the model's context.
            max_batch_size: how many sequences to expect at once. Longer lists are scheduled, not refused.
            model_parallel_size: over how many of the ranks that torchrun started; None is all of them.
            seed: what requests without a seed of their own draw from.
            device: "auto", "cpu", "cuda", "mps", ...
            dtype: "bf16", "fp16", "fp32", a torch dtype, or "auto": as stored, and on a CPU bf16 only where
                the processor computes in it, else fp32.
            kv_cache_memory: bytes for keys and values; None is half of what is free after loading.
            chat_format: a format's name or the path of a Jinja template; None asks the model.

        Raises FileNotFoundError or ValueError, in one line, for what cannot be loaded.
        """
        started = time.time()
        checkpoint = open_checkpoint(default_model() if ckpt_dir is None else ckpt_dir)
        place = choose_device(device)
        group = parallel.start(model_parallel_size, place.type)
        tokenizer = Tokenizer(str(find_tokenizer(checkpoint.tokenizer_path, tokenizer_path, checkpoint.path)))
        args = replace(checkpoint.args)
        check_vocabulary(tokenizer, args)
        args.max_seq_len = max_seq_len or args.max_seq_len
        args.max_batch_size = max_batch_size or args.max_batch_size
        with torch.device("meta"):
            model = Transformer(args, group)
        with progress_bar("Loading", show=group.rank == 0) as advance:
            load_weights(
                model,
                checkpoint,
                rank=group.rank,
                world_size=group.size,
                device=place,
                dtype=choose_dtype(dtype, checkpoint.dtype, place),
                progress=advance,
            )
        model.prepare()
        llm = Llama(
            model,
            tokenizer,
            seed=seed,
            kv_cache_memory=kv_cache_memory,
            chat_format=chat_format,
            defaults=checkpoint.generation_defaults,
            stop_ids=checkpoint.stop_ids,
        )
        if group.rank == 0:
            print(f"Loaded in {time.time() - started:.2f} seconds")
        return llm

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        seed: int = 1,
        kv_cache_memory: int | None = None,
        chat_format: str | None = None,
        defaults: dict[str, Any] | None = None,
        stop_ids: Sequence[int] = (),
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.rank = model.parallel.rank
        self.chat_format = choose_format(chat_format, tokenizer)
        self.defaults = defaults or {}
        num_blocks = model.parallel.broadcast_json(count_blocks(model, kv_cache_memory))
        dtype = model.norm.weight.dtype
        self.engine = Engine(
            Runner(model, num_blocks, BLOCK_SIZE, dtype),
            Scheduler(num_blocks, BLOCK_SIZE),
            tokenizer,
            max_seq_len=model.params.max_seq_len,
            seed=seed,
            stop_ids=tokenizer.stop_ids | frozenset(stop_ids),
        )

    # ---- the reference's calls

    def generate(
        self,
        prompt_tokens: list[list[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continues each prompt by at most `max_gen_len` tokens: (tokens, their logprobs or None) a prompt.

        With `echo` both begin with the prompt's; its first token has logprob 0.0. Logprobs are those of the raw
        logits, whatever the temperature. The token that ends an answer is left out.
        """
        params = self._reference_params(max_gen_len, temperature, top_p, logprobs, echo)
        completions = answered(self._complete(prompt_tokens, [params] * len(prompt_tokens)))
        tokens = [completion.tokens for completion in completions]
        return tokens, [flat_logprobs(c) for c in completions] if logprobs else None

    def text_completion(
        self,
        prompts: list[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> list[CompletionPrediction]:
        """Continues each text: [{"generation": text}], with "tokens" and "logprobs" if asked for."""
        params = self._reference_params(max_gen_len, temperature, top_p, logprobs, echo)
        tokens = [self._encode(prompt) for prompt in prompts]
        completions = answered(self._complete(tokens, [params] * len(prompts)))
        return [{"generation": c.text, **self._details(c, logprobs)} for c in completions]

    def chat_completion(
        self,
        dialogs: list[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
    ) -> list[ChatPrediction]:
        """Answers each dialog: [{"generation": {"role": "assistant", "content": text}}], details as above."""
        params = self._reference_params(max_gen_len, temperature, top_p, logprobs, False)
        completions = answered(self._chat(dialogs, [params] * len(dialogs)))
        return [
            {"generation": {"role": "assistant", "content": c.text}, **self._details(c, logprobs)}
            for c in completions
        ]

    # ---- beyond the reference

    def complete(
        self,
        prompts: Sequence[str | list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Continues texts or lists of token ids; `params` are for all, or one for each. n > 1: prompt-major."""
        tokens = [self._encode(p) if isinstance(p, str) else list(p) for p in listed(prompts, "prompts")]
        return self._complete(tokens, self._resolved(params, len(tokens)))

    def chat(
        self, dialogs: Sequence[Dialog], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Answers dialogs; as `complete`. A dialog that its format refuses as unsafe gets the refusal as text."""
        return self._chat(dialogs, self._resolved(params, len(dialogs)))

    def stream_text(self, prompt: str | list[int], params: SamplingParams | None = None) -> Iterator[str]:
        """The pieces of one continuation as they come; joined they are `complete`'s text."""
        tokens = self._encode(prompt) if isinstance(prompt, str) else list(prompt)
        for event in self.stream(tokens, self._resolved(params, 1)[0]):
            yield event.text

    def stream_chat(self, dialog: Dialog, params: SamplingParams | None = None) -> Iterator[str]:
        """The pieces of one answer as they come; joined they are `chat`'s text."""
        if self.chat_format.is_unsafe(dialog):
            yield UNSAFE_ERROR
            return
        params = self._with_stops(self._resolved(params, 1)[0])
        for event in self.stream(self.chat_format.encode(dialog), params):
            yield event.text

    def stream(self, prompt_tokens: list[int], params: SamplingParams) -> Iterator[Event]:
        """The events of one request as they come. On ranks other than 0 they come all at once, at the end."""
        if params.n != 1:
            raise ValueError(f"n is {params.n}, but a stream has one answer: use complete or chat")
        for event in self._led(lambda: self.engine.events([self.engine.add(prompt_tokens, params)])):
            if event.error is not None:
                raise RuntimeError(event.error)
            yield event

    # ---- how it is done

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, bos=self.tokenizer.add_bos, eos=False)

    def _reference_params(
        self, max_gen_len: int | None, temperature: float, top_p: float, logprobs: bool, echo: bool
    ) -> SamplingParams:
        if max_gen_len is None:
            max_gen_len = self.model.params.max_seq_len - 1
        return SamplingParams(
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_gen_len,
            logprobs=0 if logprobs else None,
            prompt_logprobs=0 if logprobs and echo else None,
            echo=echo,
        ).resolve()

    def _resolved(
        self, params: SamplingParams | Sequence[SamplingParams] | None, number: int
    ) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * number
        if len(params) != number:
            raise ValueError(
                f"{len(params)} params were given for {number} prompts: give one, or one for each"
            )
        return [p.resolve(self.defaults) for p in params]

    def _with_stops(self, params: SamplingParams) -> SamplingParams:
        """The parameters with what ends an answer in this chat format."""
        if params.ignore_eos:
            return params
        return replace(
            params,
            stop=(*params.stop, *self.chat_format.stop),
            stop_token_ids=(*params.stop_token_ids, *self.chat_format.stop_ids),
        )

    def _chat(self, dialogs: Sequence[Dialog], params: Sequence[SamplingParams]) -> list[Completion]:
        refused = Completion(UNSAFE_ERROR, [], "error", error=UNSAFE_ERROR)
        unsafe = [self.chat_format.is_unsafe(dialog) for dialog in dialogs]
        prompts = [self.chat_format.encode(dialog) for dialog in dialogs]
        asked = [i for i, refuse in enumerate(unsafe) if not refuse]
        answers = iter(
            self._complete([prompts[i] for i in asked], [self._with_stops(params[i]) for i in asked])
        )
        return [
            refused if refuse else next(answers)
            for refuse, p in zip(unsafe, params, strict=True)
            for _ in range(p.n)
        ]

    def _complete(self, prompts: list[list[int]], params: Sequence[SamplingParams]) -> list[Completion]:
        """All prompts at once, through the engine. Refuses all of them if it refuses one."""

        def events() -> Iterator[Event]:
            request_ids: list[int] = []
            try:
                for prompt, p in zip(prompts, params, strict=True):
                    request_ids.append(self.engine.add(prompt, p))
            except ValueError:
                for request_id in request_ids:
                    self.engine.abort(request_id)
                raise
            order = {request_id: place for place, request_id in enumerate(request_ids)}
            for event in self.engine.events(request_ids):
                yield replace(event, request_id=order[event.request_id])

        answers = [Answer(p, prompt) for prompt, p in zip(prompts, params, strict=True) for _ in range(p.n)]
        first = [0]
        for p in params:
            first.append(first[-1] + p.n)
        for event in self._led(events):
            answers[first[event.request_id] + event.index].take(event)
        return [answer.completion() for answer in answers]

    def _led(self, events: Callable[[], Iterator[Event]]) -> Iterator[Event]:
        """Rank 0 runs the engine; the others run its steps, and get its events or its error at the end."""
        group = self.model.parallel
        if group.size == 1:
            yield from events()
            return
        if group.rank == 0:
            told: list[Any] = []
            reply: dict[str, Any] = {"error": "rank 0 stopped early"}
            try:
                for event in events():
                    told.append(asdict(event))
                    yield event
                reply = {"events": told}
            except Exception as error:
                reply = {"error": str(error), "is_value_error": isinstance(error, ValueError)}
                raise
            finally:
                self.engine.runner.release()
                group.broadcast_json(reply)
        else:
            self.engine.runner.follow()
            reply = group.broadcast_json()
            if "error" in reply:
                raise (ValueError if reply.get("is_value_error") else RuntimeError)(reply["error"])
            yield from (Event.from_json(event) for event in reply["events"])

    def _details(self, completion: Completion, logprobs: bool) -> dict[str, Any]:
        if not logprobs:
            return {}
        decoder = StreamDecoder(self.tokenizer)
        tokens = [decoder.push(token) for token in completion.tokens]
        if tokens:
            tokens[-1] += decoder.flush()
        return {"tokens": tokens, "logprobs": flat_logprobs(completion)}


class Answer:
    """Collects one choice's events into a Completion."""

    def __init__(self, params: SamplingParams, prompt: list[int]):
        self.params = params
        self.tokens = list(prompt) if params.echo else []
        self.texts: list[str] = []
        self.logprobs: list[Logprob] = []
        self.last: Event | None = None

    def take(self, event: Event) -> None:
        self.texts.append(event.text)
        if event.token is not None:
            self.tokens.append(event.token)
            if event.logprob is not None:
                self.logprobs.append(event.logprob)
        self.last = event

    def completion(self) -> Completion:
        prompt_logprobs = self.last.prompt_logprobs
        return Completion(
            text="".join(self.texts),
            tokens=self.tokens,
            finish_reason=self.last.finish_reason,
            logprobs=self.logprobs if self.params.logprobs is not None else None,
            prompt_logprobs=None if prompt_logprobs is None else list(prompt_logprobs),
            error=self.last.error,
        )


def answered(completions: list[Completion]) -> list[Completion]:
    """The completions, if none of them failed; a refusal is an answer."""
    for completion in completions:
        if completion.finish_reason == "error" and completion.text != UNSAFE_ERROR:
            raise RuntimeError(completion.error)
    return completions


def flat_logprobs(completion: Completion) -> list[float]:
    """One number a token, the reference's way: an echoed prompt's first token has 0.0."""
    entries = [*(completion.prompt_logprobs or ()), *(completion.logprobs or ())]
    return [0.0 if entry is None else entry.logprob for entry in entries]


def listed(values: Sequence[Any], name: str) -> Sequence[Any]:
    if isinstance(values, str):
        raise ValueError(f"{name} is one string: give a list of them")
    return values


def find_tokenizer(found: Path | None, given: str | Path | None, checkpoint: Path) -> Path:
    if given is not None:
        return Path(given)
    if found is None:
        raise FileNotFoundError(
            f"no tokenizer in {checkpoint}, beside it or one directory above: give tokenizer_path"
        )
    return found


def check_vocabulary(tokenizer: Tokenizer, args: ModelArgs) -> None:
    """A tokenizer may be smaller than the model's (padded) table, never larger."""
    if tokenizer.n_words > args.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.n_words} tokens, but the model's vocabulary {args.vocab_size}: "
            "they do not belong together; give the model's own tokenizer_path"
        )


def choose_device(device: str) -> torch.device:
    """ "auto" is the accelerator that torch finds, else the CPU; under torchrun each rank has its own."""
    if device == "auto":
        device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(place)
    return place


def choose_dtype(dtype: str | torch.dtype, stored: torch.dtype | None, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise ValueError(f"dtype is {dtype!r}: give auto, {', '.join(DTYPES)} or a torch dtype")
    if device.type != "cpu":
        return stored or torch.bfloat16
    if stored == torch.float32 or not torch.cpu.get_capabilities().get("avx512_bf16", False):
        return torch.float32
    return torch.bfloat16


def count_blocks(model: Transformer, kv_cache_memory: int | None) -> int:
    """How many cache blocks fit into the memory; no more than max_batch_size sequences could ever use."""
    args = model.params
    block_bytes = BLOCK_SIZE * model.cache_shape.bytes_per_token(model.norm.weight.dtype)
    memory = kv_cache_memory
    if memory is None:
        memory = int(MEMORY_SHARE * free_memory(model.norm.weight.device))
    for_one = -(-args.max_seq_len // BLOCK_SIZE)
    num_blocks = min(memory // block_bytes, for_one * args.max_batch_size)
    if num_blocks < for_one:
        longest = num_blocks * BLOCK_SIZE
        raise ValueError(
            f"one sequence of max_seq_len {args.max_seq_len} needs {for_one * block_bytes / 2**20:.2f} MiB for keys "
            f"and values, but {memory / 2**20:.2f} MiB are there: set max_seq_len to {longest} or less, "
            "or give more kv_cache_memory"
        )
    return num_blocks


@contextmanager
def progress_bar(title: str, show: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal's standard error; nothing in a pipe. Yields progress(bytes done, bytes in all)."""
    if not (show and sys.stderr.isatty()):
        yield None
        return
    columns = (TextColumn(title), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title)
        yield lambda done, total: progress.update(task, completed=done, total=total)
