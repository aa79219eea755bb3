"""From a dialog to token ids: the chat formats.

Nothing that a person types becomes a control token, in any format and in any role. A format yields pieces: an
int is a control token that the format itself places, a str is text, encoded as plain text however much it
looks like a control token. Pieces of text that touch are encoded as one, so the text between two control
tokens is split as if it stood alone; with sentencepiece each has its own leading space, as in Meta's code.
"""

from __future__ import annotations

import json
import re
import threading
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from heapq import nlargest
from itertools import groupby
from pathlib import Path
from types import GeneratorType
from typing import Any, ClassVar, Literal, NoReturn, TypedDict

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from llama.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant", "tool"]


class Message(TypedDict):
    """One turn of a dialog. Keys other than these two are ignored."""

    role: Role
    content: str


Dialog = list[Message]
Piece = str | int  # text, to be encoded as plain text | the id of a control token

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
SPECIAL_TAGS = [B_INST, E_INST, "<<SYS>>", "<</SYS>>"]
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."

DEFAULT_SYSTEM_PROMPT = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
    "safe. Please ensure that your responses are socially unbiased and positive in nature. If a question does "
    "not make any sense, or is not factually coherent, explain why instead of answering something not correct. "
    "If you don't know the answer to a question, please don't share false information."
)


class DialogError(ValueError, AssertionError):
    """The dialog does not suit its format. (An AssertionError too, because the reference raises that.)"""


class ChatFormatError(ValueError):
    """The chat format cannot be used: unknown, not for this vocabulary, or a template that fails."""


class ChatFormat(ABC):
    """One way to write a dialog as token ids, for one tokenizer.

    A new format is a subclass with `write` and a row in FORMATS. `needs` names the control tokens without
    which it cannot be used, `ends` those that end an answer, where the vocabulary has them, `stop` the text
    that does, `tags` the plain text that marks turns and that content may therefore not hold.
    """

    name: ClassVar[str]
    roles: ClassVar[tuple[str, ...]] = ("system", "user", "assistant")
    system_first: ClassVar[bool] = False  # a system message is taken only as the first
    needs: ClassVar[tuple[str, ...]] = ()
    needs_eos: ClassVar[bool] = False
    ends: ClassVar[tuple[str, ...]] = ()
    stop: ClassVar[tuple[str, ...]] = ()
    tags: Sequence[str] = ()

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises ChatFormatError where the vocabulary lacks a control token that the format needs."""
        self.tokenizer = tokenizer
        self.control = tokenizer.special_tokens
        self.names = {token: text for text, token in self.control.items()}
        self.bos = (tokenizer.bos_id,) if tokenizer.add_bos else ()  # what begins a text
        self.eos = tokenizer.eos_id
        missing = [token for token in self.needs if token not in self.control]
        if self.needs_eos and self.eos < 0:
            missing.append("an end-of-text token")
        if missing:
            raise ChatFormatError(
                f"chat format {self.name} needs {', '.join(missing)}, which this model's vocabulary does not "
                f"have; give another of {', '.join(FORMATS)}, or none"
            )
        self.stop_ids = tokenizer.stop_ids | {self.control[end] for end in self.ends if end in self.control}

    @abstractmethod
    def write(self, dialog: Dialog) -> Iterable[Piece]:
        """The prompt of a dialog that has been checked, up to where the assistant's answer begins."""

    def encode(self, dialog: Dialog) -> list[int]:
        """The prompt's token ids. Raises DialogError."""
        tokens: list[int] = []
        for kind, same in groupby(self.pieces(dialog), key=type):
            run = list(same)
            tokens += run if kind is int else self.tokenizer.encode("".join(run), bos=False, eos=False)
        return tokens

    def text(self, dialog: Dialog) -> str:
        """The prompt for people to read, each control token as its string. Raises DialogError."""
        pieces = self.pieces(dialog)
        return "".join(p if isinstance(p, str) else self.names.get(p, f"<{p}>") for p in pieces)

    def pieces(self, dialog: Dialog) -> Iterable[Piece]:
        """The prompt as text and control tokens. Raises DialogError."""
        check_messages(dialog)
        self.check_roles(dialog)
        return self.write(dialog)

    def check_roles(self, dialog: Dialog) -> None:
        """Raises DialogError for a role that the format does not have, or not there."""
        for number, message in enumerate(dialog, 1):
            allowed = self.roles[1:] if number > 1 and self.system_first else self.roles
            if message["role"] not in allowed:
                raise DialogError(
                    f"message {number} has role {message['role']!r}; allowed: {', '.join(allowed)}"
                )

    def is_unsafe(self, dialog: Dialog) -> bool:
        """Whether any content holds one of `tags`, which the reference answers with UNSAFE_ERROR."""
        check_messages(dialog)
        return any(tag in message["content"] for message in dialog for tag in self.tags)


