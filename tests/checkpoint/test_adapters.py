"""Adapters as their files say them, merged into a base model; PEFT made them and says what they compute."""

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapter_files import save_adapter
from support.adapters import ALL, KINDS, peft_logits, write_adapter, write_base
from support.checkpoints import half_split, state, write_sentencepiece
from support.server import serving

from llama import Llama, SamplingParams
from llama.__main__ import app, main
from llama.checkpoint import (
    CheckpointError,
    convert,
    load_weights,
    open_adapter,
    open_checkpoint,
    open_weighted,
    with_adapters,
)
from llama.model import Transformer
from llama.parallel import ModelParallel

TOKENS = [1, 50, 7, 200, 33, 90, 12, 5]


def logits(checkpoint, tokens=TOKENS) -> torch.Tensor:
    with torch.device("meta"):
        model = Transformer(replace(checkpoint.args))
    load_weights(model, checkpoint, dtype=torch.float32)
    return model(torch.tensor([tokens]), 0)[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    write_adapter(base, tmp_path / "adapter", target_modules=ALL)
    return tmp_path / "adapter"


def changed(adapter: Path, tensors=None, **config) -> Path:
    """The adapter with another config, or other tensors."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if tensors is not None:
        stored = load_file(adapter / "adapter_model.safetensors")
        stored = {name: one.contiguous() for name, one in tensors(stored).items()}
        save_file(stored, adapter / "adapter_model.safetensors")
    return adapter


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_of_any_kind_computes_what_peft_computes(tmp_path, kind):
    config, changes = KINDS[kind]
    base = write_base(tmp_path / "base", **changes)
    expected = peft_logits(write_adapter(base, tmp_path / "adapter", **config), TOKENS)
    merged = with_adapters(open_checkpoint(base), tmp_path / "adapter")
    assert (expected - logits(open_checkpoint(base))).abs().max() > 0.1
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_a_lora_bias_on_a_model_without_biases_gives_it_some(tmp_path, base):
    model = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "o_proj"], lora_bias=True)
    merged = with_adapters(open_checkpoint(base), tmp_path / "adapter")
    found = (merged.args.attention_bias, merged.args.attention_output_bias, merged.args.mlp_bias)
    assert found == (True, True, False)
    torch.testing.assert_close(logits(merged), peft_logits(model, TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dora", "dora and biases", "ends"])
def test_ranks_get_their_parts_of_the_sums(tmp_path, kind):
    config, changes = KINDS[kind]
    base = write_base(tmp_path / "base", **changes)
    write_adapter(base, tmp_path / "adapter", **config)
    merged = with_adapters(open_checkpoint(base), tmp_path / "adapter")
    whole = state(merged)
    for rank in range(2):
        with torch.device("meta"):
            model = Transformer(replace(merged.args), ModelParallel(rank, 2))
        load_weights(model, merged, rank=rank, world_size=2)
        for name, part in model.named_parameters():
            dim = next((d for d, (a, b) in enumerate(zip(part.shape, whole[name].shape, strict=True)) if a != b), None)
            expected = whole[name] if dim is None else whole[name].chunk(2, dim)[rank]
            torch.testing.assert_close(part.data, expected, rtol=1e-6, atol=1e-6)


def test_several_adapters_are_added_with_their_weights(tmp_path, base):
    for seed in (1, 2):
        write_adapter(base, tmp_path / str(seed), seed, target_modules=ALL)
    name = "layers.1.attention.wq.weight"
    plain = state(base)[name]
    first, second = (state(with_adapters(open_checkpoint(base), tmp_path / n))[name] - plain for n in "12")
    both = with_adapters(open_checkpoint(base), [f"{tmp_path}/1=0.7", f"{tmp_path}/2=-0.5"])
    torch.testing.assert_close(state(both)[name], plain + 0.7 * first - 0.5 * second)


def test_a_weight_of_0_leaves_the_base_as_it_is(base, adapter):
    merged = state(with_adapters(open_checkpoint(base), f"{adapter}=0"))
    assert all(torch.equal(merged[name], weight) for name, weight in state(base).items())


def test_a_bin_file_holds_the_same_adapter(base, adapter):
    expected = state(with_adapters(open_checkpoint(base), adapter))
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    found = state(with_adapters(open_checkpoint(base), adapter))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def write_gguf_adapter(adapter: Path, path: Path) -> Path:
    """By hand as llama.cpp's converter does: rows of q and k permuted, as those of the base model are."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    names = dict(zip(ALL, ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"], strict=True))
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        _, _, _, _, layer, _, module, part, _ = name.split(".")
        if part == "lora_B" and module in ("q_proj", "k_proj"):
            heads = 8 if module == "q_proj" else 4
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            assert not torch.equal(half_split(tensor, heads), tensor)
        writer.add_tensor(f"blk.{layer}.{names[module]}.weight.{part.lower()}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_adapter_is_the_same_in_metas_order(base, adapter, tmp_path):
    found = state(with_adapters(open_checkpoint(base), write_gguf_adapter(adapter, tmp_path / "adapter.gguf")))
    for name, weight in state(with_adapters(open_checkpoint(base), adapter)).items():
        torch.testing.assert_close(found[name], weight)


def test_llama_cpp_computes_the_same_with_a_gguf_adapter(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    base = write_base(tmp_path / "base", dim=128, multiple_of=64)
    expected = peft_logits(write_adapter(base, tmp_path / "adapter", target_modules=ALL), TOKENS)
    convert(base, tmp_path / "base.gguf", "gguf", dtype="fp32")
    path = write_gguf_adapter(tmp_path / "adapter", tmp_path / "adapter.gguf")
    options = {"n_ctx": 64, "logits_all": True, "verbose": False}
    theirs = llama_cpp.Llama(str(tmp_path / "base.gguf"), lora_path=str(path), **options)
    theirs.eval(TOKENS)
    found = torch.tensor(theirs.scores[: len(TOKENS)])
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)  # its keys and values are float16
    ours = logits(with_adapters(open_checkpoint(tmp_path / "base.gguf"), path))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


# ---- with a vocabulary of its own


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> tuple[Path, Path, torch.nn.Module]:
    """A base of 512 tokens, and an adapter of 600 with its own tokenizer."""
    folder = tmp_path_factory.mktemp("extended")
    base = write_base(folder / "base", vocab_size=512, multiple_of=32)
    write_sentencepiece(base / "tokenizer.model", 512)
    saved = ["embed_tokens", "lm_head"]
    model = write_adapter(base, folder / "adapter", vocab_size=600, target_modules=ALL, modules_to_save=saved)
    write_sentencepiece(folder / "adapter" / "tokenizer.model", 600)
    return base, folder / "adapter", model


def test_an_adapter_with_a_larger_vocabulary_brings_its_tokenizer(extended):
    base, adapter, model = extended
    llm = Llama.build(base, adapter=adapter, max_seq_len=64, dtype="fp32", device="cpu")
    assert (llm.model.vocab_size, llm.tokenizer.n_words) == (600, 600)
    tokens = [1, 555, 599, 20]
    found = llm.model(torch.tensor([tokens]), 0)[0]
    torch.testing.assert_close(found, peft_logits(model, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("to", ["hf", "gguf", "meta"])
def test_what_convert_writes_is_the_merged_model_with_its_tokenizer(extended, tmp_path, to):
    base, adapter, model = extended
    target = tmp_path / ("model.gguf" if to == "gguf" else "model")
    convert(base, target, to, adapter=adapter, dtype="fp32")
    written = open_checkpoint(target)
    assert written.args.vocab_size == written.open_tokenizer().n_words == 600
    torch.testing.assert_close(logits(written), peft_logits(model, TOKENS), rtol=1e-4, atol=1e-4)


def test_a_tied_model_stays_tied_under_a_larger_embedding(tmp_path):
    base = write_base(tmp_path / "base", tie_word_embeddings=True)
    model = write_adapter(base, tmp_path / "adapter", vocab_size=300, target_modules=["q_proj"])
    merged = with_adapters(open_checkpoint(base), tmp_path / "adapter")
    assert (merged.args.tie_word_embeddings, merged.args.vocab_size) == (True, 300)
    torch.testing.assert_close(logits(merged), peft_logits(model, TOKENS), rtol=1e-4, atol=1e-4)


# ---- what is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; LORA is"),
        ({"r": 0}, "r is 0, but a whole number from 1"),
        ({"layer_replication": [[0, 1]]}, "layer_replication = .* is not supported"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4' is not supported"),
        ({"alpha_pattern": {"(a+)+": 2}}, r"alpha_pattern: '\(a\+\)\+': it is too complicated"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', but a number is allowed"),
        ({"use_dora": True}, "use_dora is true, but there is no magnitude"),
    ],
)
def test_a_setting_that_cannot_be_honoured_is_named(adapter, config, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        open_adapter(changed(adapter, **config))
    assert "\n" not in str(caught.value)


def without_base(tensors):
    return {name.replace("layers.1.", "layers.7."): one for name, one in tensors.items()}


def of_another_shape(tensors):
    return {name: one[:, :8] if name.endswith("q_proj.lora_A.weight") else one for name, one in tensors.items()}


def of_rank_0(tensors):
    return {name: one[:0] if "lora_A" in name else one[:, :0] for name, one in tensors.items()}


def without_b(tensors):
    return {name: one for name, one in tensors.items() if "lora_B" not in name}


def of_integers(tensors):
    return {name: one.to(torch.int32) for name, one in tensors.items()}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without_base, r"layers\.7\.\S+: the base model has no such module"),
        (of_another_shape, r"layers.0.attention.wq: is for a matrix of \[64, 8\], but the base model's has \[64, 64\]"),
        (of_rank_0, "has a rank of 0"),
        (without_b, "lora_B is missing"),
        (of_integers, "holds torch.int32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(base, adapter, tensors, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        with_adapters(open_checkpoint(base), changed(adapter, tensors))
    assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self):
        return print, ("pwned",)


def test_a_pickle_is_refused(adapter, capfd):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.lm_head.weight": Evil()}, adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model.bin"):
        open_adapter(adapter)
    assert "pwned" not in capfd.readouterr().out


def test_a_weight_for_what_has_no_half_is_refused(tmp_path):
    config, changes = KINDS["dora"]
    base = write_base(tmp_path / "base", **changes)
    write_adapter(base, tmp_path / "adapter", **config)
    with pytest.raises(CheckpointError, match=r"has no part that could be weighted by 0\.5"):
        with_adapters(open_checkpoint(base), f"{tmp_path}/adapter=0.5")


def test_a_directory_without_an_adapter_is_told_so(base):
    with pytest.raises(CheckpointError, match=r"no adapter found; a directory must hold adapter_config\.json"):
        open_adapter(base)


# ---- commands


def run(*arguments: object) -> None:
    app([*map(str, arguments)], standalone_mode=False)


def test_inspect_and_verify_know_adapters(adapter, capsys):
    run("inspect", adapter)
    shown = capsys.readouterr().out
    assert "14: w1, w2, w3, wk, wo, wq, wv" in shown
    assert re.search(r"ranks +4\n", shown)
    run("verify", adapter)
    assert "every value is finite" in capsys.readouterr().out


def test_verify_names_what_is_not_finite(adapter, capsys):
    changed(adapter, lambda tensors: {name: one / 0 if "k_proj" in name else one for name, one in tensors.items()})
    with pytest.raises(SystemExit):
        run("verify", adapter)
    assert "BAD  layers.0.attention.wk: has values that are not finite" in capsys.readouterr().out


def test_an_extended_vocabulary_goes_through_the_commands(extended, tmp_path, capsys):
    base, adapter, model = extended
    run("convert", base, tmp_path / "merged.gguf", "--to", "gguf", "--lora", adapter, "--dtype", "fp32")
    run("quantize", base, tmp_path / "packed", "--type", "q8_0", "--lora", adapter)
    capsys.readouterr()
    options = ["--temperature", 0, "--max-tokens", 4, "--device", "cpu", "--dtype", "fp32", "--max-seq-len", 64]
    run("complete", base, "--prompt", "hello", "--lora", adapter, *options)
    expected = capsys.readouterr().out
    run("complete", tmp_path / "merged.gguf", "--prompt", "hello", *options)
    assert capsys.readouterr().out == expected
    packed = open_checkpoint(tmp_path / "packed")
    assert packed.args.vocab_size == packed.open_tokenizer().n_words == 600
    assert (logits(packed) - peft_logits(model, TOKENS)).abs().max() < 0.5


def test_weights_one_behind_the_other_are_multiplied(tmp_path):
    path = save_adapter(tmp_path / "a=1", 1)
    twice, once = open_weighted(f"{path}=0.5=0.5"), open_weighted(f"{path}=0.25")
    assert twice.digest == once.digest != open_weighted(path).digest
    assert {name: one.scale for name, one in twice.low_rank.items()} == dict.fromkeys(once.low_rank, 0.5)


OPTIONS = ["--temperature", 0, "--max-tokens", 4, "--device", "cpu", "--dtype", "fp32", "--max-seq-len", 64]


@pytest.fixture(scope="module")
def with_a_vocabulary(extended) -> Llama:
    base, adapter, _ = extended
    return Llama.build(base, adapter=adapter, max_seq_len=64, dtype="fp32", device="cpu")


def test_an_extended_vocabulary_answers_in_the_chat(extended, with_a_vocabulary, monkeypatch, capsys):
    base, adapter, _ = extended
    dialog = [{"role": "user", "content": "hello lo"}]
    biased = SamplingParams(temperature=0.0, max_tokens=4, logit_bias={555: 100.0})
    assert with_a_vocabulary.chat([dialog], biased)[0].tokens == [555] * 4
    [answer] = with_a_vocabulary.chat([dialog], SamplingParams(temperature=0.0, max_tokens=4))
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", StringIO())
    run("chat", base, "hello lo", "--lora", adapter, *OPTIONS)
    assert answer.text.strip() in capsys.readouterr().out


def test_an_extended_vocabulary_is_served(with_a_vocabulary):
    with serving(lambda: with_a_vocabulary, name="extended") as server:
        _, models = server.get("/v1/models")
        assert models["data"][0]["meta"]["n_vocab"] == 600
        body = {"prompt": [1, 555, 599, 20], "temperature": 0, "max_tokens": 4, "return_token_ids": True}
        _, answer = server.post("/v1/completions", {**body, "model": "extended"})
        [expected] = with_a_vocabulary.complete([[1, 555, 599, 20]], SamplingParams(temperature=0.0, max_tokens=4))
        assert answer["choices"][0]["token_ids"] == expected.tokens
        status, refusal = server.post("/v1/completions", {**body, "prompt": [600], "model": "extended"})
        assert (status, "the vocabulary has 0 ... 599" in refusal["error"]["message"]) == (400, True)


@pytest.mark.parametrize("command", ["complete", "convert", "quantize"])
@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without_base, "the base model has no such module"),
        (of_another_shape, "is for a matrix of [64, 8]"),
        (of_rank_0, "has a rank of 0"),
        (None, "adapter_model.bin"),
    ],
)
def test_a_command_says_in_one_line_what_is_wrong_with_an_adapter(
    base, adapter, tmp_path, monkeypatch, capsys, command, tensors, message
):
    if tensors is None:
        (adapter / "adapter_model.safetensors").unlink()
        torch.save({"base_model.model.lm_head.weight": Evil()}, adapter / "adapter_model.bin")
    else:
        changed(adapter, tensors)
    target = {"complete": ["--prompt", "x", *OPTIONS], "convert": [tmp_path / "out", "--to", "hf"]}
    arguments = [command, base, *target.get(command, [tmp_path / "out", "--type", "q8_0"]), "--lora", adapter]
    monkeypatch.setattr("sys.argv", ["llama", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    shown = capsys.readouterr()
    assert exit.value.code == 1
    assert message in shown.err
    assert (shown.err.count("\n"), shown.out) == (1, "")
