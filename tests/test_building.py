"""From a checkpoint to a model that runs: what loads with a warning, and what it then refuses."""

from pathlib import Path

import pytest
import torch
from support.checkpoints import sample, write_hf, write_sentencepiece
from support.meta_files import save_tokenizer

from llama import Llama, SamplingParams
from llama.building import beyond_training
from llama.drafters import DraftModel, Lookup
from llama.kernels import library
from llama.model import ModelArgs
from llama.rotary import DynamicScaling, RopeScaling, YarnScaling
from llama.vocabulary import TokenType

OPTIONS = {"device": "cpu", "dtype": "float32", "kv_cache_memory": 1 << 24}


def test_a_model_without_head_embeds_and_says_that_it_cannot_generate(tmp_path):
    args, weights = sample()
    del weights["output.weight"]
    path = write_hf(tmp_path, args, weights, architectures=["LlamaModel"])
    write_sentencepiece(path / "tokenizer.model")
    llm = Llama.build(path, **OPTIONS)
    assert llm.embed(["hello"]).shape == (1, args.dim)
    for call in (llm.complete, llm.score):
        with pytest.raises(ValueError, match="no output layer: it embeds texts, and cannot generate"):
            call(["hello"])


def test_control_tokens_beyond_the_embedding_are_refused_and_nothing_else(tmp_path, capsys):
    args, weights = sample(vocab_size=264)
    path = write_hf(tmp_path, args, weights)
    write_sentencepiece(path / "tokenizer.model", 266, {264: TokenType.CONTROL, 265: TokenType.CONTROL})
    llm = Llama.build(path, **OPTIONS)
    assert "warning: the tokenizer has 266 tokens, but the model's vocabulary 264" in capsys.readouterr().err
    assert len(llm.complete(["hello"])) == 1
    with pytest.raises(ValueError, match=r"token 265, but the vocabulary has 0 \.\.\. 263"):
        llm.complete([[1, 265]])


def test_a_tokenizer_whose_text_the_model_lacks_is_refused(tmp_path):
    args, weights = sample(vocab_size=264)
    path = write_hf(tmp_path, args, weights)
    write_sentencepiece(path / "tokenizer.model", 266)
    with pytest.raises(ValueError, match="they do not belong together"):
        Llama.build(path, **OPTIONS)


def test_files_that_are_passed_over_are_named(tmp_path, capsys):
    args, weights = sample()
    write_hf(tmp_path, args, weights)
    write_hf(tmp_path, args, {name: torch.zeros_like(weight) for name, weight in weights.items()}, binary=True)
    write_sentencepiece(tmp_path / "tokenizer.model")
    Llama.build(tmp_path, **OPTIONS)
    assert "pytorch_model.bin: is passed over: model.safetensors is read" in capsys.readouterr().err


def test_scaling_that_the_settings_have_counts_in_what_a_model_was_made_for():
    def warned(max_seq_len: int, scaling: RopeScaling | None) -> list[str]:
        return list(beyond_training(ModelArgs(max_seq_len=128, rope_scaling=scaling), max_seq_len))

    for scaling, reached in ((None, 128), (YarnScaling(8.0, 16), 128), (DynamicScaling(2.0, 128), 256)):
        assert warned(reached, scaling) == []
        [warning] = warned(2 * reached, scaling)
        assert f"made for {reached} tokens" in warning
        assert "Rope scaling by 2 or more" in warning


# ---- what guesses


def small_model(directory: Path, **changes) -> Path:
    """A checkpoint whose vocabulary is that of all others from here."""
    args, weights = sample(multiple_of=64, max_seq_len=128, max_batch_size=4, **changes)
    write_sentencepiece(directory / "tokenizer.model")
    return write_hf(directory, args, weights)


@pytest.mark.skipif(not library.AVAILABLE, reason="the kernels are not compiled")
def test_text_is_looked_up_by_itself_where_that_changes_no_bit(tmp_path):
    path = small_model(tmp_path)

    def drafter(**options) -> object:
        return Llama.build(path, **OPTIONS, **options).engine.speculation.drafter

    assert drafter() is None
    assert isinstance(drafter(draft="lookup"), Lookup)
    assert isinstance(drafter(deterministic=True), Lookup)
    assert isinstance(drafter(quantization="sym_int4"), Lookup)
    assert drafter(quantization="sym_int4", draft="none") is None


def test_a_small_model_drafts_for_a_large_one_out_of_the_same_memory(tmp_path):
    large, small = small_model(tmp_path / "large", n_layers=3), small_model(tmp_path / "small", n_layers=1)
    greedy = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    memory = OPTIONS | {"kv_cache_memory": 3 * 8 * 16 * 256}  # 8 blocks of the large model's alone
    plain = Llama.build(large, **memory, draft="none")
    llm = Llama.build(large, **memory, max_seq_len=96, draft=small)
    assert isinstance(llm.engine.speculation.drafter, DraftModel)
    assert [engine.stats().num_blocks for engine in (plain.engine, llm.engine)] == [8, 6]
    assert llm.complete([[1, 5, 9]], greedy) == plain.complete([[1, 5, 9]], greedy)
    assert llm.engine.stats().num_draft_tokens > 0


def test_a_model_of_another_vocabulary_cannot_draft(tmp_path):
    large = small_model(tmp_path / "large", vocab_size=400)
    other = small_model(tmp_path / "other", vocab_size=400)
    save_tokenizer(other / "tokenizer.model", 400)
    with pytest.raises(ValueError, match=r"other.* cannot draft for .*large.*another one, as token \d+ shows; give"):
        Llama.build(large, **OPTIONS, draft=other)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Llama.build(large, **OPTIONS, draft=tmp_path / "nowhere")
