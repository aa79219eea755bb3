"""What the commands print beside answers."""

from types import SimpleNamespace

from llama.report import guesses_text


def test_guesses_are_told_of_where_there_were_some():
    assert guesses_text(SimpleNamespace(num_draft_tokens=0, num_accepted_tokens=0)) == ""
    assert guesses_text(SimpleNamespace(num_draft_tokens=9, num_accepted_tokens=5)) == ", 5 of 9 guesses right"
