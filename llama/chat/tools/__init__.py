"""Tools: how models are told of them, how they call them, and how that is read while it comes."""

from llama.chat.tools.calls import AnswerPiece, CallPiece, Spoken
from llama.chat.tools.formats import TOOL_FORMATS, ToolFormat, choose_tool_format
from llama.chat.tools.parser import ToolParser, merged, parse_answer
from llama.chat.tools.use import ToolError, ToolUse, describe
from llama.tool_call import ToolCall

__all__ = [
    "TOOL_FORMATS",
    "AnswerPiece",
    "CallPiece",
    "Spoken",
    "ToolCall",
    "ToolError",
    "ToolFormat",
    "ToolParser",
    "ToolUse",
    "choose_tool_format",
    "describe",
    "merged",
    "parse_answer",
]
