import io
import os
import sys

import pytest

from llama import streams
from llama.progress import progress_bar


class Log:
    """What a program may put in a stream's place: it can be written to, no more."""

    def write(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass


def test_control_characters_are_dropped():
    assert streams.printable("a\x1b[31mb\x07\n\tc\x9b") == "a[31mb\n\tc"


@pytest.mark.parametrize("stream", [None, Log()])
def test_a_missing_or_poor_standard_error_costs_nothing(monkeypatch, capsys, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("Loading", show=True) as advance:
        assert advance is None
    streams.tell("hello")
    streams.note("hello")
    assert capsys.readouterr().out == ""


def test_what_is_told_cannot_move_the_cursor(capsys):
    streams.tell("no such key: \x1b[2J")
    assert capsys.readouterr().err == "no such key: [2J\n"


def test_missing_streams_lead_nowhere_and_others_replace_what_they_cannot_encode(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", None)
    streams.repair()
    print("café 😀", flush=True)
    print("lost", file=sys.stderr, flush=True)
    assert sys.stdin.read() == ""
    assert output.buffer.getvalue() == "café ?\n".encode("cp1252")


@pytest.fixture
def pipe(monkeypatch):
    """A pipe in standard input's place; its end for writing."""
    reading, writing = os.pipe()
    with open(reading) as stdin, open(writing, "w") as end:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield end


def test_a_pipe_is_read_to_its_end(pipe):
    pipe.write("purple\nelephants\n")
    pipe.close()
    assert streams.piped_text() == "purple\nelephants\n"


def test_a_pipe_that_our_parent_left_us_is_not_waited_for(pipe, monkeypatch, capsys):
    monkeypatch.setattr(streams, "_is_inherited", lambda: True)
    assert streams.piped_text() == ""
    assert "nothing is on standard input" in capsys.readouterr().err
    pipe.write("late")
    pipe.close()
    assert streams.piped_text() == "late"
