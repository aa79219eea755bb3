import base64
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import (
    LINUX,
    anonymous_memory,
    assert_equal,
    byte_vocabulary,
    sample,
    state,
    write_gguf,
    write_hf,
    write_meta,
    write_sentencepiece,
)
from support.vocabularies import train_sentencepiece

from llama.checkpoint import CheckpointError, convert, default_model, legacy_source, open_checkpoint, verify
from llama.checkpoint.conversion import parse_size
from llama.checkpoint.formats.meta import hidden_rounding
from llama.checkpoint.tokenizer_files import TokenizerFiles, find_tokenizer
from llama.files.gguf import write_gguf as write_container
from llama.files.staging import staged
from llama.files.writing import Entry
from llama.model import ModelArgs
from llama.rotary import LinearScaling, Llama3Scaling
from llama.tokenizer import Tokenizer

TEXTS = ("hello lo", "", "  two  spaces", "snow ☃ and 雪", "</s><s>[INST]", "\n\ttabs", "e" * 50)


@pytest.fixture
def source(tmp_path):
    args, weights = sample()
    path = write_meta(tmp_path / "source", args, weights, 2)
    write_sentencepiece(path / "tokenizer.model")
    return path


def shape_of(path) -> ModelArgs:
    return replace(open_checkpoint(path).args, multiple_of=256, ffn_dim_multiplier=None)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"n_kv_heads": 8, "max_seq_len": 512},
        {"rope_theta": 500000.0, "rope_scaling": Llama3Scaling(8.0), "max_seq_len": 131072},
        {"rope_theta": 500000.0, "rope_scaling": Llama3Scaling(32.0, 1.0, 2.0, 64), "head_dim": 64},
        {"rope_scaling": LinearScaling(4.0), "max_seq_len": 1024},
        {"head_dim": 24, "hidden_dim": 36},
        {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
        {"sliding_window": 12},
    ],
    ids=str,
)
def test_a_round_trip_through_every_format_changes_no_bit(tmp_path, changes):
    args, weights = sample(torch.bfloat16, **changes)
    plain = {"hidden_size": args.dim, "head_dim": args.head_dim}
    scaling = args.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        plain |= {"rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 256}
    elif scaling is not None:
        rope = {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor}
        rope |= {"high_freq_factor": scaling.high_freq_factor}
        plain["rope_scaling"] = rope | {"original_max_position_embeddings": scaling.original_max_seq_len}
    if args.sliding_window:
        plain |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 12}
    if args.mlp_bias:
        plain |= {"attention_bias": True, "mlp_bias": True}
    start = write_hf(tmp_path / "start", args, weights, **plain)
    steps = [("meta", "a", {"shards": 2}), ("hf", "b", {"shards": 3}), ("gguf", "c.gguf", {}), ("meta", "d", {}),
             ("meta", "e", {"shards": 4}), ("gguf", "f.gguf", {}), ("hf", "g", {"max_shard_size": "40KB"})]  # fmt: skip
    here = start
    for to, name, options in steps:
        convert(here, tmp_path / name, to, dtype="bf16", **options)
        here = tmp_path / name
        opened = open_checkpoint(here)
        assert opened.unknown_keys == ()
        assert_equal({key: tensor.bfloat16() for key, tensor in state(opened).items()}, weights)
        assert shape_of(here) == shape_of(start), (to, name)


def test_the_type_is_kept_unless_another_is_asked_for(tmp_path, source):
    for asked, expected in ((None, torch.float32), ("bf16", torch.bfloat16), (torch.float16, torch.float16)):
        convert(source, tmp_path / "copy", "hf", dtype=asked)
        for name, tensor in state(tmp_path / "copy").items():
            assert tensor.dtype == expected
            assert torch.equal(tensor, sample()[1][name].to(expected))


