"""Adapters beside a model, each for its own rows; PEFT made them and says what they compute."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import ALL, KINDS, peft_logits, write_adapter, write_base
from support.ranks import forked

from llama import Llama, SamplingParams
from llama.checkpoint import open_checkpoint, save_low_bit
from llama.kernels.lowrank import Factors
from llama.lora import LowRankChange, in_one_call
from llama.perplexity import perplexity

TOKENS = [1, 50, 7, 200, 33, 90, 12, 5]
OTHERS = [1, 9, 9, 17, 80]
SCORE = SamplingParams(max_tokens=0, prompt_logprobs=0)
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


def build(base: Path, **options) -> Llama:
    return Llama.build(base, max_seq_len=64, dtype="fp32", device="cpu", **options)


def scores(llm: Llama, tokens=TOKENS, adapter: str | None = None) -> torch.Tensor:
    """The log-probabilities of a prompt's tokens but the first."""
    [completion] = llm.complete([tokens], SCORE, adapter)
    return torch.tensor([entry.logprob for entry in completion.prompt_logprobs[1:]])


def of_peft(model, tokens=TOKENS) -> torch.Tensor:
    logprobs = peft_logits(model, tokens).log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, and two adapters with PEFT's models of them."""
    folder = tmp_path_factory.mktemp("lora")
    base = write_base(folder / "base")
    models = {
        "a": write_adapter(base, folder / "a", 1, target_modules=ALL),
        "b": write_adapter(base, folder / "b", 2, r=3, target_modules=["q_proj", "down_proj", "lm_head"]),
    }
    return base, {"a": folder / "a", "b": folder / "b"}, models


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_any_kind_computes_what_peft_computes(tmp_path, kind):
    config, changes = KINDS[kind]
    base = write_base(tmp_path / "base", **changes)
    expected = of_peft(write_adapter(base, tmp_path / "adapter", **config))
    llm = build(base, adapters={"x": tmp_path / "adapter"})
    plain = scores(llm)
    torch.testing.assert_close(scores(llm, adapter="x"), expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 0.1
    assert torch.equal(scores(llm), plain)
    merged = build(base, adapter=tmp_path / "adapter")
    torch.testing.assert_close(scores(merged), expected, rtol=1e-4, atol=1e-4)


def mixed(llm: Llama, names) -> list:
    """One step's scores and a few more tokens of each, all in the same steps."""
    from llama.answer import Query

    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, prompt_logprobs=0, logprobs=0).resolve()
    queries = [Query(TOKENS if i % 2 else OTHERS, params, adapter=name) for i, name in enumerate(names)]
    found = sorted(llm.run(queries, strict=True), key=lambda one: one.place)
    return [(one.tokens, [e.logprob for e in one.prompt_logprobs[1:] + one.logprobs]) for one in found]


@pytest.mark.parametrize("deterministic", [False, True])
def test_two_adapters_and_base_rows_share_a_step(made, deterministic):
    base, paths, models = made
    llm = build(base, adapters=paths, deterministic=deterministic)
    names = ["a", None, "b", "a", None, "b"]
    for name, (tokens, logprobs), i in zip(names, mixed(llm, names), range(6), strict=True):
        prompt = TOKENS if i % 2 else OTHERS
        if name is not None:
            expected = of_peft(models[name], [*prompt, *tokens])
            torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=1e-4, atol=1e-4)
        [(alone_tokens, alone)] = mixed(llm, [name]) if not i % 2 else [mixed(llm, [None, name])[1]]
        assert alone_tokens == tokens
        if deterministic:
            assert alone == logprobs


def test_what_several_adapters_add_to_the_same_rows_is_never_one_call_whose_threads_would_race():
    factors = Factors.of([(torch.randn(2, 32), torch.randn(16, 2))], [0])
    one = LowRankChange(replace(factors, width=16))
    found = list(in_one_call([(0, 3, [one, one]), (3, 2, [one]), (5, 99, [one])]))
    assert [rows for rows, _ in found] == [slice(5, 104), None, None]
    assert [len(change.factors) for _, change in found[1:]] == [2, 1]


def test_base_rows_have_the_same_bits_beside_adapters(made):
    base, paths, _ = made
    expected = mixed(build(base), [None] * 3)
    found = mixed(build(base, adapters=paths), [None, "a", None])
    assert [found[0], found[2]] == [expected[0], expected[2]]


