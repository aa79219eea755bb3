import threading

from llama.server.ranks import Watchdog, silence


def test_a_watchdog_that_nobody_pets_barks_once():
    barked = threading.Event()
    watchdog = Watchdog(0.0, barked.set)
    watchdog.start()
    assert barked.wait(60)
    watchdog._thread.join(60)
    assert not watchdog._thread.is_alive()


def test_one_that_is_petted_looks_again_later(monkeypatch):
    barked, waits, clock = [], [], [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    watchdog = Watchdog(10, lambda: barked.append(clock[0]))

    class Stopped:
        def wait(self, seconds):
            waits.append(seconds)
            clock[0] += seconds
            if len(waits) == 1:
                clock[0] -= 4
                watchdog.pet()
                clock[0] += 4
            return False

    watchdog._is_stopped = Stopped()
    watchdog._watch()
    assert (waits, barked) == ([10, 6], [116.0])


def test_one_that_is_held_is_silent_for_as_long_as_it_takes(monkeypatch):
    barked, waits, clock = [], [], [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    watchdog = Watchdog(10, lambda: barked.append(clock[0]))

    class Stopped:
        def wait(self, seconds):
            waits.append(seconds)
            clock[0] += seconds
            if len(waits) == 3:
                held.__exit__(None, None, None)
            return False

    watchdog._is_stopped = Stopped()
    held = watchdog.held()
    held.__enter__()
    watchdog._watch()
    assert (waits, barked) == ([10, 10, 10, 10], [140.0])


def test_a_stopped_one_is_silent():
    watchdog = Watchdog(60, lambda: None)
    watchdog.start()
    watchdog.stop()
    watchdog._thread.join(60)
    assert not watchdog._thread.is_alive()


def test_what_is_told_names_the_option():
    assert silence(60.0).startswith("nothing was heard of the other ranks for 60 s")
    assert "--rank-timeout" in silence(60.0)
