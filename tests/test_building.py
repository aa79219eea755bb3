"""From a checkpoint to a model that runs: what loads with a warning, and what it then refuses."""

import pytest
import torch
from support.checkpoints import sample, write_hf, write_sentencepiece

from llama import Llama
from llama.building import beyond_training
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
