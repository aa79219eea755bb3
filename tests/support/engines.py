"""Engines that look after themselves while they are tested."""

from __future__ import annotations

import random

from llama.answer import Event
from llama.engine import Engine


def checked(engine: Engine, chance: random.Random, shaken: float = 0.0) -> Engine:
    """The engine, whose scheduler checks itself after every step; `shaken`: how often one is preempted before it."""
    step = engine.step

    def checked_step() -> list[Event]:
        running = engine.scheduler.running
        if shaken and running and chance.random() < shaken:
            engine.scheduler.preempt(chance.choice(running))
        events = step()
        engine.scheduler.check()
        return events

    engine.step = checked_step
    return engine