class Llama2Format(ChatFormat):
    """Llama 2, to the token as `chat_completion` in Meta's llama/generation.py writes it; tags are plain text.

    `<s>[INST] <<SYS>>`, system, `<</SYS>>`, user ` [/INST] ` answer ` </s><s>[INST] ` user ` [/INST]`.
    """

    name = "llama2"
    needs_eos = True
    tags = SPECIAL_TAGS

    def check_roles(self, dialog: Dialog) -> None:
        """Raises DialogError in the reference's words."""
        turns = split_system(dialog)[1]
        if any(turn["role"] != ("user", "assistant")[place % 2] for place, turn in enumerate(turns)):
            raise DialogError(
                "model only supports 'system', 'user' and 'assistant' roles, "
                "starting with 'system', then 'user' and alternating (u/a/u/a/u...)"
            )
        if dialog[-1]["role"] != "user":
            raise DialogError(f"Last message must be from user, got {dialog[-1]['role']}")

    def write(self, dialog: Dialog) -> Iterator[Piece]:
        system, turns = split_system(dialog)
        contents = [turn["content"] for turn in turns]
        if system is not None:
            contents[0] = B_SYS + system + E_SYS + contents[0]
        for user, answer in zip(contents[::2], contents[1::2], strict=False):  # the last has no answer yet
            yield from self.bos
            yield f"{B_INST} {user.strip()} {E_INST} {answer.strip()} "
            yield self.eos
        yield from self.bos
        yield f"{B_INST} {contents[-1].strip()} {E_INST}"


class Llama3Format(ChatFormat):
    """Llama 3 and later as Meta's llama3/tokenizer.py: content stripped, roles in any order.

    llama-models' ChatFormat is the same, except that it leaves content as it is.
    """

    name = "llama3"
    roles = ("system", "user", "assistant", "tool")
    needs = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    ends = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")

    def write(self, dialog: Dialog) -> Iterator[Piece]:
        begin, start, end, eot = (self.control[token] for token in self.needs)
        yield begin
        for message in dialog:
            role = "ipython" if message["role"] == "tool" else message["role"]
            yield from (start, role, end, "\n\n", message["content"].strip(), eot)
        yield from (start, "assistant", end, "\n\n")


class ChatMLFormat(ChatFormat):
    """ChatML: `<|im_start|>role`, newline, content as it is, `<|im_end|>`, newline.

    Some models' templates put in a system message where the dialog has none (SmolLM2's does). This format
    adds nothing, and equals such a template for every dialog that begins with a system message.
    """

    name = "chatml"
    roles = ("system", "user", "assistant", "tool")
    needs = ("<|im_start|>", "<|im_end|>")
    ends = ("<|im_end|>",)

    def write(self, dialog: Dialog) -> Iterator[Piece]:
        start, end = (self.control[token] for token in self.needs)
        if self.bos != (start,):
            yield from self.bos
        for message in dialog:
            yield from (start, f"{message['role']}\n{message['content']}", end, "\n")
        yield from (start, "assistant\n")


class AtomFormat(ChatFormat):
    """Atom (Llama2-Chinese): `<s>Human: user`, newline, `</s><s>Assistant: `."""

    name = "atom"
    needs_eos = True
    stop = ("Human:",)
    LABELS: ClassVar[dict[str, str]] = {"system": "System", "user": "Human", "assistant": "Assistant"}

    def write(self, dialog: Dialog) -> Iterator[Piece]:
        for message in dialog:
            yield from self.bos
            yield f"{self.LABELS[message['role']]}: {message['content'].strip()}\n"
            yield self.eos
        yield from self.bos
        yield "Assistant: "


