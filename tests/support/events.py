"""Server-sent events, read back."""

from __future__ import annotations

import json


def named_events(text: str) -> list[dict]:
    """The data of each event, which is named by its type."""
    *frames, rest = text.split("\n\n")
    assert rest == ""
    found = []
    for frame in frames:
        name, data = frame.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found
