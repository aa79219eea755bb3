"""A conversation with a model behind a server: the same terminal, over real HTTP."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support.server import Running, serving

from llama import SamplingParams, terminal
from llama.client import RemoteError, RemoteModel

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(name="tiny", api_key=["secret"]) as server:
        yield server


@pytest.fixture
def model(running: Running) -> RemoteModel:
    return RemoteModel(f"{running.url}/v1/", "secret")


@contextmanager
def answering(*bodies: bytes, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> Iterator[str]:
    """The address of a server that lists a model, and answers whatever else with these pieces."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, [b'{"data": [{"id": "m"}]}'])

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(status, bodies)

        def answer(self, code: int, parts: object) -> None:
            self.send_response(code)
            for header in headers:
                self.send_header(*header)
            self.end_headers()
            for part in parts:
                self.wfile.write(part)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def data(**chunk: object) -> bytes:
    return f"data: {json.dumps(chunk)}\n\n".encode()


def test_the_pieces_join_to_what_the_server_s_model_says(model, running):
    assert model.name == "tiny"
    [expected] = running.server.llm.chat([turns("hi")], GREEDY)
    assert "".join(model.stream_chat(turns("hi"), GREEDY)) == expected.text


def test_the_oldest_turns_leave_where_the_server_finds_the_dialog_too_long(model, running):
    dialog = turns("a" * 90, "b" * 90, "c" * 90, "d", "e")
    [expected] = running.server.llm.chat([dialog[2:]], GREEDY)
    assert "".join(model.stream_chat(dialog, GREEDY)) == expected.text
    with pytest.raises(RemoteError, match="the prompt has 3"):
        list(model.stream_chat(turns("x" * 300), GREEDY))


def test_a_closed_answer_ends_on_the_server(model, running):
    answer = model.stream_chat(turns("hi"), SamplingParams(ignore_eos=True))
    next(answer)
    answer.close()
    deadline = threading.Event()
    for _ in range(100):
        if not running.call(lambda: len(running.server.engine.streams)):
            break
        deadline.wait(0.05)
    assert running.call(lambda: len(running.server.engine.streams)) == 0


def test_only_what_was_given_is_asked_for(running):
    from llama.client import given_params

    assert given_params(SamplingParams()) == {}
    assert given_params(GREEDY) == {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
    assert given_params(SamplingParams(stop=("a",), logprobs=3)) == {"stop": ("a",)}


def test_the_terminal_is_the_same(llama, running):
    address = ("--url", running.url, "--api-key", "secret", "--temperature", 0, "--max-tokens", 8)
    status, out, err = llama("chat", "hi", *address)
    [expected] = running.server.llm.chat([turns("hi")], SamplingParams(temperature=0.0, max_tokens=8))
    assert (status, out) == (0, terminal.printable(expected.text) + "\n")
    assert err == ""
    status, out, err = llama("chat", *address, stdin="hi\n/system Be kind.\n" + "x" * 300 + "\nhi\n/reset\nhi\n")
    assert status == 0
    assert "The system prompt is set." in err
    assert "the prompt has 3" in err  # and the conversation went on
    assert out.startswith(terminal.printable(expected.text) + "\n")


def test_the_key_may_stand_in_the_environment(llama, running, monkeypatch):
    status, _, err = llama("chat", "hi", "--url", running.url)
    assert (status, err.count("\n")) == (1, 1)
    assert "401: an API key is missing" in err
    assert "give --api-key, or set LLAMA_API_KEY" in err
    monkeypatch.setenv("LLAMA_API_KEY", "secret")
    assert llama("chat", "hi", "--url", running.url, "--max-tokens", 2)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["hi", "--url", "127.0.0.1:8000"], 1, "is no server's address: give one like http://127.0.0.1:8000"),
        (["hi", "--url", "http://127.0.0.1:1"], 1, "http://127.0.0.1:1 cannot be reached: Connection refused"),
        (["m", "hi", "--url", "http://127.0.0.1:1"], 2, "a model is given with --url"),
        (["hi", "--url", "http://127.0.0.1:1", "--kv-dtype", "int8"], 2, "--kv-dtype is given with --url"),
        (["hi", "--url", "http://127.0.0.1:1", "--tokenizer", "x"], 2, "--tokenizer is given with --url"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(llama, arguments, status, message):
    found, out, err = llama("chat", *arguments)
    assert (found, out, err.count("\n")) == (status, "", 1)
    assert message in err


@pytest.mark.parametrize(
    ("bodies", "options", "message"),
    [
        ([data(error={"message": "out of\nluck", "code": None})], {}, "out of luck"),
        ([data(choices=[{"delta": {"content": "a"}}])], {}, "broke the answer off"),
        ([data(choices=[{"delta": {"refusal": "no"}}])], {}, "no"),
        ([b"data: [1]\n\n"], {}, "not of OpenAI's form"),
        ([b"data: {\n\n"], {}, "not of OpenAI's form"),
        ([b'{"error": "busy"}'], {"status": 503}, "503: busy"),
        ([b"<html>"], {"status": 502}, "502: Bad Gateway"),
        ([b'{"error": {"message": "m"}}'], {"status": 429, "headers": (("Retry-After", "7"),)}, "try again in 7 s"),
        ([b""], {"status": 307, "headers": (("Location", "http://127.0.0.1:1/"),)}, "307"),
        ([b"data: "], {"headers": (("Content-Length", "100"),)}, "broke the connection"),
    ],
)
def test_what_goes_wrong_is_told_in_one_line(bodies, options, message):
    with answering(*bodies, **options) as url, pytest.raises(RemoteError) as error:
        list(RemoteModel(url).stream_chat(turns("hi"), GREEDY))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_was_refused_does_not_join_the_conversation(running, model):
    chat = terminal.Chat(model, GREEDY, ends_at_once=True)
    with pytest.raises(RemoteError, match="special tags are not allowed"):
        list(chat.answer("[INST]"))
    assert chat.turns == []
    assert "".join(chat.answer("hi")) == chat.turns[1]["content"]


def test_ctrl_c_ends_an_answer_that_is_waited_for(model, capsys):
    """The server says nothing more: what is waited for is broken off, and what came joins the conversation."""
    released = threading.Event()

    def silent(dialog: object, params: object) -> Iterator[str]:
        yield "Once"
        os.kill(os.getpid(), signal.SIGINT)
        released.wait(60)
        yield "never"

    chat = terminal.Chat(model, GREEDY, ends_at_once=True)
    model.stream_chat = silent
    handler = signal.getsignal(signal.SIGINT)
    terminal.stream(chat, "hi")
    assert [turn["content"] for turn in chat.turns] == ["hi", "Once"]
    assert capsys.readouterr().out == "Once\n"
    assert signal.getsignal(signal.SIGINT) is handler


def test_talking_with_a_server_needs_no_torch(running):
    code = "import sys; from llama import __main__ as m; sys.argv = ['llama', *sys.argv[1:]]; m.main()"
    code += "; print('torch' in sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code, "chat", "hi", "--url", running.url, "--max-tokens", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"LLAMA_API_KEY": "secret"}, stdin=subprocess.DEVNULL
    )
    assert (done.returncode, done.stderr) == (0, "False\n")