def test_low_bit_weights_are_written_as_the_numbers_they_stand_for(tmp_path):
    import gguf

    args, weights = sample(multiple_of=64)
    path = write_gguf(tmp_path / "q.gguf", args, weights, gguf.GGMLQuantizationType.Q5_0)
    convert(path, tmp_path / "meta", "meta", shards=4)
    assert_equal(state(tmp_path / "meta"), state(path))


def test_files_that_the_libraries_own_are_read_by_them(tmp_path, source):
    import gguf
    from safetensors.torch import load_file

    expected = state(source)
    convert(source, tmp_path / "hf", "hf", max_shard_size="60KB")
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 70_000
    convert(source, tmp_path / "model.gguf", "gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert torch.equal(stored["blk.1.attn_q.weight"], expected["layers.1.attention.wq.weight"])
    assert reader.fields["llama.attention.head_count_kv"].contents() == 4
    convert(source, tmp_path / "meta", "meta", shards=2)
    for rank in range(2):
        shard = torch.load(tmp_path / f"meta/consolidated.{rank:02d}.pth", weights_only=True, mmap=True)
        for name in ("layers.0.attention.wo.weight", "tok_embeddings.weight"):
            assert torch.equal(shard[name], expected[name].chunk(2, 1)[rank])
        assert all(tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 for tensor in shard.values())


def test_every_writer_gives_the_number_of_files_that_was_asked_for(tmp_path, source):
    for shards in (1, 2, 4):
        convert(source, tmp_path / "meta", "meta", shards=shards)
        assert len(list((tmp_path / "meta").glob("*.pth"))) == shards
    for shards in (1, 3, 21):
        convert(source, tmp_path / "hf", "hf", shards=shards)
        assert len(list((tmp_path / "hf").glob("*.safetensors"))) == shards
    with pytest.raises(CheckpointError, match="99 files were asked for, but the model has 21 tensors"):
        convert(source, tmp_path / "hf", "hf", shards=99)
    with pytest.raises(ValueError, match="3 ranks cannot share"):
        convert(source, tmp_path / "meta", "meta", shards=3)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 21


def test_shards_of_a_vocabulary_that_does_not_divide_are_read_again_and_the_reference_is_said_to_lack_them(tmp_path):
    path = write_hf(tmp_path / "source", *sample(vocab_size=265))
    write_sentencepiece(path / "tokenizer.model", 265)
    warnings = convert(path, tmp_path / "meta", "meta", shards=2)
    assert any("it lacks a vocabulary of 265 over 2 shards" in line for line in warnings)
    assert_equal(state(tmp_path / "meta"), state(path))


def test_progress_ends_at_the_bytes_in_all(tmp_path, source):
    calls = []
    convert(source, tmp_path / "copy", "hf", progress=lambda *call: calls.append(call))
    total = sum(tensor.nbytes for tensor in sample()[1].values())
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


# --- what the reference can run --------------------------------------------------------------------------------


def test_metas_settings_hold_only_keys_of_the_reference_where_it_can_run_the_model(tmp_path, source):
    assert convert(source, tmp_path / "copy", "meta") == []
    reference = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps"}
    reference |= {"multiple_of", "ffn_dim_multiplier"}
    assert json.loads((tmp_path / "copy/params.json").read_text()).keys() <= reference
    assert "output.weight" in torch.load(tmp_path / "copy/consolidated.00.pth", weights_only=True)


@pytest.mark.parametrize(
    ("changes", "lacks"),
    [
        ({"rope_theta": 5e5}, "a rope_theta of 500000"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling"),
        ({"head_dim": 16}, "a head_dim of 16"),
        ({"model_type": "mistral", "sliding_window": 7}, "a sliding window"),
    ],
)
def test_a_warning_says_what_the_reference_lacks(tmp_path, changes, lacks):
    args, weights = sample(head_dim=changes.get("head_dim"))
    path = write_hf(tmp_path / "hf", args, weights, **changes)
    write_sentencepiece(path / "tokenizer.model")
    warnings = convert(path, tmp_path / "copy", "meta")
    assert f"Meta's Llama 2 code cannot run this model: it lacks {lacks}" in warnings


def test_without_a_tokenizer_every_format_warns(tmp_path):
    args, weights = sample()
    path = write_meta(tmp_path / "a" / "source", args, weights)
    for to in ("meta", "hf", "gguf"):
        assert any("no tokenizer was found" in line for line in convert(path, tmp_path / to, to))


@pytest.mark.parametrize(
    ("dim", "hidden_dim", "expected"),
    [
        (4096, 11008, (256, None)),
        (5120, 13824, (256, None)),
        (8192, 28672, (4096, 1.3)),
        (576, 1536, (256, None)),
    ],
)
def test_the_hidden_sizes_of_published_models_get_their_own_settings(dim, hidden_dim, expected):
    assert hidden_rounding(ModelArgs(dim=dim, n_heads=1, hidden_dim=hidden_dim)) == expected


def test_every_hidden_size_can_be_said_in_the_references_settings():
    for dim in (1, 7, 64, 576, 4096):
        for hidden_dim in (*range(1, 40), 777, 4095, 4097, 11007, 99991):
            multiple_of, multiplier = hidden_rounding(ModelArgs(dim=dim, n_heads=1, hidden_dim=hidden_dim))
            again = ModelArgs(dim=dim, n_heads=1, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
            assert again.hidden_dim == hidden_dim


# --- tokenizers -------------------------------------------------------------------------------------------------


def ids(path, texts=TEXTS):
    tokenizer = Tokenizer(str(open_checkpoint(path).tokenizer_path))
    return [tokenizer.encode(text, bos=False, eos=False) for text in texts]


def test_a_sentencepiece_vocabulary_tokenizes_alike_in_every_format(tmp_path, source):
    expected = ids(source)
    assert any(len(row) > 3 for row in expected)
    here = source
    for number, to in enumerate(("hf", "gguf", "hf", "meta", "gguf", "meta")):
        name = f"{number}.{to}"
        convert(here, tmp_path / name, to)
        here = tmp_path / name
        assert ids(here) == expected, name
    assert (tmp_path / "3.meta/tokenizer.model").is_file()


def test_a_tokenizer_json_of_pieces_is_read_by_its_own_library_with_the_same_ids(tmp_path, source):
    import tokenizers

    convert(source, tmp_path / "hf", "hf")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    plain = [text for text in TEXTS if "<" not in text]
    assert [theirs.encode(text, add_special_tokens=False).ids for text in plain] == ids(source, plain)
    assert theirs.encode("hello").ids[0] == 1


def test_the_default_models_vocabulary_tokenizes_alike_in_every_format(tmp_path):
    transformers = pytest.importorskip("transformers")
    files = TokenizerFiles(default_model()).for_huggingface()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer(str(default_model()))
    for text in TEXTS:
        if "<" not in text:
            assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, bos=False, eos=False)
    dialog = [{"role": "user", "content": "hi"}]
    shown = theirs.apply_chat_template(dialog, tokenize=False, add_generation_prompt=True)
    assert shown.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert theirs.convert_tokens_to_ids("<|im_end|>") == theirs.eos_token_id == 2
    again = Tokenizer(str(tmp_path / "tokenizer.json"))
    assert [again.encode(text, bos=False, eos=False) for text in TEXTS] == [
        ours.encode(text, bos=False, eos=False) for text in TEXTS
    ]


def through_gguf(original: Path, folder: Path, vocab_size: int) -> bytes:
    """The tokenizer.model that is written for Meta from a GGUF file with the vocabulary of `original`."""
    metadata = TokenizerFiles(original).for_gguf(vocab_size, ())
    write_container(folder / "m.gguf", [], metadata, lambda nbytes: None)
    back = TokenizerFiles(folder / "m.gguf")
    assert not back.is_sentencepiece
    return back.for_meta()["tokenizer.model"]


def test_a_tiktoken_file_survives_the_way_through_gguf_byte_for_byte(tmp_path):
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"lo", b"el", b" h", b"hel", b"hello", b"\xe2\x98", b"\xe2\x98\x83"]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    back = through_gguf(tmp_path / "tokenizer.model", tmp_path, len(tokens) + 256)
    assert back == (tmp_path / "tokenizer.model").read_bytes()


@pytest.mark.slow
def test_llama_3s_tiktoken_file_survives_the_way_through_gguf_byte_for_byte(tmp_path):
    models = pytest.importorskip("llama_models")
    original = Path(models.__file__).parent / "llama3" / "tokenizer.model"
    assert through_gguf(original, tmp_path, 128256) == original.read_bytes()


def test_a_vocabulary_is_brought_to_the_number_of_embeddings(tmp_path, source):
    write_sentencepiece(source / "tokenizer.model", 262)
    convert(source, tmp_path / "m.gguf", "gguf")
    assert Tokenizer(str(tmp_path / "m.gguf")).n_words == 264
    assert ids(tmp_path / "m.gguf") == ids(source)
    write_sentencepiece(source / "tokenizer.model", 270)
    warnings = convert(source, tmp_path / "m.gguf", "gguf")
    assert warnings == ["the last 6 tokens have no embedding and are left out"]
    assert Tokenizer(str(tmp_path / "m.gguf")).n_words == 264


def test_llama_cpp_reads_and_tokenizes_what_is_written(tmp_path, source):
    llama_cpp = pytest.importorskip("llama_cpp")
    convert(source, tmp_path / "m.gguf", "gguf")
    model = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, verbose=False)
    found = [model.tokenize(text.encode(), add_bos=False, special=False) for text in TEXTS]
    assert found == ids(source)


