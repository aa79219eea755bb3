"""`Llama`: a model and its tokenizer, ready to answer. The reference's calls, and what people ask for beyond them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

import torch

from llama import parallel
from llama.chat import (
    B_INST,
    B_SYS,
    E_INST,
    E_SYS,
    SPECIAL_TAGS,
    UNSAFE_ERROR,
    Dialog,
    Message,
    Prompt,
    Role,
    choose_format,
)
from llama.checkpoint import (
    Checkpoint,
    default_model,
    load_weights,
    open_checkpoint,
    packed_modules,
    save_low_bit,
    untied,
)
from llama.device import choose_device, choose_dtype, choose_kv_dtype, return_memory
from llama.engine import Engine, Event, Logprob
from llama.model import ModelArgs, Transformer
from llama.progress import progress_bar
from llama.quantization import replace_linears, resolve_format
from llama.runner import BLOCK_SIZE, Runner, count_blocks
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

Item = TypeVar("Item")


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
    place: int = field(default=0, compare=False)  # of its prompt among those that were given
    index: int = field(default=0, compare=False)  # which of the prompt's n answers

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Completion:
        """From what `dataclasses.asdict` made of one, with tuples turned into lists on the way."""
        for name in ("logprobs", "prompt_logprobs"):
            if fields[name] is not None:
                fields[name] = [entry and Logprob.from_json(entry) for entry in fields[name]]
        return cls(**fields)


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
        quantization: str | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        load_in_low_bit: str | None = None,
        kv_cache_memory: int | None = None,
        kv_dtype: str = "auto",
        deterministic: bool = False,
        chat_format: str | None = None,
    ) -> Llama:
        """Loads a checkpoint of any format.

        Args:
            ckpt_dir: a Meta or Hugging Face directory, a .gguf file, or org/name of the hub; None is the
                embedded default model.
            tokenizer_path: None looks in the checkpoint, beside it, and one directory above.
            max_seq_len: the most tokens of a prompt and its answer together; None is the model's context.
            max_batch_size: how many sequences to expect at once. Longer lists are scheduled, not refused.
            model_parallel_size: over how many of the ranks that torchrun started; None is all of them.
            seed: what requests without a seed of their own draw from.
            device: "auto", "cpu", "cuda", "mps", ...
            dtype: "bf16", "fp16", "fp32", a torch dtype, or "auto": as stored, and on a CPU bf16 only where
                the processor computes in it, else fp32.
            quantization: hold the linears in a low-bit format ("sym_int4", "nf4", "q8_0", ...); None leaves them as
                they are stored, low-bit blocks included; "none" unpacks such blocks.
            load_in_4bit, load_in_8bit, load_in_low_bit: other spellings of sym_int4, sym_int8, and any format.
            kv_cache_memory: bytes for keys and values; None is half of what is free after loading.
            kv_dtype: "auto" stores keys and values as the model computes, "int8" in 8 bits with a scale for each
                token and head: room for two to four times as many tokens, and less to read of long contexts.
            deterministic: give every request the same bits whatever shares its steps, wherever its prompt is cut
                into chunks, with or without a cached prefix or a preemption; slower.
            chat_format: a format's name or the path of a Jinja template; None asks the model.

        Raises FileNotFoundError or ValueError, in one line, for what cannot be loaded.
        """
        started = time.time()
        checkpoint = open_checkpoint(default_model() if ckpt_dir is None else ckpt_dir)
        place = choose_device(device)
        group = parallel.start(model_parallel_size, place.type)
        tokenizer = Tokenizer(str(find_tokenizer(checkpoint.tokenizer_path, tokenizer_path, checkpoint.path)))
        if quantization != "none":
            quantization = resolve_format(quantization, load_in_4bit, load_in_8bit, load_in_low_bit)
        packed = packed_modules(untied(checkpoint), quantization, group.size, place)
        if "output" in packed:
            checkpoint = untied(checkpoint)
        args = replace(checkpoint.args)
        check_vocabulary(tokenizer, args)
        args.max_seq_len = max_seq_len or args.max_seq_len
        args.max_batch_size = max_batch_size or args.max_batch_size
        with torch.device("meta"):
            model = Transformer(args, group)
        replace_linears(model, packed)
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
        model.prepare(BLOCK_SIZE if deterministic else None)
        return_memory()
        llm = Llama(
            model,
            tokenizer,
            seed=seed,
            kv_cache_memory=kv_cache_memory,
            kv_dtype=kv_dtype,
            chat_format=chat_format,
            defaults=checkpoint.generation_defaults,
            stop_ids=checkpoint.stop_ids,
        )
        llm.checkpoint, llm.quantization = checkpoint, quantization
        if group.rank == 0:
            if checkpoint.unknown_keys:
                unknown = ", ".join(checkpoint.unknown_keys)
                print(f"{checkpoint.path}: settings that have no effect here: {unknown}", file=sys.stderr)
            print(f"Loaded in {time.time() - started:.2f} seconds")
        return llm

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        seed: int = 1,
        kv_cache_memory: int | None = None,
        kv_dtype: str = "auto",
        chat_format: str | None = None,
        defaults: dict[str, Any] | None = None,
        stop_ids: Sequence[int] = (),
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.checkpoint: Checkpoint | None = None  # what `build` loaded
        self.quantization: str | None = None
        self.rank = model.parallel.rank
        self.chat_format = choose_format(chat_format, tokenizer)
        self.defaults = defaults or {}
        dtype = choose_kv_dtype(kv_dtype, model.norm.weight.dtype)
        num_blocks = model.parallel.broadcast_json(count_blocks(model, kv_cache_memory, dtype))
        self.engine = Engine(
            Runner(model, num_blocks, BLOCK_SIZE, dtype),
            Scheduler(num_blocks, BLOCK_SIZE),
            tokenizer,
            max_seq_len=model.params.max_seq_len,
            seed=seed,
            stop_ids=tokenizer.stop_ids | frozenset(stop_ids),
        )

    @staticmethod
    def load_low_bit(directory: str | Path, **options: Any) -> Llama:
        """`build` for a directory that `save_low_bit` or BigDL-LLM wrote. Raises ValueError for any other."""
        checkpoint = open_checkpoint(directory)
        if not any(weight.is_packed for weight in checkpoint.weights()):
            raise ValueError(f"{directory} is no low-bit checkpoint: load it with Llama.build")
        return Llama.build(directory, **options)

    def save_low_bit(self, directory: str | Path) -> None:
        """Writes the model in the low-bit format that it was built in; it loads again without being quantized.

        Raises ValueError where it was built in none.
        """
        if self.quantization in (None, "none"):
            raise ValueError(
                "this model is not quantized: build it with quantization='sym_int4', say, to save it so"
            )
        if self.rank == 0:
            save_low_bit(self.checkpoint, directory, self.quantization)

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
        completions = answered(self._complete(self.prompt_tokens(prompts), [params] * len(prompts)))
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
            {"generation": self.chat_format.parse(c.text), **self._details(c, logprobs)} for c in completions
        ]

    # ---- beyond the reference

    def complete(
        self,
        prompts: Sequence[str | list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Continues texts or lists of token ids; `params` are for all, or one for each. n > 1: prompt-major."""
        tokens = self.prompt_tokens(prompts)
        return self._complete(tokens, self._resolved(params, len(tokens)))

    def chat(
        self, dialogs: Sequence[Dialog], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Answers dialogs; as `complete`. A dialog that its format refuses as unsafe gets the refusal as text."""
        return self._chat(dialogs, self._resolved(params, len(dialogs)))

    def score(self, texts: Sequence[str | list[int]]) -> list[list[Logprob | None]]:
        """How likely the model finds each token of each text, given those before it; the first has no score."""
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        return [completion.prompt_logprobs for completion in answered(self.complete(texts, params))]

    def embed(self, texts: Sequence[str | list[int]], pooling: str = "mean") -> torch.Tensor:
        """One vector of length 1 a text, (texts, dim) float32: the "mean" of its states, or the "last" one."""
        params = SamplingParams().resolve()
        requests = [(prompt, params) for prompt in self.prompt_tokens(texts)]
        for prompt, _ in requests:
            self.engine.check(prompt, params, pooling)
        return unit_vectors(self._led(lambda: self.engine.run(requests, pooling), Event))

    def stream_text(self, prompt: str | list[int], params: SamplingParams | None = None) -> Iterator[str]:
        """The pieces of one continuation as they come; joined they are `complete`'s text."""
        [tokens] = self.prompt_tokens([prompt])
        for event in self.stream(tokens, self._resolved(params, 1)[0]):
            yield event.text

    def stream_chat(self, dialog: Dialog, params: SamplingParams | None = None) -> Iterator[str]:
        """The pieces of one answer as they come; joined they are `chat`'s text."""
        prompt = Prompt.of(dialog)
        if self.chat_format.is_unsafe(prompt):
            yield UNSAFE_ERROR
            return
        params = self.with_stops(self._resolved(params, 1)[0])
        for event in self.stream(self.chat_format.encode(prompt), params):
            yield event.text

    def run(self, requests: Iterable[tuple[list[int], SamplingParams]]) -> Iterator[Completion]:
        """Answers any number of requests (prompt tokens, resolved params), read as the engine has room for them.

        Yields completions as they are done, each with its `place` among the requests. What can never run is a
        completion that says why. On ranks other than 0 `requests` is not looked at, and all come at the end.
        """
        return self._led(lambda: self._run(requests), Completion)

    def _run(self, requests: Iterable[tuple[list[int], SamplingParams]]) -> Iterator[Completion]:
        answers: dict[tuple[int, int], Answer] = {}
        given: dict[int, tuple[list[int], SamplingParams]] = {}

        def remembered() -> Iterator[tuple[list[int], SamplingParams]]:
            for place, request in enumerate(requests):
                given[place] = request
                yield request

        for event in self.engine.run(remembered()):
            key = event.request_id, event.index
            if key not in answers:
                answers[key] = Answer(*given[event.request_id])
            answers[key].take(event)
            if event.finish_reason is not None:
                yield answers.pop(key).completion()

    def stream(self, prompt_tokens: list[int], params: SamplingParams) -> Iterator[Event]:
        """The events of one request as they come. On ranks other than 0 they come all at once, at the end."""
        if params.n != 1:
            raise ValueError(f"n is {params.n}, but a stream has one answer: use complete or chat")
        self.engine.check(prompt_tokens, params)
        for event in self._led(lambda: self.engine.run([(prompt_tokens, params)]), Event):
            if event.error is not None:
                raise RuntimeError(event.error)
            yield event

    # ---- what other callers of the engine need

    def prompt_tokens(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Texts as ids, with BOS where the tokenizer wants one; lists of ids as they are."""
        if isinstance(prompts, str):
            raise ValueError("one string was given: give a list of them")
        return [self._encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]

    def with_stops(self, params: SamplingParams) -> SamplingParams:
        """The parameters with what ends an answer in this chat format."""
        if params.ignore_eos:
            return params
        return replace(
            params,
            stop=(*params.stop, *self.chat_format.stop),
            stop_token_ids=(*params.stop_token_ids, *self.chat_format.stop_ids),
        )

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

    def _chat(self, dialogs: Sequence[Dialog], params: Sequence[SamplingParams]) -> list[Completion]:
        refused = Completion(UNSAFE_ERROR, [], "error", error=UNSAFE_ERROR)
        asked = [Prompt.of(dialog) for dialog in dialogs]
        unsafe = [self.chat_format.is_unsafe(prompt) for prompt in asked]
        prompts = [self.chat_format.encode(prompt) for prompt in asked]
        safe = [i for i, refuse in enumerate(unsafe) if not refuse]
        answers = iter(self._complete([prompts[i] for i in safe], [self.with_stops(params[i]) for i in safe]))
        return [
            refused if refuse else next(answers)
            for refuse, p in zip(unsafe, params, strict=True)
            for _ in range(p.n)
        ]

    def _complete(self, prompts: list[list[int]], params: Sequence[SamplingParams]) -> list[Completion]:
        """All prompts at once. Refuses all of them if it refuses one."""
        requests = list(zip(prompts, params, strict=True))
        for prompt, p in requests:
            self.engine.check(prompt, p)
        return sorted(self.run(requests), key=attrgetter("place", "index"))

    def _led(self, items: Callable[[], Iterator[Item]], kind: type[Item]) -> Iterator[Item]:
        """Rank 0 makes the items with the engine; the others run its steps, and get the items or its error at the end.

        `kind` is the items' dataclass.
        """
        group = self.model.parallel
        if group.size == 1:
            yield from items()
            return
        if group.rank == 0:
            told: list[Any] = []
            reply: dict[str, Any] = {"error": "rank 0 stopped early"}
            try:
                for item in items():
                    told.append(asdict(item))
                    yield item
                reply = {"items": told}
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
            yield from map(kind.from_json, reply["items"])

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

    def __init__(self, prompt: list[int], params: SamplingParams):
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
            place=self.last.request_id,
            index=self.last.index,
        )


def answered(completions: list[Completion]) -> list[Completion]:
    """The completions, if none of them failed; a refusal is an answer."""
    for completion in completions:
        if completion.finish_reason == "error" and completion.text != UNSAFE_ERROR:
            raise RuntimeError(completion.error)
    return completions


def unit_vectors(events: Iterable[Event]) -> torch.Tensor:
    """The events' embeddings in the order of their requests, each of length 1: (requests, dim) float32."""
    by_place = {event.request_id: event.embedding for event in events}
    rows = [by_place[place] for place in sorted(by_place)]
    return torch.nn.functional.normalize(torch.tensor(rows)) if rows else torch.empty(0, 0)


def flat_logprobs(completion: Completion) -> list[float]:
    """One number a token, the reference's way: an echoed prompt's first token has 0.0."""
    entries = [*(completion.prompt_logprobs or ()), *(completion.logprobs or ())]
    return [0.0 if entry is None else entry.logprob for entry in entries]


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
