import json
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPException

import pytest
from support.processes import ServerProcesses, server_processes
from support.server import serving, tiny_llm

LONG = {"model": "m", "prompt": [1, 2, 3], "stream": True, "ignore_eos": True}


def slow_llm():
    return tiny_llm(max_seq_len=4096)


def frames(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]


# ---- in this process


def test_a_server_without_requests_ends_at_once():
    with serving(shutdown_timeout=3600):
        pass


def test_while_it_drains_it_listens_and_refuses_and_open_streams_go_on():
    with serving() as running:
        stream = running.open("POST", "/v1/completions", LONG)
        first = stream.read(1)
        running.call(running.stop)
        for answer in (running.get("/health"), running.post("/v1/completions", LONG)):
            assert answer[0] == 503
            assert answer[1]["error"]["message"] == "the server is stopping"
        assert running.open("POST", "/v1/completions", LONG).headers["retry-after"] == "1"
        found = frames((first + stream.read()).decode())
    assert found[-1] == "[DONE]"
    assert json.loads(found[-2])["choices"][0]["finish_reason"] == "length"


def test_streams_that_take_too_long_are_ended_with_an_error_and_the_terminal_event():
    with serving(slow_llm, shutdown_timeout=0) as running:
        stream = running.open("POST", "/v1/completions", LONG)
        first = stream.read(1)
        running.call(running.stop)
        found = frames((first + stream.read()).decode())
    assert found[-1] == "[DONE]"
    error = json.loads(found[-2])["error"]
    assert (error["message"], error["type"]) == ("the server is stopping", "unavailable_error")


def test_an_answer_in_one_piece_that_takes_too_long_is_refused():
    with serving(slow_llm, shutdown_timeout=0) as running:
        stream = running.open("POST", "/v1/completions", LONG)
        stream.read(1)  # so that the other one is behind it
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(running.post, "/v1/completions", LONG | {"stream": False})
            running.wait_until(lambda: len(running.server.engine.streams) == 2)
            running.call(running.stop)
            assert whole.result()[0] == 503


def test_a_second_signal_ends_the_waiting():
    with serving(slow_llm, shutdown_timeout=3600) as running:
        stream = running.open("POST", "/v1/completions", LONG)
        first = stream.read(1)
        running.call(running.stop)
        running.call(running.stop)
        assert frames((first + stream.read()).decode())[-1] == "[DONE]"


def test_a_client_that_does_not_read_holds_nobody_up():
    with serving(slow_llm, shutdown_timeout=0, send_timeout=3600) as running:
        running.open("POST", "/v1/completions", LONG | {"logprobs": 5, "n": 8}).read(1)
        running.call(running.stop)


# ---- by signals


def ask(server: ServerProcesses, has_begun: threading.Event, max_tokens: int) -> str:
    """What a client saw: "whole", "cut off" with an error, "refused", or what must not be."""
    try:
        connection = server.connection()
        body = json.dumps(LONG | {"max_tokens": max_tokens})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        has_begun.set()
        text = response.read().decode()
    except (ConnectionRefusedError, ConnectionResetError, HTTPException):
        return "refused"
    finally:
        has_begun.set()
    if response.status == 503:
        return "refused"
    found = frames(text)
    if response.status != 200 or found[-1] != "[DONE]":
        return f"status {response.status}, the last of {len(found)} frames is {found[-1:]}"
    last = json.loads(found[-2])
    return "cut off" if "error" in last else "whole" if last["choices"][0]["finish_reason"] == "length" else str(last)


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 100))])
def test_at_a_random_moment_under_load_no_stream_is_without_an_end(seed):
    """A client whose request came before the signal sees an end; later ones are refused."""
    chance = random.Random(seed)
    timeout = chance.choice([0, 0.2, 30])
    with server_processes(partial(tiny_llm, max_seq_len=1024), shutdown_timeout=timeout) as server:
        begun = [threading.Event() for _ in range(8)]
        with ThreadPoolExecutor(len(begun)) as pool:
            seen = [pool.submit(ask, server, event, chance.randrange(1, 900)) for event in begun]
            for event in begun[: chance.randrange(len(begun) + 1)]:
                assert event.wait(60)
            server.send(chance.choice([signal.SIGTERM, signal.SIGINT]))
            outcomes = [one.result() for one in seen]
        assert server.exit_statuses() == [0]
        assert set(outcomes) <= {"whole", "cut off", "refused"}
        assert server.told.endswith("Ctrl-C stops)\n")  # and nothing since


def test_a_second_signal_ends_the_process_with_status_0():
    with server_processes(slow_llm, shutdown_timeout=3600) as server:
        begun = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            seen = pool.submit(ask, server, begun, 4000)
            assert begun.wait(60)
            server.send(signal.SIGTERM)
            while (connection := server.connection()).request(
                "GET", "/health"
            ) or connection.getresponse().status != 503:
                pass
            server.send(signal.SIGTERM)
            assert seen.result() == "cut off"
        assert server.exit_statuses() == [0]
