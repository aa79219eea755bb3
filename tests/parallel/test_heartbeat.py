import pytest
import torch.distributed as dist

from llama.parallel import Heartbeat
from llama.parallel.heartbeat import HEARTBEAT_TIMEOUT, TIMEOUT_NAME, heartbeat_timeout


class Ranks:
    """Heartbeats of some ranks in one store, which beat when they are told to; how often each had heard all others."""

    def __init__(self, size: int) -> None:
        self.store = dist.HashStore()
        self.beats = [Heartbeat(self.store, rank, size, 20.0) for rank in range(size)]
        self.pets = [0] * size
        for rank, one in enumerate(self.beats):
            self.store.set(str(rank), f"0 host{rank}")
            one._watchdog.pet = lambda rank=rank: self.pet(rank)

    def pet(self, rank: int) -> None:
        self.pets[rank] += 1

    def beat(self, number: int, *ranks: int) -> None:
        for rank in ranks:
            self.beats[rank].beat(number)


def test_ranks_that_hear_of_each_other_again_and_again_are_content():
    ranks = Ranks(3)
    for number in range(1, 6):
        ranks.beat(number, 0, 1, 2)
    assert min(ranks.pets) >= 4


def test_one_that_is_late_is_waited_for():
    ranks = Ranks(3)
    ranks.beat(1, 2, 1, 0)
    assert ranks.pets[0] == 1
    ranks.beat(2, 1, 0)
    ranks.beat(3, 1, 0)
    assert ranks.pets[0] == 1, "rank 2 has said nothing new"
    ranks.beat(4, 2, 0)
    assert ranks.pets[0] == 2


def test_who_is_silent_is_named_with_the_host():
    ranks = Ranks(3)
    ranks.beat(1, 0, 1, 2)
    for number in range(2, 5):
        ranks.beat(number, 1, 0)
    ranks.beats[2]._host, ranks.beats[0].limit = "elsewhere", 7.0
    host = ranks.beats[0]._host
    assert ranks.beats[0].silence().startswith(f"nothing was heard of rank 2 on {host} for 7 s: its machine or network")
    assert TIMEOUT_NAME in ranks.beats[0].silence()


def test_one_that_has_ended_is_expected_no_more():
    ranks = Ranks(2)
    ranks.beat(1, 0, 1, 0)
    ranks.beats[1].start()
    ranks.beats[1].stop()
    before = ranks.pets[0]
    for number in range(2, 5):
        ranks.beat(number, 0)
    assert ranks.pets[0] == before + 3


def test_the_watchdog_tells_what_stands_in_its_place():
    ranks = Ranks(2)
    told = []
    ranks.beats[0].bark = told.append
    ranks.beats[0]._watchdog.bark()
    assert told == [ranks.beats[0].silence()]


def test_the_time_stands_in_the_environment(monkeypatch):
    monkeypatch.delenv(TIMEOUT_NAME, raising=False)
    assert heartbeat_timeout() == HEARTBEAT_TIMEOUT
    monkeypatch.setenv(TIMEOUT_NAME, "2.5")
    assert heartbeat_timeout() == 2.5


@pytest.mark.parametrize("text", ["", "soon", "0", "-3", "nan"])
def test_another_time_is_refused(monkeypatch, text):
    monkeypatch.setenv(TIMEOUT_NAME, text)
    with pytest.raises(ValueError, match=f"{TIMEOUT_NAME} is '{text}': give a number of seconds above 0"):
        heartbeat_timeout()
