import threading
from collections.abc import Callable

import pytest

from llama.parallel import Watchdog
from llama.server.ranks import silence


def test_a_watchdog_that_nobody_pets_barks_once():
    barked = threading.Event()
    watchdog = Watchdog(0.0, barked.set)
    watchdog.start()
    assert barked.wait(60)
    watchdog._thread.join(60)
    assert not watchdog._thread.is_alive()


class Clock:
    """The time that a watchdog sees and waits by; `then` is called at each wait, with its number, as time goes on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, then: Callable[[int], None]) -> None:
        self.now, self.waits, self.barked, self.then = 100.0, [], [], then
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        self.watchdog = Watchdog(10, lambda: self.barked.append(self.now))
        self.watchdog._is_stopped = self

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now += seconds
        self.then(len(self.waits))
        return False


def test_one_that_is_petted_looks_again_later(monkeypatch):
    def pet(number: int) -> None:
        if number == 1:
            clock.now -= 4
            clock.watchdog.pet()
            clock.now += 4

    clock = Clock(monkeypatch, pet)
    clock.watchdog._watch()
    assert (clock.waits, clock.barked) == ([10, 6], [116.0])


def test_one_that_is_held_is_silent_for_as_long_as_it_takes(monkeypatch):
    def let_go(number: int) -> None:
        if number == 3:
            held.__exit__(None, None, None)

    clock = Clock(monkeypatch, let_go)
    held = clock.watchdog.held()
    held.__enter__()
    clock.watchdog._watch()
    assert (clock.waits, clock.barked) == ([10, 10, 10, 10], [140.0])


def test_a_stopped_one_is_silent():
    watchdog = Watchdog(60, lambda: None)
    watchdog.start()
    watchdog.stop()
    watchdog._thread.join(60)
    assert not watchdog._thread.is_alive()


def test_what_is_told_names_the_option():
    assert silence(60.0).startswith("nothing was heard of the other ranks for 60 s")
    assert "--rank-timeout" in silence(60.0)
