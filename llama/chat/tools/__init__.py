"""Tools: how models are told of them, how they call them, and how that is read while it comes."""

from llama.chat.tools.calls import CallPiece, Piece, Spoken, ToolCall
from llama.chat.tools.formats import TOOL_FORMATS, ToolFormat, choose_tool_format
from llama.chat.tools.parser import ToolParser, parse_answer

__all__ = [
    "TOOL_FORMATS",
    "CallPiece",
    "Piece",
    "Spoken",
    "ToolCall",
    "ToolFormat",
    "ToolParser",
    "choose_tool_format",
    "parse_answer",
]
