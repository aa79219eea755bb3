import stat
import sys

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from support.terminal import Terminal

from llama.keyboard import open_history, typed

ENTER, ALT_ENTER, CTRL_C, CTRL_D, CTRL_E, CTRL_R = "\r", "\x1b\r", "\x03", "\x04", "\x05", "\x12"
PASTE, END_OF_PASTE = "\x1b[200~", "\x1b[201~"
LEFT = "\x1b[D"


@pytest.fixture
def messages(monkeypatch):
    """What `typed` makes of keys."""
    monkeypatch.setenv("TERM", "xterm")

    def make(keys: str, history=None) -> list[str]:
        with create_pipe_input() as pipe, create_app_session(input=pipe):
            pipe.send_text(keys + CTRL_D)
            return list(typed(history))

    return make


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (f"hello{ENTER}", "hello"),
        (f"helo{LEFT}l{ENTER}", "hello"),
        (f"{PASTE}What is this?\nx = 1\r\nprint(x){END_OF_PASTE}{ENTER}", "What is this?\nx = 1\nprint(x)"),
        (f"one\\{ENTER}  two{ENTER}", "one\n  two"),
        (f"one{ALT_ENTER}two{ENTER}", "one\ntwo"),
        (f"C:\\ is what?{ENTER}", "C:\\ is what?"),
        (f"早上好{ENTER}", "早上好"),
    ],
)
def test_enter_sends_and_a_message_may_have_several_lines(messages, keys, expected):
    assert messages(keys) == [expected]


def test_ctrl_c_drops_the_line_and_says_how_to_leave(messages, capsys):
    assert messages(f"never mind{CTRL_C}hello{ENTER}") == ["hello"]
    assert "/quit leaves" in capsys.readouterr().err


def test_a_history_is_kept_where_a_file_is_given_and_for_its_owner_alone(messages, tmp_path):
    path = tmp_path / "history"
    assert messages(f"first\\{ENTER}second{ENTER}", path) == ["first\nsecond"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(open_history(path).load_history_strings()) == ["first\nsecond"]
    assert list(open_history(None).load_history_strings()) == []


def test_a_search_of_the_history_ends_with_enter_and_sends_nothing_yet(messages, tmp_path):
    path = tmp_path / "history"
    messages(f"the sea{ENTER}the sky{ENTER}", path)
    assert messages(f"{CTRL_R}sea{ENTER}{CTRL_E}!{ENTER}", path) == ["the sea!"]


def test_a_terminal_that_can_only_print_gets_plain_lines():
    program = "from llama.keyboard import typed; print(list(typed()))"
    terminal = Terminal([sys.executable, "-c", program], TERM="dumb")
    terminal.wait_for("> ")
    terminal.type(f"hello{ENTER}")
    terminal.wait_for("> ")
    terminal.type(CTRL_D)
    status, shown, _ = terminal.end()
    assert (status, shown) == (0, "\r\n['hello']\r\n")
