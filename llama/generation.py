"""`Llama`: a model and its tokenizer, ready to answer. The reference's calls, and what people ask for beyond them.

This file is long because it is what programs call: most of its lines say what each call takes.
"""

from __future__ import annotations

import gc
import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, TypedDict

import torch

from llama.adapting import read_adapters
from llama.answer import (
    Completion,
    Event,
    Logprob,
    Pooling,
    Query,
    answered,
    flat_logprobs,
    unit_vectors,
)
from llama.building import Draft, load, load_draft, make_engine
from llama.chat import (
    B_INST,
    B_SYS,
    E_INST,
    E_SYS,
    SPECIAL_TAGS,
    UNSAFE_ERROR,
    ChatFormat,
    Dialog,
    Message,
    Prompt,
    Role,
    ToolError,
    ToolUse,
    choose_format,
    fit_dialog,
)
from llama.checkpoint import Checkpoint, open_checkpoint, save_low_bit
from llama.device import return_memory
from llama.model import Transformer
from llama.quantization import resolve_format
from llama.runner import Pack, Program
from llama.sampling import sample_top_p
from llama.sampling_params import SamplingParams
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

TokenIds = Sequence[int] | torch.Tensor  # a NumPy array will do too
Params = SamplingParams | Sequence[SamplingParams] | None


class CompletionPrediction(TypedDict, total=False):
    generation: str
    tokens: list[str]  # not required
    logprobs: list[float]  # not required


class ChatPrediction(TypedDict, total=False):
    generation: Message
    tokens: list[str]  # not required
    logprobs: list[float]  # not required


