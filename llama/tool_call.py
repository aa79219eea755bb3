"""A call of a tool, which an answer may make."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ToolCall:
    """A function's name and its arguments, as the model wrote them: JSON, unless the answer was cut off."""

    name: str
    arguments: str
    id: str = ""

    def given(self) -> dict[str, Any]:
        """The arguments as an object; an empty one where the answer was cut off in the midst of them."""
        try:
            return json.loads(self.arguments or "{}")
        except ValueError:
            return {}

    def to_json(self) -> dict[str, object]:
        """As OpenAI's API has it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}