class AlpacaFormat(ChatFormat):
    """Stanford Alpaca's instruction prompt, over several turns; a system message replaces its preamble."""

    name = "alpaca"
    needs_eos = True
    system_first = True
    stop = ("### Instruction:",)
    PREAMBLE: ClassVar[str] = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
    )

    def write(self, dialog: Dialog) -> Iterator[Piece]:
        system, turns = split_system(dialog)
        yield from self.bos
        yield f"{(self.PREAMBLE if system is None else system).strip()}\n\n"
        for turn in turns:
            if turn["role"] == "user":
                yield f"### Instruction:\n{turn['content'].strip()}\n\n"
            else:
                yield from (f"### Response:\n{turn['content'].strip()}", self.eos, "\n\n")
        yield "### Response:\n"


class VicunaFormat(ChatFormat):
    """Vicuna 1.1 and later as FastChat writes it; a system message replaces its preamble."""

    name = "vicuna"
    needs_eos = True
    system_first = True
    stop = ("USER:",)
    PREAMBLE: ClassVar[str] = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )

    def write(self, dialog: Dialog) -> Iterator[Piece]:
        system, turns = split_system(dialog)
        yield from self.bos
        yield f"{(self.PREAMBLE if system is None else system).strip()} "
        for turn in turns:
            if turn["role"] == "user":
                yield f"USER: {turn['content'].strip()} "
            else:
                yield from (f"ASSISTANT: {turn['content'].strip()}", self.eos)
        yield "ASSISTANT:"


FORMATS: dict[str, type[ChatFormat]] = {
    kind.name: kind
    for kind in (Llama2Format, Llama3Format, ChatMLFormat, AtomFormat, AlpacaFormat, VicunaFormat)
}


