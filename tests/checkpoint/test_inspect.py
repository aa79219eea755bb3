import hashlib
import json
from dataclasses import replace

import gguf
import pytest
import torch
from support.checkpoints import sample, write_gguf, write_hf, write_meta, write_sentencepiece

from llama.checkpoint import CheckpointError, default_model, estimate, inspect, verify
from llama.device import free_memory
from llama.kernels import library
from llama.model import ModelArgs, Transformer
from llama.parallel import ModelParallel
from llama.quantization import FORMATS
from llama.report import show_inspection

LLAMA2_7B = ModelArgs(vocab_size=32000, max_seq_len=4096)
LLAMA3_8B = ModelArgs(
    n_kv_heads=8,
    vocab_size=128256,
    multiple_of=1024,
    ffn_dim_multiplier=1.3,
    rope_theta=5e5,
    max_seq_len=8192,
)


def test_an_inspection_tells_what_the_headers_say(tmp_path):
    args, weights = sample(torch.bfloat16)
    path = write_meta(tmp_path, args, weights, 2, colour="red")
    write_sentencepiece(path / "tokenizer.model")
    found = inspect(path)
    numbers = sum(weight.numel() for weight in weights.values())
    assert (found.format, found.parameters, found.nbytes, found.context) == (
        "meta",
        numbers,
        2 * numbers,
        4096,
    )
    assert found.types == {"bfloat16": type(found.types["bfloat16"])(21, numbers, 2 * numbers)}
    assert found.tokenizer == "sentencepiece, 264 tokens"
    assert found.chat_format == "llama2"
    assert found.unknown_keys == ("colour",)


def test_low_bit_types_are_counted_by_their_names(tmp_path):
    args, weights = sample(multiple_of=64)
    found = inspect(write_gguf(tmp_path / "m.gguf", args, weights, gguf.GGMLQuantizationType.Q4_0))
    assert (found.types["Q4_0"].tensors, found.types["float32"].tensors) == (16, 5)
    assert found.types["Q4_0"].nbytes == found.types["Q4_0"].parameters // 32 * 18
    assert found.tokenizer is None
    assert found.chat_format is None


@pytest.mark.skipif(not library.AVAILABLE, reason="the kernels were not compiled")
@pytest.mark.parametrize(("kind", "remark"), [("Q4_0", "kept packed"), ("TQ2_0", "dequantized"), ("BF16", None)])
def test_an_inspection_says_which_blocks_stay_packed(tmp_path, capsys, kind, remark):
    args, weights = sample(dim=256, n_heads=4, n_kv_heads=4, hidden_dim=256)
    path = write_gguf(tmp_path / "m.gguf", args, weights, gguf.GGMLQuantizationType[kind])
    show_inspection(inspect(path))
    stored = {"BF16": "bfloat16"}.get(kind, kind)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"stored {stored}"))
    assert line.endswith(f", {remark}" if remark else "iB")


def test_more_ranks_may_keep_fewer_blocks(tmp_path):
    args, weights = sample(dim=64, hidden_dim=96)
    path = write_gguf(tmp_path / "m.gguf", args, weights, gguf.GGMLQuantizationType.Q4_0)
    kept = {ranks: inspect(path, ranks).types["Q4_0"].packed for ranks in (1, 2, 4)}
    assert kept == ({1: 16, 2: 14, 4: 12} if library.AVAILABLE else {1: 0, 2: 0, 4: 0})


def test_the_default_model_is_inspected():
    found = inspect(default_model())
    assert found.parameters == 134_515_008
    assert found.chat_format == "the model's own template"
    assert found.tokenizer == "gguf, 49152 tokens"


def rows(args, **options):
    return {one.precision: one for one in estimate(args, **options)}


def test_estimates_equal_the_published_figures():
    seven = rows(LLAMA2_7B)["bf16"]
    assert seven.weight_bytes == 2 * 6_738_415_616
    assert seven.kv_bytes == 4096 * 524_288
    eight = rows(LLAMA3_8B, max_seq_len=100, max_batch_size=3)["bf16"]
    assert eight.weight_bytes == 2 * 8_030_261_248
    assert eight.kv_bytes == 300 * 131_072
    assert rows(LLAMA3_8B)["fp32"].weight_bytes == 4 * 8_030_261_248
    assert rows(LLAMA3_8B)["fp32"].kv_bytes == 2 * rows(LLAMA3_8B)["bf16"].kv_bytes


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_estimate_equals_what_a_rank_really_holds(world_size):
    args, _ = sample(attention_bias=True)
    with torch.device("meta"):
        model = Transformer(args, ModelParallel(size=world_size))
    held = sum(parameter.nbytes for parameter in model.parameters())
    found = rows(args, world_size=world_size, max_seq_len=10, max_batch_size=2)
    assert found["fp32"].weight_bytes == held
    assert found["bf16"].weight_bytes == held // 2
    assert found["bf16"].kv_bytes == 20 * model.cache_shape.bytes_per_token(torch.bfloat16)
    int8 = rows(args, world_size=world_size, max_seq_len=10, max_batch_size=2, kv_dtype="int8")
    assert int8["bf16"].kv_bytes == 20 * model.cache_shape.bytes_per_token(torch.int8)


def test_low_bit_formats_pack_the_linears_alone():
    found = rows(LLAMA2_7B)
    linears = 6_738_415_616 - 32000 * 4096 - 65 * 4096
    for name, form in FORMATS.items():
        rest = 2 * (32000 * 4096 + 65 * 4096)
        assert found[name].weight_bytes == linears * form.bits_per_weight / 8 + rest
    assert list(found) == ["fp32", "bf16", *FORMATS]