@pytest.mark.parametrize("format", ["sym_int4", "q8_0", "nf4"])
def test_an_adapter_on_packed_weights_adds_the_same(tmp_path, format):
    base = write_base(tmp_path / "base", dim=128, multiple_of=64, tie_word_embeddings=True)
    write_adapter(base, tmp_path / "adapter", target_modules=ALL)
    plain, packed = build(base, adapters={"x": tmp_path / "adapter"}), build(base, quantization=format)
    packed.load_adapter("x", tmp_path / "adapter")
    packed.load_adapter("zero", f"{tmp_path}/adapter=0")
    assert torch.equal(scores(packed, adapter="zero"), scores(packed))
    x = torch.randn(3, 128)
    for one, other in zip(plain.model.layers, packed.model.layers, strict=True):
        for site in (lambda layer: layer.attention.qkv, lambda layer: layer.attention.out):
            zeros = torch.zeros(3, sum(linear.out_features for linear in site(one).linears))
            [change], [same] = site(one).added.changes[1], site(other).added.changes[1]
            y, z = zeros.clone(), zeros.clone()
            change.apply(y, x)
            same.apply(z, x)
            assert torch.equal(y, z)
    assert (scores(packed, adapter="x") - scores(packed)).abs().max() > 0.1


def test_a_weight_scales_what_is_added(made, tmp_path):
    base, paths, _ = made
    llm = build(base, adapters={"zero": f"{paths['a']}=0", "half": f"{paths['a']}=0.5"})
    assert torch.equal(scores(llm, adapter="zero"), scores(llm))
    torch.testing.assert_close(
        scores(llm, adapter="half"), scores(build(base, adapter=f"{paths['a']}=0.5")), rtol=1e-4, atol=1e-4
    )


