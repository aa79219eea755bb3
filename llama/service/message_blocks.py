"""The blocks that Anthropic's messages are made of, as messages of ours: texts, calls of tools and their results.

Source: Anthropic's API reference, "Messages", "Tool use".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from llama.chat import Message, ToolUse
from llama.service.fields import Fields, Ignored
from llama.service.refusal import Refusal
from llama.service.tools import offered

MessageContent = str | list[dict[str, Any]]
UNSPOKEN = ("thinking", "redacted_thinking")  # what a model thought in earlier turns


class MessageTool(Fields):
    type: Literal["custom"] = "custom"  # tools of Anthropic's own run on their side
    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str = ""
    input_schema: dict[str, Any] = {}
    strict: bool = False
    cache_control: Ignored = None

    def to_openai(self) -> dict[str, Any]:
        parts = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        return {"type": "function", "function": {**parts, "strict": self.strict}}


class MessageToolChoice(Fields):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


def tool_use(tools: Sequence[MessageTool], choice: MessageToolChoice | None) -> ToolUse:
    """Raises Refusal."""
    choice = choice or MessageToolChoice(type="auto")
    words = {"auto": "auto", "any": "required", "none": "none", "tool": choice.name}
    if words[choice.type] is None:
        raise Refusal("tool_choice.name: give the name of the tool to call", param="tool_choice")
    described = [tool.to_openai() for tool in tools]
    return offered(described, words[choice.type], not choice.disable_parallel_tool_use)


def turn_messages(where: str, role: str, content: MessageContent) -> Iterator[Message]:
    """A turn as messages: results of tools in front, then what is said, with the calls that are made behind it."""
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind, own = block.get("type"), (block.get("id"), block.get("name"), block.get("tool_use_id"))
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "tool_use" and role == "assistant" and isinstance(block.get("input"), dict):
            call_id, name, _ = own
            calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": block["input"]}})
        elif kind == "tool_result" and role == "user":
            result = "\n".join(block_texts(where, block.get("content") or ""))
            yield {"role": "tool", "content": result, "tool_call_id": own[2]}
        elif kind not in UNSPOKEN:
            raise not_served(where, kind)
    if texts or calls:
        message: Message = {"role": role, "content": "\n".join(texts)}
        yield message | {"tool_calls": calls} if calls else message


def block_texts(where: str, content: MessageContent) -> Iterator[str]:
    """Of blocks that can only be texts."""
    for block in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if isinstance(block, dict) and block.get("type") == "text" and isinstance(block.get("text"), str):
            yield block["text"]
        else:
            raise not_served(where, block.get("type") if isinstance(block, dict) else block)


def not_served(where: str, kind: object) -> Refusal:
    message = f"{where} has a block of type {str(kind)[:40]!r} that has no place there: give text"
    return Refusal(message, param=where, code="unsupported_parameter")
