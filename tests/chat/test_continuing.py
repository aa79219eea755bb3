"""An answer that goes on from the last message: the whole dialog's tokens, but for those behind that message's text."""

import pytest
from hypothesis import example, given
from support.chat import (
    CHATML_TEMPLATE,
    CONTENT,
    DIALOG,
    LLAMA2_TEMPLATE,
    LLAMA3_TEMPLATE,
    ByteTokenizer,
    spread,
    turns,
)

from llama.chat import FORMATS, DialogError, JinjaFormat, Prompt, choose_format
from llama.tokenizer import Tokenizer

BEHIND = {  # what closes an answer in the midst of a dialog
    "llama2": (" ", "</s>"),
    "llama3": ("<|eot_id|>",),
    "chatml": ("<|im_end|>", "\n"),
    "atom": ("\n", "</s>"),
    "alpaca": ("</s>", "\n\n"),
    "vicuna": ("</s>",),
}
TEMPLATES = {"llama2": LLAMA2_TEMPLATE, "llama3": LLAMA3_TEMPLATE, "chatml": CHATML_TEMPLATE}


def continued(*contents, system=None) -> Prompt:
    return Prompt(tuple(turns(*contents, system=system)), continues=True)


@pytest.mark.parametrize("name", FORMATS)
def test_it_lacks_what_the_format_puts_behind_the_text_and_nothing_else(name):
    tokenizer = ByteTokenizer()
    chosen = FORMATS[name](tokenizer)
    behind = tokenizer.encode_pieces(tokenizer.special_tokens.get(piece, piece) for piece in BEHIND[name])

    @spread(100)
    @given(CONTENT, CONTENT)
    @example("", "")
    def check(question, answer):
        answer = f"{answer}."  # without spaces at its end
        found = chosen.encode(continued(question, answer, system="s"))
        whole = chosen.encode(turns(question, answer, "next", system="s"))
        assert whole[: len(found) + len(behind)] == found + behind
        assert tokenizer.decode(found).endswith(answer.strip())

    check()


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_cut_where_the_format_of_its_name_is(name):
    tokenizer = ByteTokenizer(bos="<|begin_of_text|>" if name == "llama3" else "<s>")
    native, template = FORMATS[name](tokenizer), JinjaFormat(tokenizer, TEMPLATES[name])

    @spread(100)
    @given(CONTENT, CONTENT)
    @example("x", "<|im_")
    @example("\U000f0000", "\U000f0001\U000f0002")
    def check(question, answer):
        prompt = continued(question, f"{answer}.", system="s")
        assert template.encode(prompt) == native.encode(prompt)

    check()


@pytest.mark.parametrize("name", FORMATS)
def test_spaces_at_the_end_of_the_text_are_kept(name):
    chosen = FORMATS[name](ByteTokenizer())
    for spaces in (" ", "\n", " \n\n"):
        text = chosen.text(continued("Say.", f"Once{spaces}"))
        assert text == chosen.text(continued("Say.", "Once")) + spaces


@pytest.mark.parametrize("template", TEMPLATES.values())
def test_templates_are_continued_as_in_transformers(template):
    theirs = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    dialog = turns("Say.", "a </s> b", "Go on.", "Once upon <a>")
    [expected], _ = theirs(
        [dialog], chat_template=template, bos_token="<s>", eos_token="</s>", continue_final_message=True
    )
    chosen = JinjaFormat(ByteTokenizer(add_bos=False), template)
    assert chosen.text(Prompt(tuple(dialog), continues=True)) == expected


def test_a_template_is_told_that_no_answer_begins():
    chosen = JinjaFormat(
        ByteTokenizer(add_bos=False), "{{ add_generation_prompt }} {{ messages[-1].content }}<|im_end|>"
    )
    assert chosen.text(continued("a", "b")) == "False b"


def test_of_a_text_that_is_written_twice_the_last_counts():
    chosen = JinjaFormat(ByteTokenizer(add_bos=False), "{% for i in range(2) %}{{ messages[-1].content }}!{% endfor %}")
    assert chosen.text(continued("a", "b")) == "b!b"


def test_a_template_that_leaves_the_end_of_the_text_out_cannot_be_continued():
    chosen = JinjaFormat(ByteTokenizer(), "{{ messages[-1].content[:1] }}")
    with pytest.raises(DialogError, match="leaves out the end of the last message"):
        chosen.encode(continued("a", "bc"))


@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_answer_is_begun(name):
    chosen = FORMATS[name](ByteTokenizer())
    assert chosen.encode(continued("a", "b", "c", "")) == chosen.encode(turns("a", "b", "c"))


@pytest.mark.parametrize(
    ("dialog", "message"),
    [
        (turns("a"), r"^there is no answer to continue: the last message has role 'user', not 'assistant'$"),
        (turns("a", "b")[1:], "^the dialog is nothing but an answer to continue; give the user's message before it$"),
        ([], "^the dialog is empty"),
    ],
)
def test_what_holds_no_answer_cannot_be_continued(dialog, message):
    with pytest.raises(DialogError, match=message):
        Prompt(tuple(dialog), continues=True)


def test_llama2_refuses_a_wrong_order_before_the_answer():
    with pytest.raises(DialogError, match=r"^Last message must be from user, got assistant$"):
        FORMATS["llama2"](ByteTokenizer()).encode(Prompt((*turns("a", "b"), *turns("a", "b")[1:]), continues=True))


def test_real_vocabularies_give_the_ids_of_the_whole_dialog(smollm, sentencepiece_file):
    for chosen, behind in (
        (choose_format(None, smollm), "<|im_end|>\n"),
        (FORMATS["llama2"](Tokenizer(str(sentencepiece_file))), "</s>"),
    ):
        dialog = [*DIALOG, {"role": "assistant", "content": "Because 1 + 1 is 2."}]
        found = chosen.encode(Prompt(tuple(dialog), continues=True))
        whole = chosen.encode([*dialog, *turns("y")])
        assert whole[: len(found)] == found
        assert "".join(chosen.names.get(token, "") for token in whole[len(found) :][:2]) == behind.strip()