def test_stop_ids_and_sampling_defaults_are_kept(tmp_path, source):
    values = {
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 30,
        "repetition_penalty": 1.5,
        "eos_token_id": [2, 260],
    }
    (source / "generation_config.json").write_text(json.dumps(values))
    here = source
    for to, name in (("hf", "hf"), ("gguf", "m.gguf"), ("meta", "meta"), ("hf", "hf2")):
        convert(here, tmp_path / name, to)
        here = tmp_path / name
        checkpoint = open_checkpoint(here)
        assert checkpoint.stop_ids == (2, 260)
        assert checkpoint.generation_defaults == {key: values[key] for key in list(values)[:4]}
    (source / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    convert(source, tmp_path / "greedy", "hf")
    assert json.loads((tmp_path / "greedy/generation_config.json").read_text())["do_sample"] is False
    assert open_checkpoint(tmp_path / "greedy").generation_defaults == {"temperature": 0.0}


# --- what goes wrong --------------------------------------------------------------------------------------------


def nothing_is_left(tmp_path):
    return not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "onnx"}, "cannot convert to 'onnx'; meta, hf, gguf are possible"),
        ({"to": "hf", "dtype": "int3"}, "cannot write dtype 'int3'; bf16, fp16, fp32 are possible"),
        ({"to": "gguf", "shards": 2}, "a GGUF file is written whole"),
        ({"to": "meta", "max_shard_size": "1GB"}, "a maximal shard size is for hf"),
        ({"to": "hf", "max_shard_size": "huge"}, "'huge' is no size"),
        ({"to": "hf", "shards": 0}, "0 shards; at least 1 is possible"),
        ({"to": "gguf", "dtype": torch.float64}, "GGUF is written in fp32, fp16 or bf16, not float64"),
    ],
)
def test_a_wrong_call_is_refused_in_one_line_and_writes_nothing(tmp_path, source, options, message):
    with pytest.raises(ValueError, match=message) as error:
        convert(source, tmp_path / "copy", **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "copy").exists()
    assert nothing_is_left(tmp_path)


