"""Decoding steps that are captured once and replayed give what the model gives: on a GPU as CUDA graphs, elsewhere with
the model in a graph's place."""

from functools import partial

import pytest
import torch
from support.tiny import tiny_args, tiny_model

from llama import Llama, SamplingParams
from llama.answer import Query
from llama.attention import Paged, StepCache, Tiles
from llama.bench.shapes import MODEL_SHAPES, write_model
from llama.cache import KVCache, Span
from llama.compiled import captured
from llama.compiled.captured import CapturedStep, context_of_graph, rows_of_graph, why_not_captured

pytest.importorskip("triton")

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
on_a_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")
CLOSE = dict(rtol=1e-4, atol=1e-4)
NUM_SLOTS = 4096


@pytest.fixture
def captures(monkeypatch) -> list:
    """One entry a capture. Without a GPU what is captured is computed anew, into the tensors of the first time."""
    made, capture = [], captured.capture

    def count(step, device, pool):
        made.append(step)
        if HAS_GPU:
            return capture(step, device, pool)
        results = step()

        def replay():
            for old, new in zip(results, step(), strict=True):
                old.copy_(new)
            return results

        return replay

    monkeypatch.setattr(captured, "capture", count)
    if not HAS_GPU:
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    return made


def inputs(model, cache: KVCache, contexts: list[int], plan, num_rows: int = 1, seed: int = 0) -> tuple:
    """Of a step in which each request's last `num_rows` tokens are computed."""
    spans = [
        Span(place * num_rows, num_rows, context, ((1024 * place, context + -context % 16),))
        for place, context in enumerate(contexts)
    ]
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 256, (num_rows * len(contexts),), generator=generator).to(DEVICE)
    positions = torch.tensor([p for span in spans for p in range(span.start, span.context)], device=DEVICE)
    return tokens, positions, StepCache.of(cache, spans, plan), None


def filled_cache(model, dtype: torch.dtype = torch.float32) -> KVCache:
    cache = KVCache(model.cache_shape, NUM_SLOTS, DEVICE, dtype)
    generator = torch.Generator().manual_seed(1)
    for keys_and_values in cache.layers:
        for store in keys_and_values:
            numbers = torch.randn(store.numbers.shape, generator=generator)
            store.numbers.copy_(numbers if store.scales is None else numbers.mul(40).clamp(-127, 127))
            if store.scales is not None:
                store.scales.fill_(0.02)
    return cache


@torch.inference_mode()
def check(program: CapturedStep, own: KVCache, other: KVCache, contexts: list[int], seed: int = 0) -> None:
    """Logits, states and both caches after a step are those of PyTorch's operators."""
    model = program.model
    found = program.step(*inputs(model, own, contexts, partial(Paged.plan, group=2), seed=seed))
    wanted = model.step(*inputs(model, other, contexts, Tiles.plan, seed=seed))
    for one, another in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, another, **CLOSE)
    for stores, others in zip(own.layers, other.layers, strict=True):
        for store, another in zip(stores, others, strict=True):
            if store.scales is None:
                torch.testing.assert_close(store.numbers, another.numbers, **CLOSE)
            else:
                assert (store.numbers.int() - another.numbers.int()).abs().max() <= 1


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("window", [None, 40])
def test_replayed_steps_give_what_the_model_gives_and_fewer_rows_use_a_larger_graph(captures, kv_dtype, window):
    model = tiny_model(tiny_args(sliding_window=window)).to(DEVICE)
    program, own, other = CapturedStep(model), filled_cache(model, kv_dtype), filled_cache(model, kv_dtype)
    for seed, contexts in enumerate([[5, 300, 17], [6, 301, 18, 1], [7, 19], [600], [8, 302, 20]]):
        check(program, own, other, contexts, seed)
    assert len(captures) == 3  # of four rows, of two, and of one row with a longer context


def test_other_steps_are_the_models_own(captures):
    model = tiny_model(tiny_args()).to(DEVICE)
    program, cache = CapturedStep(model), filled_cache(model)
    plan = partial(Paged.plan, group=2)
    with torch.inference_mode():
        program.step(*inputs(model, cache, [20, 30], plan, num_rows=3))
        tokens, positions, caches, _ = inputs(model, cache, [20, 30], plan)
        logits, states = program.step(tokens, positions, caches, torch.tensor([1], device=DEVICE))
        program.step(*inputs(model, cache, [20, 30], Tiles.plan))
    assert (len(logits), len(states)) == (1, 2)
    assert not captures


def test_a_replaced_weight_a_hook_and_another_cache_are_noticed(captures):
    model = tiny_model(tiny_args()).to(DEVICE)
    program, own, other = CapturedStep(model), filled_cache(model), filled_cache(model)
    check(program, own, other, [10])
    norm = model.layers[1].ffn_norm
    norm.weight = torch.nn.Parameter(2 * norm.weight, requires_grad=False)
    check(program, own, other, [11])
    assert len(captures) == 2
    check(program, filled_cache(model), filled_cache(model), [12])
    assert len(captures) == 3
    seen = []
    hook = model.layers[0].register_forward_pre_hook(lambda *_: seen.append(1))
    check(program, own, other, [13])
    hook.remove()
    assert len(seen) == 2  # of both sides
    assert len(captures) == 3


def test_graphs_are_of_few_sizes_that_hold_every_step():
    sizes = [rows_of_graph(num_rows) for num_rows in range(1, 257)]
    assert all(size >= num_rows for num_rows, size in enumerate(sizes, 1))
    assert sorted(set(sizes)) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 96, 128, 160, 192, 224, 256]
    assert [context_of_graph(longest) for longest in (1, 512, 513, 5000)] == [512, 512, 2048, 8192]


def test_what_cannot_be_captured_says_why(monkeypatch):
    model = tiny_model(tiny_args())
    assert why_not_captured(model) is None
    model.prepare(fixed_rows=16)
    assert "deterministic=True" in why_not_captured(model)
    monkeypatch.setattr(captured, "has_triton", lambda: False)
    assert "Triton" in why_not_captured(tiny_model(tiny_args()))


@on_a_gpu
@pytest.mark.parametrize("format", [None, "sym_int4", "nf4"])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_answers_on_a_gpu_are_the_same_with_graphs_and_without(captures, tmp_path, format, kv_dtype):
    """Of requests of several lengths, some of which end before others."""
    write_model(tmp_path / "model", MODEL_SHAPES["tiny"], torch.float32)
    prompts = [[(7 * place * place + length) % 1000 for place in range(length)] for length in (3, 40, 700, 5, 90)]
    answers = []
    for compile in (False, None):
        llm = Llama.build(tmp_path / "model", device="cuda", quantization=format, kv_dtype=kv_dtype, compile=compile)
        queries = [
            Query(prompt, SamplingParams(temperature=0.0, max_tokens=10 + 9 * place, ignore_eos=True).resolve())
            for place, prompt in enumerate(prompts)
        ]
        answers.append([completion.tokens for completion in llm.run(queries)])
        assert bool(captures) == (compile is None)
        llm.close()
    assert answers[0] == answers[1]
