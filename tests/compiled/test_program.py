"""A package computes what the eager model computes: logits, states, and what is stored."""

import subprocess
import sys

import pytest
import torch
from support.checkpoints import sample, write_hf, write_sentencepiece
from support.tiny import tiny_args, tiny_model

from llama import SamplingParams
from llama.attention import StepCache, choose_backend
from llama.cache import CacheShape, KVCache, Span
from llama.compiled import choose_program, program
from llama.compiled.graph import StepGraph
from llama.compiled.program import CompiledStep
from llama.linear import Linear
from llama.model import Transformer
from llama.rotary import DynamicScaling

pytestmark = pytest.mark.timeout(1800)  # one of them waits for g++, which may have to share the processor
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
CLOSE = dict(rtol=0, atol=1e-4)
SHAPE = dict(dim=64, n_heads=4, n_kv_heads=2, max_seq_len=1024)  # heads of 16, which the kernels serve
NUM_SLOTS = 9 * 1024
STEPS = {  # of each request: rows, tokens before them
    "one row": [(1, 20)],
    "four rows of one request": [(4, 9)],
    "eight requests": [(1, 7 * number) for number in range(8)],
    "a prompt": [(100, 0)],
    "a prompt beside decoding": [(1, 30), (60, 16), (2, 5), (1, 0)],
}


def step_of(
    model: Transformer, kv_dtype: torch.dtype, parts: list[tuple[int, int]], window: int | None = None
) -> tuple[tuple, KVCache]:
    """Everything that `Program.step` takes, and the cache: what was stored before is the same in every call."""
    shape = CacheShape(model.n_layers, model.params.n_kv_heads, model.params.head_dim, window)
    cache = KVCache(shape, NUM_SLOTS, torch.device("cpu"), kv_dtype)
    generator = torch.Generator().manual_seed(1)
    for store in (store for layer in cache.layers for store in layer):
        numbers = torch.randn(store.numbers.shape, generator=generator)
        store.numbers.copy_(numbers if store.scales is None else numbers.mul(40).clamp(-127, 127))
        if store.scales is not None:
            store.scales.fill_(0.02)
    spans, first_row, wanted, positions = [], 0, [], []
    for number, (num_rows, before) in enumerate(parts):
        context = before + num_rows
        extents = ((1024 * number, context // 2 + 1), (1024 * number + 400, context))  # in two places
        spans.append(Span(first_row, num_rows, context, extents, limit=300))
        positions += range(before, context)
        first_row += num_rows
        wanted.append(first_row - 1)
    tokens = torch.tensor([(7 * row * row + 3) % 256 for row in range(first_row)])
    caches = StepCache.of(cache, spans, choose_backend(cache, model.norm.weight.dtype))
    limits = torch.full_like(tokens, 300) if model.params.rope_scaling is not None else None
    return (tokens, torch.tensor(positions), caches, torch.tensor(wanted), limits), cache


@torch.inference_mode()
def assert_computes_the_same(
    compiled: CompiledStep, parts: list[tuple[int, int]], window: int | None = None, **close
) -> None:
    """Of logits, states and every layer's cache."""
    inputs, cache = step_of(compiled.model, compiled.kv_dtype, parts, window)
    expected = compiled.model.step(*inputs)
    others, other_cache = step_of(compiled.model, compiled.kv_dtype, parts, window)
    untouched = step_of(compiled.model, compiled.kv_dtype, parts, window)[1]
    for found, wanted in zip(compiled.step(*others), expected, strict=True):
        torch.testing.assert_close(found, wanted, **close or CLOSE)
    for found, wanted, before in zip(other_cache.layers, cache.layers, untouched.layers, strict=True):
        for store, other, empty in zip(found, wanted, before, strict=True):
            assert not torch.equal(other.numbers, empty.numbers)  # each layer has stored its own
            steps = dict(rtol=0, atol=1) if other.scales is not None else close or CLOSE
            torch.testing.assert_close(store.numbers, other.numbers, **steps)
            if other.scales is not None:
                torch.testing.assert_close(store.scales, other.scales, **close or CLOSE)


@pytest.fixture(scope="module")
def of_tiny(compiled) -> CompiledStep:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(compiled.cache))
        return compiled.build().engine.runner.program


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_any_size_has_the_models_logits_states_and_cache(of_tiny, name, monkeypatch):
    ran = []  # and not the model itself
    monkeypatch.setattr(of_tiny, "_loader", Watched(of_tiny._loader, ran))
    assert_computes_the_same(of_tiny, STEPS[name])
    assert len(ran) == 1


class Watched:
    """A package's loader that notes when it runs."""

    def __init__(self, loader, ran: list):
        self.loader, self.ran = loader, ran

    def boxed_run(self, inputs: list) -> list:
        self.ran.append(len(inputs))
        return self.loader.boxed_run(inputs)


def test_a_sliding_window_needs_no_package_of_its_own(of_tiny):
    assert_computes_the_same(of_tiny, STEPS["a prompt beside decoding"], window=11)


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [([(600, 0)], None), ([(2, 0)] * 8 + [(500, 0)], None), ([(5, 3)], torch.tensor([], dtype=int))],
)
def test_what_the_graph_does_not_know_is_left_to_the_model(of_tiny, monkeypatch, parts, wanted):
    ran = []
    monkeypatch.setattr(of_tiny, "_loader", Watched(of_tiny._loader, ran))
    (tokens, positions, caches, some, limits), _ = step_of(of_tiny.model, torch.float32, parts)
    with torch.inference_mode():
        logits, states = of_tiny.step(tokens, positions, caches, some if wanted is None else wanted, limits)
    assert len(states) == len(tokens)
    assert len(logits) == (len(some) if wanted is None else 0)
    assert ran == []


