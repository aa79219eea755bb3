"""From a dialog to token ids and back: the chat formats."""

from llama.chat.fitting import FormattedDialog, fit_dialog, fit_prompt, format_dialog, shortened
from llama.chat.formats import (
    B_INST,
    B_SYS,
    DEFAULT_SYSTEM_PROMPT,
    E_INST,
    E_SYS,
    FORMATS,
    SPECIAL_TAGS,
    UNSAFE_ERROR,
    ChatFormat,
    ChatFormatError,
)
from llama.chat.prompt import Dialog, DialogError, Message, Prompt, Role, with_system
from llama.chat.selection import choose_format, given_format, usable_formats
from llama.chat.template import JinjaFormat
from llama.chat.tools import Spoken, ToolError, ToolParser, ToolUse

__all__ = [
    "B_INST",
    "B_SYS",
    "DEFAULT_SYSTEM_PROMPT",
    "E_INST",
    "E_SYS",
    "FORMATS",
    "SPECIAL_TAGS",
    "UNSAFE_ERROR",
    "ChatFormat",
    "ChatFormatError",
    "Dialog",
    "DialogError",
    "FormattedDialog",
    "JinjaFormat",
    "Message",
    "Prompt",
    "Role",
    "Spoken",
    "ToolError",
    "ToolParser",
    "ToolUse",
    "choose_format",
    "fit_dialog",
    "fit_prompt",
    "format_dialog",
    "given_format",
    "shortened",
    "usable_formats",
    "with_system",
]