class Llama:
    """A model that answers.

    Several threads may call it: their requests share the model's steps, and each call gets its own answers. Under
    torchrun every rank makes the same calls in the same order, from one thread.
    """

    @staticmethod
    def build(
        ckpt_dir: str | Path | None = None,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int | None = None,
        max_batch_size: int | None = None,
        model_parallel_size: int | None = None,
        seed: int | None = 1,
        *,
        pipeline_parallel_size: int | None = None,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        quantization: str | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        load_in_low_bit: str | None = None,
        kv_cache_memory: int | str | None = None,
        kv_dtype: str = "auto",
        deterministic: bool = False,
        chat_format: str | None = None,
        tool_format: str | None = None,
        adapter: str | Path | Sequence[str | Path] | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        draft: str | Path | None = None,
        compile: bool | None = None,
        trust_compiled: bool = False,
    ) -> Llama:
        """Loads a checkpoint of any format.

        Args:
            ckpt_dir: a Meta or Hugging Face directory, a .gguf file, or org/name of the hub; None is the
                embedded default model. A directory that `llama export` wrote brings its limits.
            tokenizer_path: None looks in the checkpoint, beside it, and one directory above.
            max_seq_len: the most tokens of a prompt and its answer together; None is the model's context.
            max_batch_size: how many sequences to expect at once. Longer lists are scheduled, not refused.
            model_parallel_size: how many of the ranks that torchrun started cut each layer between them; None is all
                of a stage.
            pipeline_parallel_size: into how many stages the layers are cut, each on ranks of its own, for a model
                that one machine does not hold; None is 1. A step passes the stages one after the other.
            seed: what requests without a seed of their own draw from; None draws one, which is then `llm.seed`.
            device: "auto", "cpu", "cuda", "mps", ...
            dtype: "bf16", "fp16", "fp32", a torch dtype, or "auto": as stored, and on a CPU bf16 only where
                the processor computes in it, else fp32.
            quantization: hold the linears in a low-bit format ("sym_int4", "nf4", "q8_0", ...); None leaves them as
                they are stored, low-bit blocks included; "none" unpacks such blocks.
            load_in_4bit, load_in_8bit, load_in_low_bit: other spellings of sym_int4, sym_int8, and any format.
            kv_cache_memory: bytes for keys and values, or "2GiB"; None is half of what is free after loading.
            kv_dtype: "auto" stores keys and values as the model computes, "int8" in 8 bits with a scale for each
                token and head: room for two to four times as many tokens, and less to read of long contexts.
            deterministic: give every request the same bits whatever shares its steps, wherever its prompt is cut
                into chunks, with or without a cached prefix or a preemption; slower.
            chat_format: a format's name or the path of a Jinja template; None asks the model.
            tool_format: how the model calls tools ("hermes", "llama3", "mistral", ...); None looks for it in the
                model's template and vocabulary.
            adapter: a PEFT directory, a GGUF file or org/name of the hub with a LoRA adapter that is merged into the
                model while it loads, with its tokenizer where it brings one; or several, in order. "PATH=0.7" gives
                one a weight.
            adapters: those that calls may name, by name, each for its own rows; see `load_adapter`.
            draft: what guesses tokens ahead, so that a step brings several where guesses are right. "lookup": the text
                so far; a checkpoint: a small model of the same vocabulary; "none": nothing. Answers stay those of
                plain decoding, but for rounding where the number of rows changes a product's last bits. None is
                "lookup" where it changes none: low-bit models on a CPU, and with `deterministic`.
            compile: True computes steps with a package compiled ahead of time, which is kept in your cache directory
                and made there once, in a minute or so; None does so where one is there; False never does. On a GPU
                decoding steps are captured as CUDA graphs instead, but with False.
            trust_compiled: run the package that an exported directory brings, which is native code and can do
                whatever you can.

        Raises FileNotFoundError or ValueError, in one line, for what cannot be loaded.
        """
        started = time.time()
        if quantization != "none":
            quantization = resolve_format(quantization, load_in_4bit, load_in_8bit, load_in_low_bit)
        loaded = load(
            ckpt_dir,
            tokenizer_path,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            model_parallel_size=model_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            device=device,
            dtype=dtype,
            quantization=quantization,
            deterministic=deterministic,
            chat_format=chat_format,
            tool_format=tool_format,
            adapter=adapter,
            kv_dtype=kv_dtype,
            compile=compile,
            trust_compiled=trust_compiled,
        )
        llm = Llama(
            loaded.model,
            loaded.tokenizer,
            seed=seed,
            kv_cache_memory=kv_cache_memory,
            kv_dtype=loaded.kv_dtype,
            chat_format=loaded.chat_format,
            defaults=loaded.checkpoint.generation_defaults,
            stop_ids=loaded.checkpoint.stop_ids,
            checkpoint=loaded.checkpoint,
            quantization=quantization,
            draft=load_draft(draft, loaded, device=device, dtype=dtype, quantization=quantization),
            program=loaded.program,
            max_running=loaded.max_running,
        )
        for name, path in (adapters or {}).items():
            llm.load_adapter(name, path)
        if llm.rank == 0:
            print(f"Loaded in {time.time() - started:.2f} seconds")
        return llm

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        seed: int | None = 1,
        kv_cache_memory: int | str | None = None,
        kv_dtype: str = "auto",
        chat_format: str | ChatFormat | None = None,
        defaults: dict[str, Any] | None = None,
        stop_ids: Sequence[int] = (),
        checkpoint: Checkpoint | None = None,
        quantization: str | None = None,
        draft: Draft = None,
        program: Program | None = None,
        max_running: int | None = None,
    ):
        """`defaults` and `stop_ids`: the model's own generation_config. `checkpoint`, `quantization`: what it is of.

        draft: "lookup", or a small model that is loaded on rank 0. `program` computes steps in the model's place; no
        more than `max_running` sequences run at once.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.checkpoint = checkpoint
        self.quantization = quantization
        self.rank = model.parallel.rank
        self.max_seq_len = model.params.max_seq_len
        self.chat_format = choose_format(chat_format, tokenizer)
        self.defaults = defaults or {}
        self.adapter_paths: dict[str, str | Path | Sequence[str | Path]] = {}
        self.seed = self.share(secrets.randbits(32) if seed is None else int(seed))
        self.engine = make_engine(
            model,
            tokenizer,
            seed=self.seed,
            kv_cache_memory=kv_cache_memory,
            kv_dtype=kv_dtype,
            stop_ids=frozenset(stop_ids),
            can_generate=checkpoint is None or checkpoint.has_head,
            draft=draft,
            program=program,
            max_running=max_running,
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
            raise ValueError("this model is not quantized: build it with quantization='sym_int4', say, to save it so")
        if self.rank == 0:
            save_low_bit(self.checkpoint, directory, self.quantization)

    # ---- adapters, and the end

    def load_adapter(self, name: str, path: str | Path | Sequence[str | Path]) -> None:
        """Puts a LoRA adapter, or "PATH=0.7", beside the model: `adapter=name` uses it, all other calls do not feel it.

        Several are added up, and are one adapter from then on. Under `torchrun` every rank calls it.

        Raises FileNotFoundError or ValueError, in one line, for a name that is taken and for what cannot be loaded so;
        an adapter with a vocabulary of its own is merged (`build(adapter=)`).
        """
        self.engine.adapters.validate_new(name)
        self.engine.load_adapter(name, *read_adapters(path, self.model))
        self.adapter_paths[name] = path

    def unload_adapter(self, name: str) -> None:
        """Nobody may name it any more. What is on its way ends with it; then its memory comes back."""
        self.engine.unload_adapter(name)
        self.adapter_paths.pop(name, None)

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters beside the model."""
        return self.engine.adapters.names

    def close(self) -> None:
        """Ends what is under way and gives the model's memory back; nothing can be asked of it any more."""
        if self.engine is not None:
            self.engine.abort_all()
        self.engine = self.model = self.checkpoint = None
        gc.collect()
        return_memory()

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

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
        completions = answered(self.complete(prompt_tokens, params))
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
        completions = answered(self.complete(prompts, params))
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
        completions = answered(self.chat(dialogs, params))
        return [{"generation": self.chat_format.parse(c.text), **self._details(c, logprobs)} for c in completions]

    # ---- beyond the reference

    def complete(
        self, prompts: Sequence[str | TokenIds], params: Params = None, adapter: str | None = None
    ) -> list[Completion]:
        """Continues texts or token ids; `params` are for all, or one for each. n > 1: prompt-major.

        `adapter`: the name of one that was loaded beside the model.

        Raises ValueError, and answers none, where one of them can never run.
        """
        tokens = self.prompt_tokens(prompts)
        pairs = zip(tokens, self._resolved(params, len(tokens)), strict=True)
        queries = [Query(*pair, adapter=adapter) for pair in pairs]
        return sorted(self.run(queries, strict=True), key=attrgetter("place", "index"))

    def chat(
        self,
        dialogs: Sequence[Dialog | Prompt],
        params: Params = None,
        *,
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] = (),
        tool_choice: str = "auto",
        parallel_tool_calls: bool = True,
        adapter: str | None = None,
    ) -> list[Completion]:
        """Answers dialogs; as `complete`. A dialog that its format refuses as unsafe gets the refusal as text.

        `Prompt(dialog, continues=True)` goes on from the dialog's last message, the assistant's: the text is what
        is new. tools: functions that the model may call, as OpenAI's API describes them, or Python's own with type
        hints; a completion's `tool_calls` are those that it asks for, and nothing is called here. tool_choice: "auto",
        "required", "none", or the name of the one to call.
        """
        resolved = self._resolved(params, len(dialogs))
        use = ToolUse(tools, tool_choice, parallel_tool_calls)
        queries = [self.chat_query(*pair, use, adapter) for pair in zip(dialogs, resolved, strict=True)]
        completions = sorted(self.run(queries, strict=True), key=attrgetter("place", "index"))
        return [self.with_tool_calls(completion, use) for completion in completions]

    def with_tool_calls(self, completion: Completion, use: ToolUse) -> Completion:
        """The same with the calls that its text holds taken out of it, where tools are on offer."""
        if not use.offered or completion.refused:
            return completion
        spoken = self.chat_format.spoken(completion.text, completion.tokens, use.callable_names)
        return replace(completion, text=spoken.content, tool_calls=spoken.calls)

    def score(self, texts: Sequence[str | TokenIds], adapter: str | None = None) -> list[list[Logprob | None]]:
        """How likely the model finds each token of each text, given those before it; the first has no score."""
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        return [completion.prompt_logprobs for completion in answered(self.complete(texts, params, adapter))]

    def embed(
        self, texts: Sequence[str | TokenIds], pooling: Pooling = "mean", adapter: str | None = None
    ) -> torch.Tensor:
        """One vector of length 1 a text, (texts, dim) float32: the "mean" of its states, or the "last" one."""
        params = SamplingParams().resolve()
        queries = [Query(tokens, params, pooling, adapter=adapter) for tokens in self.prompt_tokens(texts)]
        return unit_vectors(answered(sorted(self.run(queries, strict=True), key=attrgetter("place"))))

    def stream_text(
        self, prompt: str | TokenIds, params: SamplingParams | None = None, adapter: str | None = None
    ) -> Iterator[str]:
        """The pieces of one continuation as they come; joined they are `complete`'s text."""
        [tokens] = self.prompt_tokens([prompt])
        for event in self.stream(Query(tokens, self._resolved(params, 1)[0], adapter=adapter)):
            yield event.text

    def stream_chat(
        self, dialog: Dialog | Prompt, params: SamplingParams | None = None, adapter: str | None = None
    ) -> Iterator[str]:
        """The pieces of one answer as they come; joined they are `chat`'s text."""
        for event in self.stream(self.chat_query(dialog, self._resolved(params, 1)[0], adapter=adapter)):
            yield event.text

    # ---- what these calls, and other callers, are made of

    def run(self, queries: Iterable[Query], strict: bool = False) -> Iterator[Completion]:
        """Answers any number of queries, read as the engine has room for them.

        Yields completions as they are done, each with its `place` among the queries. What can never run is a
        completion that says why; with `strict` it raises ValueError. On ranks other than 0 `queries` is not looked at.
        """
        for events in self._events(queries, strict):
            for event in events:
                if event.completion is not None:
                    yield event.completion

    def stream(self, query: Query) -> Iterator[Event]:
        """The events of one query as they come. Raises ValueError, or RuntimeError where the model failed."""
        if query.params.n != 1:
            raise ValueError(f"n is {query.params.n}, but a stream has one answer: use complete or chat")
        for events in self._events([query], strict=True):
            for event in events:
                answered([event.completion] if event.completion else [])
                yield event

    def prompt_tokens(self, prompts: Sequence[str | TokenIds]) -> list[list[int]]:
        """Texts as ids, with BOS where the tokenizer wants one; ids, in a list, an array or a tensor, as a list."""
        if isinstance(prompts, str):
            raise ValueError("one string was given: give a list of them")
        bos = self.tokenizer.add_bos
        return [
            self.tokenizer.encode(prompt, bos=bos, eos=False) if isinstance(prompt, str) else id_list(prompt)
            for prompt in prompts
        ]

    def chat_query(
        self,
        dialog: Dialog | Prompt,
        params: SamplingParams,
        use: ToolUse | None = None,
        adapter: str | None = None,
    ) -> Query:
        """What to ask the engine for the answer to a dialog; `params` are resolved. Raises DialogError.

        A dialog that the format refuses as unsafe becomes a query with that refusal. use: the tools on offer; a JSON
        schema describes an answer that calls none of them.
        """
        prompt = Prompt.of(dialog)
        if use is not None and use.offered:
            prompt = replace(prompt, tools=use.offered)
            schema = None if params.json_schema is None else json.loads(params.json_schema)
            if grammar := use.grammar(self.chat_format.tool_format, schema):
                params = replace(params, json_schema=None)
                if params.shape is not None:
                    raise ToolError(
                        f"{params.shape[0]} is given beside tools, whose calls it does not allow: leave it out"
                    )
                params = replace(params, grammar=grammar)
        tokens = self.chat_format.encode(prompt)
        if self.chat_format.is_unsafe(prompt):
            return Query([], params, refusal=UNSAFE_ERROR)
        if not params.ignore_eos:
            params = replace(
                params,
                stop=(*params.stop, *self.chat_format.stop),
                stop_token_ids=(*params.stop_token_ids, *self.chat_format.stop_ids),
            )
        return Query(tokens, params, adapter=adapter)

    def speaking(self, chat_format: ChatFormat) -> Llama:
        """The same model with another chat format; everything else is shared."""
        other = copy(self)
        other.chat_format = chat_format
        return other

    def fit(self, dialog: Dialog, params: SamplingParams) -> Dialog:
        """The dialog without as many of its oldest turns as leave room for an answer. Raises DialogError."""
        room = min(params.max_tokens or self.max_seq_len // 4, self.max_seq_len // 2)
        return fit_dialog(dialog, self.max_seq_len - room, self.tokenizer, self.chat_format)

    def validate(self, query: Query) -> None:
        """Raises ValueError, in one line, for a query that can never run."""
        if query.refusal is None:
            self.engine.validate(query)

    def share(self, value: Any) -> Any:
        """Rank 0's value, which JSON can hold, on every rank."""
        return self.model.parallel.broadcast_json(value)

    # ---- how it is done

    def _events(self, queries: Iterable[Query], strict: bool) -> Iterator[list[Event]]:
        """The engine's events, on every rank."""
        if self.engine is None:
            raise RuntimeError("this model was closed: build it again")
        runner = self.engine.runner
        return self.model.parallel.lead(
            self.engine.run(queries, strict), lambda ints: runner.run(Pack.from_ints(ints)), Event
        )

    def _reference_params(
        self, max_gen_len: int | None, temperature: float, top_p: float, logprobs: bool, echo: bool
    ) -> SamplingParams:
        return SamplingParams(
            temperature=temperature,
            top_p=top_p,
            max_tokens=self.max_seq_len - 1 if max_gen_len is None else max_gen_len,
            logprobs=0 if logprobs else None,
            prompt_logprobs=0 if logprobs and echo else None,
            echo=echo,
        ).resolve()

    def _resolved(self, params: Params, number: int) -> list[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * number
        if len(params) != number:
            raise ValueError(f"{len(params)} params were given for {number} prompts: give one, or one for each")
        return [p.resolve(self.defaults) for p in params]

    def _details(self, completion: Completion, logprobs: bool) -> dict[str, Any]:
        if not logprobs:
            return {}
        decoder = StreamDecoder(self.tokenizer)
        tokens = [decoder.push(token) for token in completion.tokens]
        if tokens:
            tokens[-1] += decoder.flush()
        return {"tokens": tokens, "logprobs": flat_logprobs(completion)}


def id_list(tokens: TokenIds) -> list[int]:
    """Token ids of any kind as Python's own integers."""
    return [int(token) for token in tokens]