def test_a_low_bit_format_packs_an_output_layer_that_is_the_embedding_beside_it():
    args, _ = sample(dim=256, n_heads=4, n_kv_heads=4, tie_word_embeddings=True, hidden_dim=256)
    tied, apart = rows(args), rows(replace(args, tie_word_embeddings=False))
    assert tied["q4_0"].weight_bytes == apart["q4_0"].weight_bytes
    assert tied["bf16"].weight_bytes == apart["bf16"].weight_bytes - 2 * 264 * 256


def test_what_fits_is_measured_against_the_memory_that_is_free():
    small, _ = sample()
    assert all(one.fits for one in estimate(small))
    huge = ModelArgs(dim=16384, n_layers=1000, n_heads=128, vocab_size=128256, max_seq_len=10**6)
    assert not any(one.fits for one in estimate(huge))
    one = next(estimate(small))
    assert one.total_bytes == one.weight_bytes + one.kv_bytes
    assert abs(one.free_bytes - free_memory(torch.device("cpu"))) < 2 << 30


def test_an_estimate_for_an_uneven_number_of_ranks_is_refused():
    with pytest.raises(ValueError, match="3 ranks cannot share"):
        list(estimate(sample()[0], world_size=3))


# --- verify -----------------------------------------------------------------------------------------------------


def problems(path):
    findings = list(verify(path))
    assert findings
    return [f"{one.subject}: {one.message}" for one in findings if not one.ok]


def checklist(path, name="checklist.chk", **changed):
    lines = [
        f"{changed.get(file.stem.split('.')[0], hashlib.md5(file.read_bytes()).hexdigest())}  {file.name}"
        for file in sorted(path.iterdir())
        if file.suffix in (".pth", ".json", ".model")
    ]
    (path / name).write_text("\n".join(lines) + "\n")


def test_a_sound_checkpoint_has_no_problem_in_any_format(tmp_path):
    args, weights = sample()
    meta = write_meta(tmp_path / "meta", args, weights, 2)
    checklist(meta)
    assert problems(meta) == []
    assert sum("md5" in one.message for one in verify(meta)) == 3
    assert problems(write_hf(tmp_path / "hf", args, weights, 3)) == []
    assert problems(write_gguf(tmp_path / "m.gguf", args, weights)) == []


def test_a_wrong_sum_and_a_missing_file_are_found(tmp_path):
    args, weights = sample()
    path = write_meta(tmp_path / "model", args, weights)
    write_sentencepiece(tmp_path / "tokenizer.model")
    checklist(path, consolidated="0" * 32)
    checklist(tmp_path, "tokenizer_checklist.chk")
    (path / "params.json").write_text((path / "params.json").read_text() + " ")
    found = problems(path)
    assert found[0].startswith("consolidated.00.pth: md5 ")
    assert found[0].endswith(f"expected {'0' * 32}")
    assert found[1].startswith("params.json: md5 ")
    (tmp_path / "tokenizer.model").unlink()
    assert "tokenizer.model: is listed in tokenizer_checklist.chk, but missing" in problems(path)


def test_a_web_page_saved_as_a_checklist_is_called_so(tmp_path):
    args, weights = sample()
    path = write_meta(tmp_path, args, weights)
    (path / "checklist.chk").write_text("<html>Sign in</html>")
    assert problems(path) == ["checklist.chk: no list of md5 sums; was a web page saved in its place?"]


def test_a_checklist_cannot_name_files_elsewhere(tmp_path):
    args, weights = sample()
    path = write_meta(tmp_path, args, weights)
    (path / "checklist.chk").write_text(f"{'0' * 32}  ../../etc/passwd\n")
    assert problems(path) == ["checklist.chk: no list of md5 sums; was a web page saved in its place?"]


def test_values_that_are_not_finite_are_counted(tmp_path):
    args, weights = sample()
    weights["layers.0.attention.wq.weight"][3, 4] = float("nan")
    weights["layers.0.attention.wq.weight"][5] = float("inf")
    weights["norm.weight"][0] = -float("inf")
    for path in (write_meta(tmp_path / "meta", args, weights, 2), write_hf(tmp_path / "hf", args, weights)):
        assert sorted(problems(path)) == [
            "layers.0.attention.wq.weight: 65 of 4096 values are not finite",
            "norm.weight: 1 of 64 values are not finite",
        ]


def test_names_and_shapes_are_compared_with_the_config(tmp_path):
    args, weights = sample()
    del weights["layers.0.attention.wq.weight"]
    weights["norm.weight"] = torch.ones(3)
    weights["stranger.weight"] = torch.ones(3)
    assert problems(write_meta(tmp_path, args, weights)) == [
        "layers.0.attention.wq.weight: is missing",
        "norm.weight: has shape [3], expected [64]",
        "stranger.weight: is unexpected",
    ]


def test_a_file_that_the_index_leaves_out_is_found(tmp_path):
    args, weights = sample()
    path = write_hf(tmp_path, args, weights, 3)
    (path / "model-00009-of-00009.safetensors").write_bytes(b"")
    assert problems(path) == [
        "model.safetensors.index.json: lists every tensor of 3 files, but not model-00009-of-00009.safetensors"
    ]


def test_a_checkpoint_that_cannot_be_opened_is_a_finding(tmp_path):
    args, weights = sample()
    path = write_hf(tmp_path, args, weights)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (found,) = problems(path)
    assert "hidden_size is missing" in found
    with pytest.raises(FileNotFoundError):
        list(verify(tmp_path / "absent"))
    with pytest.raises(CheckpointError):
        inspect(path)
