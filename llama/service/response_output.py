"""A response's output: its items, and how they come to be, in OpenAI's events.

Source: OpenAI's API reference, "Responses", "Streaming events".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from llama.chat.tools import AnswerPiece, CallPiece

ResponseEvent = dict[str, Any]  # with its "type"; its number is the stream's to add
PartKind = Literal["output_text", "refusal"]
ItemStatus = Literal["completed", "incomplete"]


class ResponseOutput:
    """Makes `items` of an answer's pieces: a message of each stretch of text, and an item of each call.

    Only the last item changes; an event shows it as it is when the event comes. Log-probabilities belong to the text
    that comes with them or next; those of a call's tokens are told nowhere.
    """

    def __init__(self, call_id: str):
        self.items: list[dict[str, Any]] = []
        self._id = call_id
        self._logprobs: list[dict[str, Any]] = []  # of the text that comes next
        self._is_open = False  # the last item is not done

    def add(
        self, pieces: Sequence[AnswerPiece], logprobs: Sequence[dict[str, Any]] = (), kind: PartKind = "output_text"
    ) -> Iterator[ResponseEvent]:
        """More of the answer. What is said in it is text, or a refusal."""
        self._logprobs += logprobs
        for piece in pieces:
            yield from self._call(piece) if isinstance(piece, CallPiece) else self._text(piece, kind)

    def end(self, status: ItemStatus) -> Iterator[ResponseEvent]:
        """There is no more. An answer without anything is a message without text."""
        if not self.items:
            yield from self._text("", "output_text")
        yield from self.close(status)

    def close(self, status: ItemStatus) -> Iterator[ResponseEvent]:
        """Nothing will be added to the last item."""
        if not self._is_open:
            return
        item = self.items[-1]
        if item["type"] == "function_call":
            yield self._event("function_call_arguments.done", arguments=item["arguments"])
        else:
            yield from self._close_part(item["content"][0])
        item["status"] = status
        self._is_open = False
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def _text(self, text: str, kind: PartKind) -> Iterator[ResponseEvent]:
        if not self._is_open or self.items[-1]["type"] != "message":
            yield from self._begin_message(kind)
        part = self.items[-1]["content"][0]
        where = {"content_index": 0, "delta": text}
        if kind == "refusal":
            part["refusal"] += text
        else:
            part["text"] += text
            where["logprobs"] = self._logprobs
            part["logprobs"] += self._logprobs
        self._logprobs = []
        yield self._event(f"{kind}.delta", **where)

    def _call(self, piece: CallPiece) -> Iterator[ResponseEvent]:
        self._logprobs = []
        if piece.name is not None:
            yield from self.close("completed")
            call = {"type": "function_call", "call_id": piece.id, "name": piece.name, "arguments": ""}
            yield from self._begin("fc", call)
        if piece.arguments:
            self.items[-1]["arguments"] += piece.arguments
            yield self._event("function_call_arguments.delta", delta=piece.arguments)

    def _begin_message(self, kind: PartKind) -> Iterator[ResponseEvent]:
        yield from self.close("completed")
        yield from self._begin("msg", {"type": "message", "role": "assistant", "content": []})
        text = {"text": "", "annotations": [], "logprobs": []}
        part = {"type": kind, **({"refusal": ""} if kind == "refusal" else text)}
        self.items[-1]["content"].append(part)
        yield self._event("content_part.added", content_index=0, part=part)

    def _begin(self, prefix: str, item: dict[str, Any]) -> Iterator[ResponseEvent]:
        self.items.append({"id": f"{prefix}_{self._id}{len(self.items)}", "status": "in_progress", **item})
        self._is_open = True
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": self.items[-1]}

    def _close_part(self, part: dict[str, Any]) -> Iterator[ResponseEvent]:
        if self._logprobs and part["type"] == "output_text":
            yield from self._text("", "output_text")
        said = {name: part[name] for name in ("text", "logprobs", "refusal") if name in part}
        yield self._event(f"{part['type']}.done", content_index=0, **said)
        yield self._event("content_part.done", content_index=0, part=part)

    def _event(self, name: str, **fields: Any) -> ResponseEvent:
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {"type": f"response.{name}", **place, **fields}