def test_sizes_are_read_as_people_write_them():
    sizes = {"5GB": 5 * 10**9, "500 mb": 5 * 10**8, "2GiB": 2**31, "1.5KB": 1500, "123": 123, 7: 7, "8B": 8}
    assert {text: parse_size(text) for text in sizes} == sizes
    for wrong in ("", "GB", "-1", "0", "1e9", "5 TB", "nan"):
        with pytest.raises(ValueError, match="is no size"):
            parse_size(wrong)


def test_the_source_is_never_the_destination(tmp_path, source):
    before = state(source)
    for destination in (source, source / "inside", source.parent, source / ".." / "source"):
        with pytest.raises(CheckpointError, match="is the source itself, inside it or around it"):
            convert(source, destination, "hf")
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(CheckpointError, match="is the source itself"):
        convert(source, tmp_path / "link", "meta")
    assert_equal(state(source), before)


def test_a_directory_with_other_things_in_it_is_not_replaced(tmp_path, source):
    home = tmp_path / "home"
    (home / "photos").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds photos, which is no checkpoint's"):
        convert(source, home, "hf")
    assert (home / "photos").is_dir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is no directory"):
        convert(source, tmp_path / "file", "hf")
    convert(source, tmp_path / "copy", "hf")
    with pytest.raises(CheckpointError, match="is a directory"):
        convert(source, tmp_path / "copy", "gguf")


