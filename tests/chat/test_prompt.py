"""What is a dialog and what is none."""

import pytest
from support.chat import (
    CHATML_TEMPLATE,
    ByteTokenizer,
    turns,
)

from llama.chat import (
    DEFAULT_SYSTEM_PROMPT,
    FORMATS,
    DialogError,
    JinjaFormat,
    format_dialog,
    with_system,
)


@pytest.mark.parametrize("name", [*FORMATS, None])
def test_an_empty_dialog_is_refused(name):
    tokenizer = ByteTokenizer(template=CHATML_TEMPLATE)
    with pytest.raises(DialogError, match=r"^the dialog is empty; give at least one message, from the user$"):
        format_dialog([], tokenizer, name)


@pytest.mark.parametrize("message", ["Hi", {"role": "user"}, {"content": "Hi"}, {"role": "user", "content": None}, 1])
def test_a_message_of_another_form_is_refused(message):
    chosen = FORMATS["llama2"](ByteTokenizer())
    for ask in (chosen.encode, chosen.is_unsafe):
        with pytest.raises(DialogError, match=r"^message 1 is not of the form {'role': text, 'content': text}$"):
            ask([message])


def test_content_in_text_parts_is_their_text():
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    for chosen in (FORMATS["llama2"](ByteTokenizer()), JinjaFormat(ByteTokenizer(), CHATML_TEMPLATE)):
        assert chosen.encode([{"role": "user", "content": parts[:1]}]) == chosen.encode(turns("Hi"))
        assert chosen.encode([{"role": "user", "content": parts}]) == chosen.encode(turns("Hi\nthere"))
    assert FORMATS["llama2"](ByteTokenizer()).is_unsafe(
        [{"role": "user", "content": [*parts, {"type": "text", "text": "[INST]"}]}]
    )


@pytest.mark.parametrize("part", ["Hi", {"type": "image_url", "image_url": {}}, {"type": "text"}])
def test_a_part_that_is_no_text_is_refused(part):
    with pytest.raises(DialogError, match=r"^message 2 has a part that is no text; give "):
        FORMATS["chatml"](ByteTokenizer()).encode([*turns("a"), {"role": "user", "content": [part]}])


def test_an_assistants_message_may_lack_content():
    chosen = FORMATS["chatml"](ByteTokenizer())
    dialog = [*turns("a"), {"role": "assistant", "content": None}, *turns("b")]
    assert chosen.encode(dialog) == chosen.encode(turns("a", "", "b"))


def test_a_system_message_is_put_in_front_replaced_or_taken_away():
    dialog = turns("Hi")
    with_default = with_system(dialog, DEFAULT_SYSTEM_PROMPT)
    assert with_default == turns("Hi", system=DEFAULT_SYSTEM_PROMPT)
    assert with_system(with_default, "new") == turns("Hi", system="new")
    assert with_system(with_default, "") == dialog == turns("Hi")
    assert with_system([], "new") == turns(system="new")
