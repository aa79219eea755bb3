"""From options to a model with its tokenizer, and to the engine that runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llama import parallel
from llama.adapting import adapters_of, add_always, joints
from llama.chat import FORMATS, ChatFormat, choose_format
from llama.chat.selection import read_template
from llama.checkpoint import (
    Checkpoint,
    default_model,
    keeps_blocks,
    load_weights,
    open_checkpoint,
    packed_modules,
    parse_size,
    untied,
    with_adapters_beside,
)
from llama.compiled import choose_program, open_export
from llama.device import choose_device, choose_dtype, choose_kv_dtype, return_memory
from llama.drafters import DRAFTERS, DraftModel
from llama.engine import Engine
from llama.model import ModelArgs, Transformer
from llama.progress import progress_bar
from llama.quantization import LowBitLinear, pack_modules
from llama.rotary import DynamicScaling
from llama.runner import BLOCK_SIZE, Program, Runner, count_blocks
from llama.scheduler import MAX_RUNNING, Scheduler
from llama.streams import tell
from llama.tokenizer import Tokenizer
from llama.vocabulary import TokenType

STEP_TOKENS, STEP_TOKENS_ON_GPU = 512, 2048
NO_DRAFT = "none"  # what `Llama.build(draft=)` takes besides a checkpoint and the names in DRAFTERS
Draft = Transformer | str | None  # what guesses an engine's next tokens, on rank 0: a model, or a name


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run, and what it was made of."""

    model: Transformer
    tokenizer: Tokenizer
    chat_format: ChatFormat
    checkpoint: Checkpoint
    quantization: str | None  # the format that was asked for; None: as stored
    kv_dtype: str  # what keys and values are stored in
    program: Program | None  # a package that computes the model's steps
    max_running: int | None  # sequences at once, where it was exported for so many


def load(
    ckpt_dir: str | Path | None = None,
    tokenizer_path: str | Path | None = None,
    *,
    max_seq_len: int | None = None,
    max_batch_size: int | None = None,
    model_parallel_size: int | None = None,
    pipeline_parallel_size: int | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    quantization: str | None = None,
    deterministic: bool = False,
    chat_format: str | None = None,
    tool_format: str | None = None,
    adapter: str | Path | Sequence[str | Path] | None = None,
    kv_dtype: str = "auto",
    compile: bool | None = None,
    trust_compiled: bool = False,
) -> Loaded:
    """Opens a checkpoint of any format and loads this rank's part of it; the options are those of `Llama.build`.

    `quantization` is a format's name, "none" or None. Raises FileNotFoundError, ValueError or RuntimeError.
    """
    target = choose_device(device)
    group = parallel.start(model_parallel_size, target.type, pipeline_parallel_size)
    with group.failing_together():
        exported = open_export(ckpt_dir)
        if exported is not None:
            limits = exported.limits
            max_seq_len = exported.within("max_seq_len", max_seq_len, limits.sequence_length)
            max_batch_size = exported.within("max_batch_size", max_batch_size, limits.batch_size)
            dtype = exported.same("dtype", dtype, limits.dtype)
            kv_dtype = exported.same("kv_dtype", kv_dtype, limits.kv_dtype)
            torch.set_num_threads(limits.num_cores)
        checkpoint = open_checkpoint(default_model() if ckpt_dir is None else ckpt_dir)
        if exported is not None:
            exported.validate_checkpoint(checkpoint.digest)
        num_parts = group.tensor.size
        checkpoint, beside = with_adapters_beside(
            checkpoint, adapter, lambda weight: quantization is None and keeps_blocks(weight, num_parts, target)
        )
        packed = packed_modules(untied(checkpoint), quantization, num_parts, target)
        if "output" in packed:
            checkpoint = untied(checkpoint)
        args = replace(checkpoint.args)
        args.max_seq_len = max_seq_len or args.max_seq_len
        args.max_batch_size = max_batch_size or args.max_batch_size
        with torch.device("meta"):
            model = Transformer(args, group)
        pack_modules(model, packed)
        with ThreadPoolExecutor(1) as reader, progress_bar("Loading", show=group.rank == 0) as advance:
            reading = reader.submit(read_tokenizer, checkpoint, tokenizer_path, chat_format, tool_format)
            load_weights(
                model,
                checkpoint,
                rank=group.tensor.rank,
                world_size=num_parts,
                device=target,
                dtype=choose_dtype(dtype, checkpoint.dtype or checkpoint.plain_dtype, target),
                progress=stopping(advance, reading),
            )
            model.prepare(BLOCK_SIZE if deterministic else None)
            tokenizer, chosen, surplus = reading.result()
    with group.failing_together():
        for one in beside:  # for which ranks meet
            add_always(one, model)
    return_memory()
    if group.rank == 0:
        for warning in (*checkpoint.warnings, *surplus, *beyond_training(checkpoint.args, max_seq_len)):
            tell(f"warning: {warning}")
        if checkpoint.unknown_keys:
            unknown = ", ".join(checkpoint.unknown_keys)
            tell(f"{checkpoint.path}: settings that have no effect here: {unknown}")
    return Loaded(
        model,
        tokenizer,
        chosen,
        checkpoint,
        quantization,
        kv_dtype,
        choose_program(model, choose_kv_dtype(kv_dtype, model.norm.weight.dtype), compile, exported, trust_compiled),
        None if exported is None else max_batch_size,
    )