class JinjaFormat(ChatFormat):
    """A Jinja chat template, rendered as transformers does, except that typed control strings stay text.

    First those characters of content that occur in control strings are hidden: replaced, before rendering, by
    private code points that occur nowhere else. However the template trims, joins or wraps content, a control
    string in the result is then the template's own. (Whitespace is not hidden, for `trim` to find it.)

    Templates may look into content (`content.split("</think>")`, `content | upper`), so it is rendered again
    as it is, but with a private code point before each control string in it. Where the control tokens without
    that mark are the very same as before, this is the prompt; where they are not, the first one is.
    """

    name = "jinja"
    roles = ("system", "user", "assistant", "tool")

    def __init__(self, tokenizer: Tokenizer, template: str, source: str = "the chat template") -> None:
        """`source` names the template in messages. Raises ChatFormatError if it cannot be compiled."""
        super().__init__(tokenizer)
        self.source = source
        if all(tag in template for tag in SPECIAL_TAGS):
            self.tags = SPECIAL_TAGS
        controls = sorted((text for text in self.control if text.strip()), key=len, reverse=True)
        self._controls = re.compile(f"({'|'.join(map(re.escape, controls)) or '(?!)'})")
        self._characters = sorted(char for char in set("".join(controls)) if not char.isspace())
        self._used = {*template, *self._characters}
        self._variables = {
            "add_generation_prompt": True,
            "bos_token": self.names.get(tokenizer.bos_id, ""),
            "eos_token": self.names.get(tokenizer.eos_id, ""),
            "tools": None,
            "documents": None,
        }
        self._sandbox = Sandbox()
        self._lock = threading.Lock()  # the sandbox accounts for one rendering at a time
        self._template = self._guarded(self._sandbox.from_string, template)

    def write(self, dialog: Dialog) -> list[Piece]:
        hidden, marked = self._render(dialog, self._characters), self._render(dialog, [])
        own, same = ([piece for piece in way if isinstance(piece, int)] for way in (hidden, marked))
        pieces = marked if own == same else hidden
        return pieces if tuple(pieces[:1]) == self.bos else [*self.bos, *pieces]

    def _render(self, dialog: Dialog, characters: list[str]) -> list[Piece]:
        """The rendered prompt, cut at its control tokens, with these characters of content hidden."""
        used = self._used.union(*(message["content"] for message in dialog))
        free = (code for code in range(0xF0000, 0x10FFFE) if chr(code) not in used)
        show = dict(zip(free, ["", *characters], strict=False))
        if len(show) <= len(characters):
            raise DialogError("the dialog uses up Unicode's private code points; take some out")
        mark = chr(next(iter(show)))
        hide = {ord(character): code for code, character in show.items() if character}
        messages = [
            {"role": m["role"], "content": self._controls.sub(mark + r"\1", m["content"].translate(hide))}
            for m in dialog
        ]
        with self._lock:
            self._sandbox.allow(sum(len(message["content"]) for message in dialog))
            text = self._guarded(self._template.render, {"messages": messages, **self._variables})
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
            line = f"line {error.lineno}: " if getattr(error, "lineno", None) else ""
            raise ChatFormatError(
                f"{self.source} fails: {line}{one_line(error) or type(error).__name__}; "
                f"give chat_format, one of {', '.join(FORMATS)}, or a Jinja file"
            ) from error


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, with bounds on what a rendering may do.

    Templates come out of model files, which are not trusted: they reach nothing of Python's, and each loop
    step, call, filter and operator draws on a budget of characters, so that nothing runs or grows without end.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    BUDGET, PER_CHARACTER, STEP = 1 << 24, 256, 256

    def __init__(self) -> None:
        extensions = [GenerationBlock, LoopControlExtension]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.allow(0)
        del self.filters["format"], self.filters["random"]
        self.filters = {name: self._metered(function) for name, function in self.filters.items()}
        self.filters |= {"tojson": self._metered(to_json), "each": self._each}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": refuse,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }

    def allow(self, num_characters: int) -> None:
        """Begin a rendering of so many characters of content."""
        self.left = self.BUDGET + self.PER_CHARACTER * num_characters

    def from_string(self, source: str, *args: Any, **kwargs: Any) -> Any:
        """As jinja2, with loops and `~` put under the meter."""
        return super().from_string(Meter().visit(self.parse(source)), *args, **kwargs)

    def concat(self, parts: Iterable[str]) -> str:
        """How templates, macros and blocks join what they write."""
        return "".join(self._each(parts))

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call."""
        self._check(getattr(function, "__self__", None), *args, *kwargs.values())
        return self._pay(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Every operator in `intercepted_binops`."""
        if operator == "%" and isinstance(left, str):
            check_widths(left)
        self._check(left, right)
        return self._pay(super().call_binop(context, operator, left, right))

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Jinja would give an undefined value, which prints as nothing."""
        raise SecurityError(f"attribute {attribute!r} of a {type(obj).__name__} is not allowed")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """What stands for `text.format`, if the attribute `value` is that."""
        if (safe_format := super().wrap_str_format(value)) is not None:
            check_widths(value.__self__)
        return safe_format

    def _metered(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # and with it jinja2's mark of what to pass first
        def metered(*args: Any, **kwargs: Any) -> Any:
            self._check(*args, *kwargs.values())
            return self._pay(function(*args, **kwargs))

        return metered

    def _check(self, *values: Any) -> None:
        """Before it is done: no operation gives more than its two largest operands multiplied."""
        largest, second = nlargest(2, [1, 1, *map(_size, values)])
        if largest * second > self.left:
            raise SecurityError("it makes a value larger than any prompt")

    def _pay(self, value: Any) -> Any:
        if isinstance(value, GeneratorType):
            return list(self._each(value))
        self._spend(_size(value))
        return value

    def _each(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._spend(_size(value) if isinstance(value, str) else 0)
            yield value

    def _spend(self, size: int) -> None:
        self.left -= size + self.STEP
        if self.left < 0:
            raise SecurityError("it runs longer or writes more than any prompt")


def _size(value: Any) -> int:
    if isinstance(value, list | tuple):
        return sum(len(item) if isinstance(item, str) else 1 for item in value)
    if isinstance(value, int):
        return abs(value)
    return len(value) if isinstance(value, str | dict | range) else 1


class Meter(NodeTransformer):
    """Rewrites `for x in y` as `for x in y | each` and `a ~ b` as `[a, b] | join`."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "each", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "join", [], [], None, None, lineno=node.lineno)


class GenerationBlock(Extension):
    """`{% generation %}` to `{% endgeneration %}` marks answers for training; here it is only its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The body, in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def check_widths(form: str) -> None:
    """Raises SecurityError for a format that could make a short value long."""
    if re.search(r"[*]|[0-9]{4}", form):
        raise SecurityError("a format may not have a width of more than three digits")


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Plain JSON; jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def refuse(message: object) -> NoReturn:
    """Templates' raise_exception."""
    raise DialogError(f"the model's chat template refuses this dialog: {one_line(message)}")


