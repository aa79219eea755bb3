"""Low-bit models from end to end: quantized at load, saved, loaded, on any number of ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.meta_files import save_meta, save_tokenizer
from support.tiny import tiny_args, tiny_weights

from llama import Llama, SamplingParams
from llama.checkpoint import convert, load_weights, open_checkpoint, packed_modules, save_low_bit, untied
from llama.kernels import library
from llama.model import Transformer
from llama.parallel import ModelParallel
from llama.quantization import FORMATS, LowBitError, LowBitLinear, pack_modules

FORMATS_OF_64 = [name for name, form in FORMATS.items() if 128 % form.block == 0]
ARGS = tiny_args(dim=128, multiple_of=256, vocab_size=400)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
PROMPTS = [[1, 5, 9], [1, *range(30, 60)]]


@pytest.fixture(scope="module", params=["untied", "tied"])
def source(tmp_path_factory, request) -> Path:
    directory = tmp_path_factory.mktemp("lowbit")
    save_tokenizer(directory / "tokenizer.model")
    weights = tiny_weights(ARGS)
    if request.param == "tied":
        weights["output.weight"] = weights["tok_embeddings.weight"]
    return save_meta(directory / "model", ARGS, weights)


def build(path: Path, **options) -> Llama:
    return Llama.build(path, max_seq_len=128, device="cpu", dtype="fp32", **options)


def logits(llm: Llama) -> torch.Tensor:
    return llm.model(torch.tensor([PROMPTS[1]]), 0)


@pytest.mark.parametrize("format", FORMATS_OF_64)
def test_a_quantized_model_computes_with_its_dequantized_weights(source, format):
    llm = build(source, quantization=format)
    checkpoint = untied(open_checkpoint(source))
    exact = Transformer(checkpoint.args)
    state = {weight.name: weight.read().float() for weight in checkpoint.weights()}
    for name in packed_modules(checkpoint, format):
        packed = FORMATS[format].quantize(state[f"{name}.weight"])
        state[f"{name}.weight"] = FORMATS[format].dequantize(packed)
    exact.load_state_dict(state)
    expected = exact(torch.tensor([PROMPTS[1]]), 0)
    error = (logits(llm) - expected).norm() / expected.norm()
    assert error < 0.05  # activations are rounded to 8 bits
    if FORMATS[format].bits_per_weight < 6:
        assert error < (logits(build(source)) - expected).norm() / expected.norm()


def test_the_state_of_a_built_model_has_every_weight_in_the_published_layout(source):
    checkpoint = untied(open_checkpoint(source))
    weights = {weight.name: weight.read().float() for weight in checkpoint.weights()}
    found = build(source, quantization="sym_int4").model.state_dict()
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        is_packed = name.removesuffix(".weight") in packed_modules(checkpoint, "sym_int4")
        assert torch.equal(found[name], FORMATS["sym_int4"].quantize(weight) if is_packed else weight), name


def test_a_model_in_a_format_without_a_compiled_kernel_computes_with_unpacked_weights(source, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "formats", frozenset)
    llm = build(source, quantization="sym_int4")
    assert any(isinstance(module, LowBitLinear) for module in llm.model.modules())
    llm.save_low_bit(tmp_path / "saved")
    unpacked = build(tmp_path / "saved")
    assert not any(isinstance(module, LowBitLinear) for module in unpacked.model.modules())
    torch.testing.assert_close(logits(llm), logits(unpacked), rtol=0, atol=1e-4)


@pytest.mark.parametrize("format", ["sym_int4", "asym_int5", "q8_0"])
def test_saving_loading_and_saving_again_gives_identical_files_and_the_same_logits(source, tmp_path, format):
    llm = build(source, quantization=format)
    llm.save_low_bit(tmp_path / "first")
    loaded = Llama.load_low_bit(tmp_path / "first", max_seq_len=128, device="cpu", dtype="fp32")
    assert torch.equal(logits(loaded), logits(llm))
    assert loaded.complete(PROMPTS, GREEDY) == llm.complete(PROMPTS, GREEDY)
    assert loaded.tokenizer.encode("quick fox", True, True) == llm.tokenizer.encode("quick fox", True, True)
    save_low_bit(open_checkpoint(tmp_path / "first"), tmp_path / "second", format)
    for file in sorted((tmp_path / "first").iterdir()):
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name


def test_the_config_names_the_format_and_linears_are_stored_packed(source, tmp_path):
    save_low_bit(open_checkpoint(source), tmp_path / "saved", "sym_int4")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization"] == "sym_int4"
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert tensors["model.layers.0.mlp.up_proj.weight"].shape == (512, 128 // 64 * 34)
    assert tensors["lm_head.weight"].dtype == torch.uint8
    assert tensors["model.embed_tokens.weight"].dtype == torch.float32


def test_a_saved_model_computes_in_the_type_that_it_had(source, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    built = Llama.build(source, quantization="sym_int8", max_seq_len=128, device="cpu")
    built.save_low_bit(tmp_path / "saved")
    loaded = Llama.load_low_bit(tmp_path / "saved", max_seq_len=128, device="cpu")
    assert open_checkpoint(tmp_path / "saved").dtype is None  # most of it is blocks
    assert loaded.model.norm.weight.dtype == built.model.norm.weight.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(built))


def test_a_directory_of_bigdl_llm_loads_alike(source, tmp_path):
    save_low_bit(open_checkpoint(source), tmp_path / "ours", "sym_int4")
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "theirs" / "model.safetensors").unlink()
    flat = {name: t.flatten() if t.dtype == torch.uint8 else t for name, t in tensors.items()}
    torch.save(flat, tmp_path / "theirs" / "pytorch_model.bin")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    config["bigdl_transformers_low_bit"] = config.pop("quantization")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | {"bigdl_lcmu_enabled": False}))
    (tmp_path / "theirs" / "load_keys.json").write_text(json.dumps({"all_checkpoint_keys": sorted(flat)}))
    assert torch.equal(logits(build(tmp_path / "theirs")), logits(build(tmp_path / "ours")))
    assert open_checkpoint(tmp_path / "theirs").unknown_keys == ()


def test_low_bit_directories_convert_to_every_other_format(source, tmp_path):
    save_low_bit(open_checkpoint(source), tmp_path / "packed", "sym_int8")
    convert(tmp_path / "packed", tmp_path / "dense", to="meta")
    expected = build(tmp_path / "packed", quantization="none")
    assert torch.equal(logits(build(tmp_path / "dense")), logits(expected))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_hold_whole_blocks_of_their_part(source, tmp_path, size):
    save_low_bit(open_checkpoint(source), tmp_path / "saved", "q8_0")
    checkpoint = open_checkpoint(tmp_path / "saved")
    whole = {weight.name: weight.read() for weight in checkpoint.weights()}
    for rank in range(size):
        packed = packed_modules(checkpoint, "q8_0", size)
        with torch.device("meta"):
            model = Transformer(checkpoint.args, ModelParallel(rank, size))
        pack_modules(model, packed)
        load_weights(model, checkpoint, rank=rank, world_size=size, dtype=torch.float32)
        for name, dim in (("attention.wq", 0), ("attention.wo", 1), ("feed_forward.w2", 1)):
            linear = model.get_submodule(f"layers.1.{name}")
            assert isinstance(linear, LowBitLinear)
            part = whole[f"layers.1.{name}.weight"].chunk(size, dim)[rank]
            assert torch.equal(linear.dequantize(), part)


def test_columns_that_are_not_whole_blocks_are_refused_with_the_formats_that_would_do(source):
    checkpoint = open_checkpoint(source)
    with torch.device("meta"):
        model = Transformer(untied(checkpoint).args, ModelParallel(0, 4))  # 128 / 4 columns of wo
    with pytest.raises(LowBitError, match=r"sym_int4 packs 64 columns.*q8_0"):
        pack_modules(model, packed_modules(untied(checkpoint), "sym_int4"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int3"}, "unknown quantization 'int3'"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "asked for sym_int4 and sym_int8"),
        ({"quantization": "q4_k"}, "q4_k packs 256 columns"),
    ],
)
def test_wrong_formats_are_refused_in_one_line(source, options, message):
    with pytest.raises(ValueError, match=message):
        build(source, **options)


def test_spellings_of_a_format_mean_the_same(source):
    expected = logits(build(source, quantization="sym_int4"))
    assert torch.equal(logits(build(source, load_in_4bit=True)), expected)
    assert torch.equal(logits(build(source, load_in_low_bit="sym_int4")), expected)


def test_what_is_not_low_bit_is_neither_saved_nor_loaded_as_such(source, tmp_path):
    with pytest.raises(ValueError, match="is no low-bit checkpoint"):
        Llama.load_low_bit(source)
    with pytest.raises(ValueError, match="this model is not quantized"):
        build(source).save_low_bit(tmp_path / "saved")


def test_a_deterministic_low_bit_model_gives_the_same_bits_alone_and_together(source):
    alone = [build(source, quantization="sym_int4", deterministic=True).complete([p], GREEDY)[0] for p in PROMPTS]
    assert build(source, quantization="sym_int4", deterministic=True).complete(PROMPTS, GREEDY) == alone


@pytest.mark.parametrize(
    ("quantization", "most"),
    [(None, 0.1), ("sym_int8", 0.3)],  # a small change moves activations to other roundings
)
def test_a_cache_in_8_bits_changes_little_and_answers_alike_alone_together_and_from_a_cached_prefix(
    source, quantization, most
):
    exact = build(source, quantization=quantization).score([PROMPTS[1]])[0]
    llm = build(source, quantization=quantization, kv_dtype="int8")
    rounded = llm.score([PROMPTS[1]])[0]
    differences = [abs(a.logprob - b.logprob) for a, b in zip(exact[1:], rounded[1:], strict=True)]
    assert 0 < max(differences) < most
    together = llm.complete([*PROMPTS, PROMPTS[1]], GREEDY)
    again = [llm.complete([prompt], GREEDY)[0] for prompt in PROMPTS]
    assert llm.engine.stats().num_cached_blocks > 0
    assert [c.tokens for c in together] == [again[0].tokens, again[1].tokens, again[1].tokens]


def test_a_cache_in_8_bits_holds_more_tokens_in_the_same_memory(source):
    memory = 1 << 20
    blocks = [
        build(source, max_batch_size=1000, kv_cache_memory=memory, kv_dtype=kv_dtype).engine.stats().num_blocks
        for kv_dtype in ("auto", "int8")
    ]
    assert blocks[1] > 3 * blocks[0]


def test_an_unknown_type_of_keys_and_values_is_refused(source):
    with pytest.raises(ValueError, match="kv_dtype is 'int3': give auto or int8"):
        build(source, kv_dtype="int3")


def test_a_deterministic_model_with_an_8_bit_cache_gives_the_same_bits_alone_and_together(source):
    llm = build(source, kv_dtype="int8", deterministic=True)
    assert llm.complete(PROMPTS, GREEDY) == [llm.complete([p], GREEDY)[0] for p in PROMPTS]