def beyond_training(args: ModelArgs, max_seq_len: int | None) -> Iterator[str]:
    """What to warn of where more tokens are asked for than a model was made for."""
    context = args.max_seq_len
    if isinstance(args.rope_scaling, DynamicScaling):
        context = int(context * args.rope_scaling.factor)
    if max_seq_len is not None and max_seq_len > context:
        yield (
            f"max_seq_len is {max_seq_len}, but the model was made for {context} tokens, and what comes later "
            f"stands where it never saw any. Rope scaling by {max_seq_len / context:.3g} or more, if the "
            "checkpoint's settings name it, turns positions more slowly, so that all of them look like those it knows"
        )


def read_tokenizer(
    checkpoint: Checkpoint, tokenizer_path: str | Path | None, chat_format: str | None, tool_format: str | None = None
) -> tuple[Tokenizer, ChatFormat, list[str]]:
    """The tokenizer, the chat format, and what to warn of; a thread does it while weights are read."""
    own = chat_format is None or chat_format in FORMATS
    template = None if own else read_template(chat_format)  # whose markup text must not become
    tokenizer = checkpoint.open_tokenizer(tokenizer_path, template)
    warnings = validate_vocabulary(tokenizer, checkpoint.args)
    return tokenizer, choose_format(chat_format, tokenizer, tool_format), warnings


def stopping(progress: Callable[[int, int], None] | None, other: Future) -> Callable[[int, int], None]:
    """`progress`, which also raises what `other` has raised by then."""

    def report(done: int, total: int) -> None:
        if progress:
            progress(done, total)
        if other.done():
            other.result()

    return report


def make_engine(
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    seed: int,
    kv_cache_memory: int | str | None = None,
    kv_dtype: str = "auto",
    stop_ids: frozenset[int] = frozenset(),
    can_generate: bool = True,
    program: Program | None = None,
    max_running: int | None = None,
    draft: Draft = None,
) -> Engine:
    """An engine whose cache takes `kv_cache_memory` bytes (or "2GiB"), or half of what is free where that is None.

    What a draft model keeps is in that. `program` computes steps in the model's place; no more than `max_running`
    sequences run at once.
    """
    dtype, beside = choose_kv_dtype(kv_dtype, model.norm.weight.dtype), 0
    if isinstance(draft, Transformer):
        draft_dtype = choose_kv_dtype(kv_dtype, draft.norm.weight.dtype)
        beside = draft.cache_shape.bytes_per_token(draft_dtype)
    memory = None if kv_cache_memory is None else parse_size(kv_cache_memory)
    with model.parallel.failing_together():
        own = count_blocks(model, memory, dtype, beside)
    num_blocks = min(model.parallel.gather_json(own))  # stages differ in layers, machines in memory
    drafter = None
    if isinstance(draft, Transformer):
        runner = Runner(draft, num_blocks, BLOCK_SIZE, draft_dtype)
        drafter = DraftModel(runner, model.vocab_size, draft.params.max_seq_len)
    elif draft is not None:
        drafter = DRAFTERS[draft]()
    return Engine(
        Runner(model, num_blocks, BLOCK_SIZE, dtype, adapters_of(model), program),
        Scheduler(num_blocks, BLOCK_SIZE, step_tokens(model.norm.weight.device), max_running or MAX_RUNNING),
        tokenizer,
        max_seq_len=model.params.max_seq_len,
        seed=seed,
        stop_ids=tokenizer.stop_ids | stop_ids,
        can_generate=can_generate,
        drafter=drafter,
    )