def one_line(message: object) -> str:
    """What a template or jinja2 says, in 200 characters at most."""
    return " ".join(str(message).split())[:200]


def choose_format(chat_format: str | ChatFormat | None, tokenizer: Tokenizer) -> ChatFormat:
    """The chat format for a tokenizer.

    `chat_format` (a name in FORMATS, the path of a Jinja file, or one already chosen) comes first, then the
    model's own template, then Llama 2 for sentencepiece files; for another vocabulary, the format whose control
    tokens it holds. Raises ChatFormatError.
    """
    if isinstance(chat_format, ChatFormat):
        return chat_format
    if chat_format in FORMATS:
        return FORMATS[chat_format](tokenizer)
    if chat_format is not None:
        return JinjaFormat(tokenizer, read_template(chat_format), f"chat template {chat_format}")
    if tokenizer.chat_template is not None:
        return JinjaFormat(tokenizer, tokenizer.chat_template, "the model's own chat template")
    if tokenizer.kind != "sentencepiece":
        for kind in (Llama3Format, ChatMLFormat):
            if all(token in tokenizer.special_tokens for token in kind.needs):
                return kind(tokenizer)
    return Llama2Format(tokenizer)


def read_template(path: str) -> str:
    """A Jinja file's text. Raises ChatFormatError."""
    if not Path(path).is_file():
        raise ChatFormatError(
            f"unknown chat format {path!r}; give one of {', '.join(FORMATS)}, or the path of a Jinja file"
        )
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ChatFormatError(f"{path} is not a chat template: it is not text in UTF-8") from error


def check_messages(dialog: Dialog) -> None:
    """Raises DialogError unless `dialog` is one message or more, whose content is text."""
    if not dialog:
        raise DialogError("the dialog is empty; give at least one message, from the user")
    for number, message in enumerate(dialog, 1):
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise DialogError(f"message {number} is not of the form {{'role': text, 'content': text}}")


def split_system(dialog: Dialog) -> tuple[str | None, Dialog]:
    """The content of the system message at the start, None where there is none, and the other messages."""
    if dialog and dialog[0]["role"] == "system":
        return dialog[0]["content"], dialog[1:]
    return None, dialog


def with_system(dialog: Dialog, text: str) -> Dialog:
    """A new dialog that begins with this system message instead of its own; empty text: with none."""
    turns = split_system(dialog)[1]
    return [{"role": "system", "content": text}, *turns] if text else list(turns)


@dataclass(frozen=True)
class FormattedDialog:
    """A prompt to look at: `text` shows each control token as its string, `tokens` are the ids."""

    text: str
    tokens: list[int]


def format_dialog(
    dialog: Dialog, tokenizer: Tokenizer, chat_format: str | ChatFormat | None = None
) -> FormattedDialog:
    """What the model is given for a dialog, in the format that `choose_format` chooses. Raises DialogError."""
    chosen = choose_format(chat_format, tokenizer)
    return FormattedDialog(chosen.text(dialog), chosen.encode(dialog))


def fit_dialog(
    dialog: Dialog, max_tokens: int, tokenizer: Tokenizer, chat_format: str | ChatFormat | None = None
) -> Dialog:
    """A new dialog, without as many of the oldest turns as it takes for the prompt to have `max_tokens` or fewer.

    A turn is a user's message and all up to the next one; a system message at the start stays. Raises
    DialogError where even the last turn is too long.
    """
    check_messages(dialog)
    chosen = choose_format(chat_format, tokenizer)
    start = len(dialog) - len(split_system(dialog)[1])
    later_turns = [i for i in range(start + 1, len(dialog)) if dialog[i]["role"] == "user"]
    rests = [dialog, *(dialog[:start] + dialog[i:] for i in later_turns)]
    first = bisect_left(rests, True, key=lambda rest: len(chosen.encode(rest)) <= max_tokens)
    if first == len(rests):
        num_tokens = len(chosen.encode(rests[-1]))
        raise DialogError(
            f"the last message takes {num_tokens} tokens with its format, only {max_tokens} fit; shorten it"
        )
    return list(rests[first])