def test_answers_are_those_of_the_eager_model(made):
    eager, llm = made.build(compile=False), made.build(compile=True)
    assert eager.engine.runner.program is eager.model
    assert isinstance(llm.engine.runner.program, CompiledStep)
    prompts = [[(31 * i + 7 * j * j) % 256 for j in range(3 + 29 * i)] for i in range(6)]
    assert [c.tokens for c in llm.complete(prompts, GREEDY)] == [c.tokens for c in eager.complete(prompts, GREEDY)]
    for found, expected in zip(llm.score(prompts), eager.score(prompts), strict=True):
        found, expected = ([entry.logprob for entry in entries[1:]] for entries in (found, expected))
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), **CLOSE)
    torch.testing.assert_close(llm.embed(prompts), eager.embed(prompts), **CLOSE)


def test_a_package_that_is_there_is_used_unless_one_says_no(made):
    assert isinstance(made.build().engine.runner.program, CompiledStep)
    llm = made.build(compile=False)
    assert llm.engine.runner.program is llm.model


def test_weights_are_shared_with_the_loaded_model(of_tiny):
    for name, weight in of_tiny.model.named_parameters():
        if f"model.{name}" in of_tiny._weights:
            assert of_tiny._weights[f"model.{name}"].data_ptr() == weight.data_ptr()
    first = of_tiny.model.layers[0].feed_forward.gate_up.joint.weight
    inputs, _ = step_of(of_tiny.model, torch.float32, STEPS["one row"])
    with torch.inference_mode():
        before = of_tiny.step(*inputs)[0]
        kept = first.clone()
        first.mul_(2)
        changed = of_tiny.step(*inputs)[0]
        first.copy_(kept)
        assert not torch.equal(before, changed)
        assert torch.equal(of_tiny.step(*inputs)[0], before)


SECOND = """
import sys
from llama import Llama
llm = Llama.build(sys.argv[1], device="cpu", dtype="fp32", kv_cache_memory=1 << 22, compile=True)
print(type(llm.engine.runner.program).__name__, "torch._inductor" in sys.modules, "torch._dynamo" in sys.modules)
print(*llm.generate([[5, 6, 7]], 8, temperature=0.0)[0][0])
"""


def test_a_second_process_needs_no_compiler_and_imports_none(made, no_compiler):
    done = subprocess.run([sys.executable, "-c", SECOND, made.checkpoint], capture_output=True, text=True, check=True)
    *_, program, tokens = done.stdout.splitlines()
    assert program == "CompiledStep False False"
    expected = made.build(compile=False).generate([[5, 6, 7]], 8, temperature=0.0)[0][0]
    assert tokens.split() == [str(token) for token in expected]


def test_where_torch_has_its_loader_elsewhere_its_own_function_finds_it(of_tiny, monkeypatch):
    class Other:
        def __init__(self, *arguments):
            raise TypeError("other arguments")

    class Known:
        loader = "its loader"

    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", Other)
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda path: Known)
    assert program.load_package(of_tiny.package) == "its loader"


@pytest.mark.slow
def test_packed_weights_and_keys_in_8_bits_are_compiled_too(tmp_path, elsewhere):
    args, weights = sample(**SHAPE | {"hidden_dim": 192})
    checkpoint = write_hf(tmp_path / "model", args, weights)
    write_sentencepiece(checkpoint / "tokenizer.model")
    llm = elsewhere.build(checkpoint, quantization="sym_int4", kv_dtype="int8", compile=True)
    assert llm.engine.runner.cache.layers[0][0].numbers.dtype == torch.int8
    for parts in STEPS.values():  # rounding to 8 bits makes more of the last bit
        assert_computes_the_same(llm.engine.runner.program, parts, rtol=0, atol=0.05)


@pytest.mark.slow
def test_scaling_by_length_biases_and_a_tied_head_are_compiled_too(elsewhere):
    model = tiny_model(
        tiny_args(
            **SHAPE | {"rope_scaling": DynamicScaling(2.0, 64), "tie_word_embeddings": True},
            attention_bias=True,
            attention_output_bias=True,
            mlp_bias=True,
        )
    )
    model.prepare()
    compiled = choose_program(model, torch.float32, True)
    for parts in STEPS.values():
        assert_computes_the_same(compiled, parts)


@pytest.mark.slow
def test_weights_in_onednns_own_order_are_compiled_too(elsewhere):
    model = tiny_model(tiny_args(**SHAPE))
    model.prepare()
    for linear in StepGraph(model, torch.float32).modules():
        if isinstance(linear, Linear) and linear.weight is not None:
            linear.blocked, linear.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight, 32), None
    compiled = choose_program(model, torch.float32, True)
    for parts in STEPS.values():
        assert_computes_the_same(compiled, parts)