def step_tokens(device: torch.device) -> int:
    """How many tokens a step has at most: so many that products are as fast as they can be, and answers wait no longer
    than they must."""
    return STEP_TOKENS if device.type == "cpu" else STEP_TOKENS_ON_GPU


def load_draft(draft: str | Path | None, large: Loaded, **options: Any) -> Draft:
    """What guesses for a model: its own text, or a small model, loaded with these options of `load` by rank 0 alone.

    None is "lookup" where guesses change no bit of an answer, else nothing. Every rank takes part; each of them raises
    FileNotFoundError or ValueError for a model that cannot guess for this one.
    """
    if draft is None:
        alone = large.model.parallel.count(rows_stand_alone(large.model))
        return "lookup" if alone == large.model.parallel.size else None
    if draft == NO_DRAFT:
        return None
    if draft in DRAFTERS:
        return draft
    with large.model.parallel.failing_together():
        if large.model.parallel.rank != 0:
            return None
        small = load(draft, model_parallel_size=1, compile=False, **options)
        validate_draft(small, large)
        return small.model


def validate_draft(small: Loaded, large: Loaded) -> None:
    """Raises ValueError for a draft model whose ids mean other tokens, or that generates nothing."""
    path = small.checkpoint.path
    if not small.checkpoint.has_head:
        raise ValueError(f"{path} has no output layer, so that it cannot draft: give a model that generates")
    pairs = zip(small.tokenizer.codec.tokens.tokens, large.tokenizer.codec.tokens.tokens, strict=False)
    other = next((id for id, (own, wanted) in enumerate(pairs) if own != wanted), None)
    if other is not None:
        raise ValueError(
            f"{path} cannot draft for {large.checkpoint.path}: its vocabulary is another one, as token {other} shows; "
            "give a small model of the same family, or draft='lookup'"
        )


def rows_stand_alone(model: Transformer) -> bool:
    """Whether the bits of a row's result do not depend on how many rows a small step has, on this rank.

    It is so for tiles of fixed size and the compiled low-bit kernels; other products of one row and of several differ
    in the last bits.
    """
    if model.fixed_rows is not None:
        return True
    products = [joint for _, joint in joints(model)]
    linears = [linear for joint in products for linear in ([joint.joint] if joint.joint else joint.linears)]
    if model.stage.is_last:
        linears.append(model.output)
    all_low_bit = all(isinstance(linear, LowBitLinear) and linear.prepared for linear in linears)
    return all_low_bit and all(joint.added is None for joint in products)


def validate_vocabulary(tokenizer: Tokenizer, args: ModelArgs) -> list[str]:
    """Warns of a tokenizer that is larger than the model's table by tokens that were added to it, or that nothing uses.

    It may be smaller, since tables are padded. Raises ValueError where ordinary text becomes what the model has not.
    """
    if tokenizer.n_words <= args.vocab_size:
        return []
    sizes = f"the tokenizer has {tokenizer.n_words} tokens, but the model's vocabulary {args.vocab_size}"
    added = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED)
    if all(type in added for type in tokenizer.codec.tokens.types[args.vocab_size :]):
        return [f"{sizes}: prompts with the added tokens beyond it are refused"]
    raise ValueError(f"{sizes}: they do not belong together; give the model's own tokenizer_path")
