"""A call of a tool, which an answer may make."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ToolCall:
    """A function's name and its arguments, as the model wrote them: JSON, unless the answer was cut off."""

    name: str
    arguments: str
    id: str = ""

    def to_json(self) -> dict[str, object]:
        """As OpenAI's API has it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}
