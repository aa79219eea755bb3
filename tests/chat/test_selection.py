"""Which chat format a model gets."""

import pytest
from support.chat import (
    ByteTokenizer,
    turns,
)

from llama.chat import (
    ChatFormatError,
    choose_format,
)


def test_the_named_format_comes_before_the_models_own_template(tmp_path):
    tokenizer = ByteTokenizer(template="own {{ messages[0].content }}", kind="sentencepiece", add_bos=False)
    file = tmp_path / "mine.jinja"
    file.write_text("file {{ messages[0].content }} é", encoding="utf-8")
    assert choose_format(None, tokenizer).text(turns("Hi")) == "own Hi"
    assert choose_format(str(file), tokenizer).text(turns("Hi")) == "file Hi é"
    assert choose_format("vicuna", tokenizer).name == "vicuna"


def test_without_a_template_the_vocabulary_decides():
    assert choose_format(None, ByteTokenizer(kind="sentencepiece")).name == "llama2"
    assert choose_format(None, ByteTokenizer(kind="tiktoken")).name == "llama3"
    assert choose_format(None, ByteTokenizer(("<s>", "</s>", "<|im_start|>", "<|im_end|>"))).name == "chatml"
    assert choose_format(None, ByteTokenizer(("<s>", "</s>"))).name == "llama2"


def test_an_unknown_format_names_the_allowed_ones():
    with pytest.raises(
        ChatFormatError,
        match=r"^unknown chat format 'lama2'; give one of llama2, llama3, chatml, atom, alpaca, vicuna, "
        "or the path of a Jinja file$",
    ):
        choose_format("lama2", ByteTokenizer())


def test_the_named_tool_format_comes_before_that_of_the_template():
    tokenizer = ByteTokenizer(template="<tool_call> {{ messages[0].content }}")
    assert choose_format(None, tokenizer).tool_format.name == "hermes"
    assert choose_format(None, tokenizer, "mistral").tool_format.name == "mistral"
    assert choose_format(choose_format("vicuna", tokenizer), tokenizer, "llama3").tool_format.name == "llama3"
    with pytest.raises(ValueError, match=r"^unknown tool format 'x': give one of hermes, smollm2, .*, mistral$"):
        choose_format(None, tokenizer, "x")


def test_a_template_file_that_is_not_text_is_refused(tmp_path):
    file = tmp_path / "x.jinja"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ChatFormatError, match=r"x\.jinja is not a chat template: it is not text in UTF-8"):
        choose_format(str(file), ByteTokenizer())


@pytest.mark.parametrize(("name", "lacking"), [("llama3", "<|start_header_id|>"), ("chatml", "<|im_start|>")])
def test_a_format_whose_control_tokens_the_vocabulary_lacks_is_refused(name, lacking):
    with pytest.raises(ChatFormatError) as error:
        choose_format(name, ByteTokenizer(("<s>", "</s>")))
    assert str(error.value).startswith(f"chat format {name} needs ")
    assert lacking in str(error.value)
    assert "give another of llama2, llama3" in str(error.value)


def test_a_format_that_closes_answers_needs_an_end_of_text_token():
    with pytest.raises(ChatFormatError, match="llama2 needs an end-of-text token"):
        choose_format("llama2", ByteTokenizer(("<s>",)))