def test_several_adapters_add_up(made, tmp_path):
    base, paths, _ = made
    write_adapter(base, tmp_path / "other", r=3, target_modules=["q_proj", "down_proj"])
    both = [f"{paths['a']}=0.5", tmp_path / "other"]
    llm = build(base, adapters={"both": both})
    torch.testing.assert_close(scores(llm, adapter="both"), scores(build(base, adapter=both)), rtol=1e-4, atol=1e-4)
    write_adapter(base, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(ValueError, match="dora: whole weights and DoRA's magnitudes are taken as they are"):
        llm.load_adapter("x", [paths["a"], tmp_path / "dora"])


def test_another_adapter_under_the_same_name_finds_no_old_blocks_and_requests_end_on_theirs(made):
    base, paths, _ = made
    prompt = [1, *range(20, 56)]  # two full blocks
    expected = {name: build(base, adapters={"x": paths[name]}).complete([prompt], GREEDY, "x") for name in "ab"}
    llm = build(base, adapters={"x": paths["a"]})
    events = llm.stream_text(prompt, GREEDY, "x")
    text = next(events)
    llm.unload_adapter("x")
    with pytest.raises(ValueError, match="no adapter 'x' is loaded; there are: none"):
        llm.complete([prompt], GREEDY, "x")
    llm.load_adapter("x", paths["b"])
    assert llm.complete([prompt], GREEDY, "x")[0].tokens == expected["b"][0].tokens
    assert text + "".join(events) == expected["a"][0].text
    again = llm.complete([prompt], GREEDY, "x")[0]
    assert (again.tokens, again.num_cached_tokens) == (expected["b"][0].tokens, 32)


def test_what_was_unloaded_leaves_nothing_behind(made):
    base, paths, _ = made
    llm = build(base, adapters=paths)
    joint = llm.model.layers[0].attention.qkv
    tensor = weakref.ref(joint.added.changes[1][0].factors.numbers)
    events = llm.stream_text(TOKENS, GREEDY, "a")
    next(events)
    llm.unload_adapter("a")
    gc.collect()
    assert tensor() is not None
    list(events)
    gc.collect()
    assert tensor() is None
    llm.unload_adapter("b")
    assert joint.added is None
    assert llm.model.added_to_output is None
    assert llm.adapters == []


def test_an_answer_of_several_choices_stays_with_its_adapter(made):
    base, paths, _ = made
    llm = build(base, adapters=paths)
    several = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, n=3)
    assert {tuple(one.tokens) for one in llm.complete([TOKENS], several, "a")} == {
        tuple(llm.complete([TOKENS], GREEDY, "a")[0].tokens)
    }


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A base stored in q8_0, and two adapters: of linears with DoRA, and of linears and the output layer."""
    folder = tmp_path_factory.mktemp("packed")
    plain = write_base(folder / "plain", dim=128, multiple_of=64)
    save_low_bit(open_checkpoint(plain), folder / "base", "q8_0")
    write_adapter(plain, folder / "dora", 1, target_modules=ALL, use_dora=True)
    write_adapter(plain, folder / "other", 2, target_modules=["q_proj", "down_proj", "lm_head"])
    file = folder / "other" / "adapter_model.safetensors"  # PEFT puts the base model's own output layer there as well
    save_file({name: one for name, one in load_file(file).items() if "lora_" in name}, file)
    return folder / "base", folder / "dora", folder / "other"


def linears(llm: Llama) -> set[str]:
    layer = llm.model.layers[1]
    return {type(one).__name__ for one in (layer.attention.wq, layer.feed_forward.w2, llm.model.output)}


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_adapter_merged_into_stored_blocks_leaves_them_and_is_computed_beside_them(packed, capsys, deterministic):
    base, dora, other = packed
    expected = {name: scores(build(base, adapters={"x": name}), adapter="x") for name in (dora, other)}
    for name in (dora, other):
        llm = build(base, adapter=name, deterministic=deterministic)
        assert linears(llm) == {"LowBitLinear"}
        torch.testing.assert_close(scores(llm), expected[name], rtol=1e-4, atol=1e-4)
    assert "is computed beside its blocks" in capsys.readouterr().err


def test_more_adapters_stand_on_one_that_is_computed_beside_blocks(packed):
    base, dora, other = packed
    both = build(base, adapter=[dora, other])
    llm = build(base, adapter=dora, adapters={"x": other})
    alone = scores(llm)
    torch.testing.assert_close(scores(llm, adapter="x"), scores(both), rtol=1e-4, atol=1e-4)
    assert (scores(llm, adapter="x") - alone).abs().max() > 0.1
    with pytest.raises(ValueError, match="DoRA's lengths are those of a sum, which is not made"):
        llm.load_adapter("y", dora)
    llm.unload_adapter("x")
    assert torch.equal(scores(llm), alone)


def test_a_quantization_that_is_named_merges_all_the_same(packed):
    base, dora, _ = packed
    assert linears(build(base, adapter=dora, quantization="none")) == {"Linear"}
    llm = build(base, adapter=dora, quantization="q8_0")
    assert llm.model.layers[0].attention.qkv.added is None


def test_scores_vectors_and_perplexity_are_those_of_an_adapter(made):
    base, paths, _ = made
    llm, merged = build(base, adapters=paths), build(base, adapter=paths["a"])
    [found], [expected] = llm.score([TOKENS], "a"), merged.score([TOKENS])
    assert [one.logprob for one in found[1:]] == pytest.approx([one.logprob for one in expected[1:]], abs=1e-4)
    torch.testing.assert_close(llm.embed([TOKENS], adapter="a"), merged.embed([TOKENS]), rtol=1e-4, atol=1e-4)
    text = "hello lo ello"
    assert perplexity(llm, text, adapter="a").perplexity == pytest.approx(perplexity(merged, text).perplexity, rel=1e-3)


def test_what_only_a_merged_adapter_can_do_is_refused(tmp_path):
    base = write_base(tmp_path / "base", vocab_size=512)
    saved = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    write_adapter(base, tmp_path / "larger", vocab_size=600, **saved)
    write_adapter(base, tmp_path / "norm", target_modules=["q_proj"], modules_to_save=["norm"])
    llm = build(base)
    with pytest.raises(ValueError, match=r"a vocabulary of its own, 600 tokens beside the model's 512: merge it"):
        llm.load_adapter("x", tmp_path / "larger")
    with pytest.raises(ValueError, match=r"norm.weight: is whole, which a merged adapter alone can be"):
        llm.load_adapter("x", tmp_path / "norm")
    assert llm.adapters == []


def test_a_name_is_taken_once(made):
    base, paths, _ = made
    llm = build(base, adapters=paths)
    with pytest.raises(ValueError, match="'a' is loaded already"):
        llm.load_adapter("a", paths["b"])


def test_a_closed_model_is_gone(made):
    base, paths, _ = made
    with build(base, adapters=paths) as llm:
        llm.complete([TOKENS], GREEDY, "a")
        model = weakref.ref(llm.model)
    assert model() is None
    with pytest.raises(RuntimeError, match="was closed"):
        llm.complete([TOKENS], GREEDY)
    llm.close()


@pytest.mark.parametrize("num_stages", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_ranks_compute_what_one_does_with_a_vocabulary_that_they_cannot_share_evenly(tmp_path, num_stages):
    for kind in ("dora and biases", "dora ends", "ends", "saved", "tied"):
        config, changes = KINDS[kind]
        folder = tmp_path / kind.replace(" ", "-")
        base = write_base(folder / "base", vocab_size=265, **changes)
        model = write_adapter(base, folder / "adapter", **config)
        torch.save(of_peft(model), folder / "expected.pt")
    done = forked(2, "lora_ranks.py", tmp_path, num_stages)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("as expected") == 5


class Counting:
    """A program that counts the rows that it computes, as the model would."""

    def __init__(self, model):
        self.model, self.num_rows = model, 0

    def step(self, tokens, *rest):
        self.num_rows += len(tokens)
        return self.model.step(tokens, *rest)


def test_steps_with_an_adapters_rows_are_the_models_own_and_all_others_the_programs(made):
    base, adapters, _ = made
    llm = build(base, adapters={"a": adapters["a"]})
    runner = llm.engine.runner
    runner.program = counting = Counting(llm.model)
    expected = scores(llm)
    assert counting.num_rows == len(TOKENS)
    assert not torch.equal(scores(llm, adapter="a"), expected)
    assert counting.num_rows == len(TOKENS)