def test_an_older_destination_is_replaced_whole(tmp_path, source):
    convert(source, tmp_path / "copy", "meta", shards=4)
    convert(source, tmp_path / "copy", "meta", shards=2)
    names = sorted(path.name for path in (tmp_path / "copy").iterdir())
    assert names == ["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"]
    assert nothing_is_left(tmp_path)


def test_values_beyond_float16_are_refused_and_the_tensor_is_named(tmp_path):
    args, weights = sample()
    weights["norm.weight"][3] = 1e6
    source = write_meta(tmp_path / "source", args, weights)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: holds values beyond float16's 65504"):
        convert(source, tmp_path / "copy", "hf", dtype="fp16")
    assert not (tmp_path / "copy").exists()
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize("to", ["meta", "hf", "gguf"])
def test_whatever_fails_while_writing_leaves_the_older_destination(tmp_path, source, to, monkeypatch):
    destination = tmp_path / "copy"
    convert(source, destination, to)
    before = state(destination)
    full, broken = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "I/O error")
    for failure in (full, broken, KeyboardInterrupt()):
        written = []

        def fail(output, file, failure=failure, written=written):
            written.append(output.name)
            file.write(b"half")
            if len(written) == 5:
                raise failure

        monkeypatch.setattr(Entry, "write", fail)
        with pytest.raises((CheckpointError, KeyboardInterrupt)) as error:
            convert(source, destination, to)
        monkeypatch.undo()
        assert "\n" not in str(error.value)
        if getattr(failure, "errno", None) == errno.ENOSPC:
            assert "the disk is full; nothing was written" in str(error.value)
        assert_equal(state(destination), before)
        assert nothing_is_left(tmp_path)


