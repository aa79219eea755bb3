"""What the router on Serve counts; it needs Ray's package, and no cluster."""

import pytest

pytest.importorskip("ray")

from llama.server.fleet import OpenRequests


def test_requests_are_counted_from_their_beginning_to_their_end():
    requests = OpenRequests()
    requests.begin("a", "1")
    requests.begin("a", "2")
    requests.begin("b", "3")
    assert (requests.count("a"), requests.count("b"), requests.count("c")) == (2, 1, 0)
    requests.end("a", "1")
    requests.end("b", "3")
    assert (requests.count("a"), requests.count("b")) == (1, 0)


def test_an_end_without_a_beginning_makes_nobody_look_idle():
    requests = OpenRequests()
    for number in range(3000):
        requests.end("a", f"to all {number}")
    requests.begin("a", "1")
    assert requests.count("a") == 1


def test_an_end_that_is_told_before_the_beginning_counts():
    requests = OpenRequests()
    requests.end("a", "1")
    requests.begin("a", "1")
    assert requests.count("a") == 0
