"""Dialogs that are cut to fit."""

import string

import pytest
from support.chat import (
    ByteTokenizer,
    turns,
)

from llama.chat import (
    FORMATS,
    DialogError,
    choose_format,
    fit_dialog,
    format_dialog,
)


def brute_fit(dialog, max_tokens, tokenizer, name):
    """Drop turns one by one until the rest fits."""
    system = [m for m in dialog[:1] if m["role"] == "system"]
    rest = dialog[len(system) :]
    while len(format_dialog(system + rest, tokenizer, name).tokens) > max_tokens:
        rest = rest[1:]
        while rest[0]["role"] != "user":
            rest = rest[1:]
    return system + rest


@pytest.mark.parametrize("name", FORMATS)
def test_fitting_drops_the_oldest_turns_and_no_more_than_it_must(name):
    tokenizer = ByteTokenizer()
    contents = [string.ascii_letters[: 3 * place % 11 + 1] for place in range(9)]
    for dialog in (turns(*contents), turns(*contents, system="be brief")):
        least = len(format_dialog(dialog[: len(dialog) % 2 - 1] + dialog[-1:], tokenizer, name).tokens)
        for max_tokens in range(least, least + 400, 17):
            fitted = fit_dialog(dialog, max_tokens, tokenizer, name)
            assert fitted == brute_fit(dialog, max_tokens, tokenizer, name)
            assert len(format_dialog(fitted, tokenizer, name).tokens) <= max_tokens


def test_a_dialog_that_fits_is_kept_whole_as_a_new_list():
    dialog = turns("a", "b", "c", system="s")
    fitted = fit_dialog(dialog, 10_000, ByteTokenizer())
    assert fitted == dialog
    assert fitted is not dialog


def test_a_last_message_that_does_not_fit_alone_is_refused_with_both_numbers():
    tokenizer = ByteTokenizer()
    alone = len(format_dialog(turns("x" * 100, system="s"), tokenizer, "llama2").tokens)
    message = f"^the last message takes {alone} tokens with its format, only {alone - 1} fit; shorten it$"
    with pytest.raises(DialogError, match=message):
        fit_dialog(turns("a", "b", "x" * 100, system="s"), alone - 1, tokenizer, "llama2")


def test_a_format_made_before_is_used_as_it_is():
    tokenizer = ByteTokenizer()
    chosen = FORMATS["atom"](tokenizer)
    assert choose_format(chosen, tokenizer) is chosen
    assert fit_dialog(turns("a" * 99, "b", "c"), 60, tokenizer, chosen) == turns("c")
    assert format_dialog(turns("c"), tokenizer, chosen).text == "<s>Human: c\n</s><s>Assistant: "


@pytest.mark.parametrize("dialog", [[], ["Hi"], [{"content": "Hi"}]])
def test_fitting_refuses_what_is_no_dialog(dialog):
    with pytest.raises(DialogError):
        fit_dialog(dialog, 60, ByteTokenizer())


def test_fitting_keeps_a_tools_answer_with_its_question():
    tool = {"role": "tool", "content": "4"}
    dialog = [*turns("old " * 20, "x"), *turns("2 + 2?", "let me see"), tool]
    assert fit_dialog(dialog, 120, ByteTokenizer(), "chatml") == dialog[2:]
