"""Chat templates: programs in Jinja that come with a model and write its prompts."""

from __future__ import annotations

import re
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from llama.chat.formats import FORMATS, SPECIAL_TAGS, ChatFormat, ChatFormatError, Segment
from llama.chat.prompt import DialogError, Prompt, free_characters, one_line

if TYPE_CHECKING:  # which needs torch
    from llama.chat.sandbox import Sandbox
    from llama.tokenizer import Tokenizer


class JinjaFormat(ChatFormat):
    """A Jinja chat template, rendered as transformers does, except that typed control strings stay text.

    First the text that was given (messages, tools, options) is hidden: those of its characters that occur in
    control strings are replaced, before rendering, by private code points that occur nowhere else. However the
    template trims, joins or wraps it, a control string in the result is then the template's own. (Whitespace is
    not hidden, for `trim` to find it; keys of tools and options are not, for templates to look them up.)

    Templates may look into text (`content.split("</think>")`, `content | upper`), so it is rendered again as it
    is, but with a private code point before each control string in it. Where the control tokens without that
    mark are the very same as before, this is the prompt; where they are not, the first one is.
    """

    name = "jinja"
    roles = ("system", "user", "assistant", "tool")
    remedy = f"give chat_format, one of {', '.join(FORMATS)}, or a Jinja file"

    def __init__(self, tokenizer: Tokenizer, template: str, source: str = "the chat template") -> None:
        """`source` names the template in messages. Raises ChatFormatError if it cannot be compiled."""
        super().__init__(tokenizer)
        self.source = source
        self.template = template
        self.takes_tools = re.search(r"\btools\b", template) is not None
        if all(tag in template for tag in SPECIAL_TAGS):
            self.tags = SPECIAL_TAGS
        controls = sorted((text for text in self.control if text.strip()), key=len, reverse=True)
        self._controls = re.compile(f"({'|'.join(map(re.escape, controls)) or '(?!)'})")
        self._characters = sorted(char for char in set("".join(controls)) if not char.isspace())
        self._used = {*template, *self._characters}
        self._variables = {
            "bos_token": self.names.get(tokenizer.bos_id, ""),
            "eos_token": self.names.get(tokenizer.eos_id, ""),
            "documents": None,
        }
        self._sandbox = self._new_sandbox()
        self._lock = threading.Lock()  # the sandbox accounts for one rendering at a time
        self._template = self._guarded(self._sandbox.from_string, template)

    def _new_sandbox(self) -> Sandbox:
        from llama.chat.sandbox import Sandbox  # jinja2, for models that need it

        return Sandbox()

    def write(self, prompt: Prompt) -> list[Segment]:
        hidden, marked = self._render(prompt, self._characters), self._render(prompt, [])
        own, same = ([segment for segment in way if isinstance(segment, int)] for way in (hidden, marked))
        segments = marked if own == same else hidden
        return segments if tuple(segments[:1]) == self.bos else [*self.bos, *segments]

    def _render(self, prompt: Prompt, characters: list[str]) -> list[Segment]:
        """The rendered prompt, cut at its control tokens, with these characters of given text hidden."""
        said = [{key: value for key, value in message.items() if key != "role"} for message in prompt.messages]
        given = [said, list(prompt.tools) or None, dict(prompt.options)]
        texts = list(_texts(given))
        free = free_characters([*texts, *self._used])
        show = {ord(next(free)): character for character in ["", *characters]}
        mark = chr(next(iter(show)))
        hide = {ord(character): code for code, character in show.items() if character}
        said, tools, options = _each_text(
            given,
            lambda text: self._controls.sub(mark + r"\1", text.translate(hide)),
            lambda key: self._controls.sub(mark + r"\1", key),  # templates look keys up
        )
        messages = [{"role": message["role"], **m} for message, m in zip(prompt.messages, said, strict=True)]
        variables = self._variables | {"add_generation_prompt": not prompt.continues} | options
        variables |= {"messages": messages, "tools": tools}
        with self._lock:
            self._sandbox.allow(sum(map(len, texts)))
            text = self._guarded(self._template.render, variables)
        parts = self._controls.split(text)  # text and control strings by turns
        return [
            self.control[part] if i % 2 and not parts[i - 1].endswith(mark) else part.translate(show)
            for i, part in enumerate(parts)
            if part
        ]

    def _guarded(self, function: Callable[..., Any], argument: Any) -> Any:
        try:
            return function(argument)
        except DialogError:
            raise
        except Exception as error:  # a template's code can raise anything
            line = line_of(error)
            where = f"line {line}: " if line else ""
            raise ChatFormatError(
                f"{self.source} fails: {where}{one_line(error) or type(error).__name__}; {self.remedy}"
            ) from error


class PastedFormat(JinjaFormat):
    """A template that came with a request, of somebody whom nobody knows: it gets less room.

    An answer ends with what the template writes behind one: a control token, or a text.
    """

    remedy = f"mend it, or give one of {', '.join(FORMATS)}"

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        super().__init__(tokenizer, template, "the template")
        said, next_said = "Zq7answer", "Zq7question"  # no template says so itself
        dialog = [("user", "hello"), ("assistant", said), ("user", next_said)]
        try:
            segments = list(self.write(Prompt(tuple({"role": role, "content": text} for role, text in dialog))))
        except (DialogError, ChatFormatError):  # it takes no such dialog, and tells so when it is used
            return
        place = next((i for i, part in enumerate(segments) if isinstance(part, str) and said in part), None)
        if place is None:
            return
        behind = segments[place].rpartition(said)[2].partition(next_said)[0]
        if behind.strip():
            self.stop = (behind.rstrip(),)
        elif isinstance(end := [*segments, ""][place + 1], int):
            self.stop_ids |= {end}

    def _new_sandbox(self) -> Sandbox:
        from llama.chat.sandbox import Sandbox

        return Sandbox(written_per_character=16)


def line_of(error: Exception) -> int | None:
    """The template's line where an error arose."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return getattr(error, "lineno", None) or (lines[-1] if lines else None)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a tree of JSON, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (key, *_texts(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _each_text(value: Any, change: Callable[[str], str], change_key: Callable[[str], str]) -> Any:
    """A tree of JSON with every text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change_key(key): _each_text(item, change, change_key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_each_text(item, change, change_key) for item in value]
    return value