def test_too_little_space_is_found_before_anything_is_written(tmp_path, source, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs 0\.02 GB, but only 0\.00 GB are free"):
        convert(source, tmp_path / "copy", "hf")
    assert not (tmp_path / "copy").exists()


def test_an_unwritable_place_is_one_line(tmp_path, source):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert(source, tmp_path / "file" / "copy", "hf")


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        convert(tmp_path / "absent", tmp_path / "copy", "hf")


def run(code: str, *arguments, limit: int | None = None) -> subprocess.Popen:
    """Our code in a process of its own, its files limited to `limit` bytes."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limited if limit else None,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.skipif(not LINUX, reason="limits of POSIX processes")
def test_a_file_that_may_not_grow_further_ends_with_one_line(tmp_path, source):
    code = """
        import sys
        from llama.checkpoint import CheckpointError, convert
        for to in ("meta", "hf", "gguf"):
            try:
                convert(sys.argv[1], sys.argv[2], to)
            except CheckpointError as error:
                print(error)
    """
    process = run(code, source, tmp_path / "copy", limit=50_000)
    printed, errors = process.communicate(timeout=60)
    assert printed.count("cannot be written: File too large") == 3, errors
    assert not (tmp_path / "copy").exists()
    assert nothing_is_left(tmp_path)


@pytest.mark.skipif(not LINUX, reason="signals of POSIX processes")
@pytest.mark.parametrize(
    "moment", [pytest.param(2, marks=pytest.mark.slow), 12, pytest.param(24, marks=pytest.mark.slow)]
)
def test_a_killed_conversion_leaves_the_old_destination_and_is_cleaned_up_by_the_next(tmp_path, source, moment):
    convert(source, tmp_path / "copy", "meta", shards=4)
    before = state(tmp_path / "copy")
    code = """
        import os, signal, sys
        from llama.checkpoint import convert
        from llama.files.writing import Entry
        left = [int(sys.argv[3])]
        write = Entry.write
        def write_and_die(output, file):
            write(output, file)
            left[0] -= 1
            if not left[0]:
                file.flush() if hasattr(file, "flush") else None
                os.kill(os.getpid(), signal.SIGKILL)
        Entry.write = write_and_die
        convert(sys.argv[1], sys.argv[2], "meta", shards=2)
    """
    process = run(code, source, tmp_path / "copy", moment)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert_equal(state(tmp_path / "copy"), before)
    assert not nothing_is_left(tmp_path)
    warnings = convert(source, tmp_path / "copy", "meta")
    assert [line for line in warnings if "left by an interrupted run" in line]
    assert len(list((tmp_path / "copy").glob("*.pth"))) == 1
    assert nothing_is_left(tmp_path)


def test_a_name_with_wildcards_cleans_up_its_own_leftovers_alone(tmp_path, source):
    for name in ("c[o]py", "copy"):
        (tmp_path / f".{name}.partial-abc").mkdir()
    assert convert(source, tmp_path / "c[o]py", "hf") == ["removed .c[o]py.partial-abc, left by an interrupted run"]
    assert (tmp_path / ".copy.partial-abc").is_dir()


def test_a_conversion_killed_between_its_two_renames_gets_the_old_destination_back(tmp_path, source):
    convert(source, tmp_path / "copy", "hf")
    folder = tmp_path / ".copy.partial-abc"
    folder.mkdir()
    (tmp_path / "copy").rename(folder / "replaced")
    with pytest.raises(ValueError, match="cannot write dtype"):
        convert(source, tmp_path / "copy", "hf", dtype="x")
    assert_equal(state(tmp_path / "copy"), state(source))
    assert nothing_is_left(tmp_path)


@pytest.mark.skipif(not LINUX, reason="locks of POSIX files")
def test_a_conversion_that_is_still_running_is_not_taken_for_a_leftover(tmp_path, source):
    with staged(tmp_path / "copy", 0, is_directory=True) as staging:
        (staging / "config.json").write_text("{}")
        assert convert(source, tmp_path / "copy", "hf") == []
        assert staging.is_dir()
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["config.json"]
    assert nothing_is_left(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="signals of POSIX processes")
def test_a_hundred_kills_at_random_moments_leave_a_whole_destination(tmp_path, source):
    convert(source, tmp_path / "copy", "meta", shards=4)
    code = """
        import sys
        from llama.checkpoint import convert
        print("ready", flush=True)
        number = 1
        while True:
            convert(sys.argv[1], sys.argv[2], "meta", shards=number)
            number = 3 - number
    """
    for moment in range(100):
        process = run(code, source, tmp_path / "copy")
        process.stdout.readline()
        time.sleep(moment / 500)
        process.kill()
        process.communicate()
        if (tmp_path / "copy").exists():
            assert all(finding.ok for finding in verify(tmp_path / "copy"))
            assert_equal(state(tmp_path / "copy"), state(source))
    convert(source, tmp_path / "copy", "meta")
    assert nothing_is_left(tmp_path)


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_converting_takes_the_memory_of_one_tensor(tmp_path):
    big = {"tok_embeddings.weight": torch.randn(8192, 512)}
    for layer in range(6):
        big |= {f"layers.{layer}.feed_forward.w{number}.weight": torch.randn(2048, 1024) for number in (1, 2, 3)}
    (tmp_path / "source").mkdir()
    values = {"dim": 512, "n_layers": 6, "n_heads": 8, "vocab_size": -1}
    (tmp_path / "source/params.json").write_text(json.dumps(values))
    torch.save(big, tmp_path / "source/consolidated.00.pth")
    del big
    for to, name in (("hf", "a"), ("meta", "b"), ("gguf", "c.gguf")):
        peak, before = [0], anonymous_memory()

        def watch(done, total, peak=peak):
            peak[0] = max(peak[0], anonymous_memory())

        convert(tmp_path / "source", tmp_path / name, to, dtype="bf16", progress=watch)
        assert peak[0] - before < 48 << 20  # the largest tensor has 16 MB and 8 after the cast; all have 166 MB


def test_the_old_converters_arguments_find_the_directory(tmp_path):
    for name in ("7B", "llama-2-13b", "llama-2-7b-chat"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "params.json").touch()
    assert legacy_source(tmp_path, "7B") == tmp_path / "7B"
    assert legacy_source(tmp_path, "7Bf") == tmp_path / "llama-2-7b-chat"
    assert legacy_source(str(tmp_path), "13B") == tmp_path / "llama-2-13b"
    assert legacy_source(tmp_path / "7B", "7B") == tmp_path / "7B"
    with pytest.raises(FileNotFoundError, match=r"no params\.json for model size 70B; looked in .*llama-2-70b"):
        legacy_source(tmp_path, "70B")


def test_a_byte_vocabulary_of_the_tests_has_one_type_for_each_token():
    vocabulary = byte_vocabulary(264)
    assert len(vocabulary.tokens) == len(vocabulary.types) == len(vocabulary.scores) == 264


def tokenizer_directory(folder):
    """A sentencepiece model with tokens that only tokenizer_config.json adds, as fine-tunes of 2023 have them."""
    (folder / "tokenizer.model").write_bytes(train_sentencepiece())
    size = Tokenizer(folder / "tokenizer.model").n_words
    words = [("<|im_start|>", True, False), ("<|im_end|>", True, True), ("glucosamine", False, False)]
    added = {
        str(size + place): {"content": token, "special": special, "rstrip": rstrip}
        for place, (token, special, rstrip) in enumerate(words)
    }
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "bos_token": "<s>"}
    config |= {"eos_token": "<|im_end|>", "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.model"


@pytest.mark.parametrize("to", ["meta", "huggingface", "gguf"])
def test_tokens_that_only_a_config_adds_are_written(tmp_path, to):
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    path = tokenizer_directory(tmp_path / "from")
    before, files = Tokenizer(path), TokenizerFiles(path)
    if to == "gguf":
        after = tmp_path / "to" / "model.gguf"
        write_container(after, [], files.for_gguf(before.n_words, ()), lambda done: None)
        assert any("white space" in warning for warning in files.warnings)
    else:
        for name, content in (files.for_meta() if to == "meta" else files.for_huggingface()).items():
            (tmp_path / "to" / name).write_bytes(content)
        after = find_tokenizer(tmp_path / "to", ("tokenizer.json", "tokenizer.model"))
    after = Tokenizer(after)
    for name in ("n_words", "bos_id", "eos_id", "add_bos", "special_tokens", "stop_ids"):
        assert getattr(after, name) == getattr(before, name)
    start, end = before.special_tokens["<|im_start|>"], before.eos_id
    pieces = [start, "hello the quick glucosamine", end, "  world", before.bos_id, "it's"]
    if to != "gguf":  # which says neither
        assert after.encode_pieces(pieces) == before.encode_pieces(pieces)
    assert after.encode_pieces(["a glucosamine"]) == before.encode_pieces(["a glucosamine"])
    assert after.decode(before.encode_pieces(pieces)) == before.decode(before.encode_pieces(pieces))
