"""The chat formats: one way each to write a prompt as token ids.

Nothing that a person types becomes a control token, in any format and in any role. A format yields segments: an
int is a control token that the format itself places, a str is text, encoded as plain text however much it
looks like a control token. Texts that touch are encoded as one, so the text between two control
tokens is split as if it stood alone; with sentencepiece each has its own leading space, as in Meta's code.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from llama.chat.prompt import Dialog, DialogError, Message, Prompt, free_characters, split_system
from llama.chat.tools import Spoken, ToolFormat, ToolParser, choose_tool_format
from llama.tool_call import ToolCall

if TYPE_CHECKING:  # which needs torch
    from llama.tokenizer import Tokenizer

Segment = str | int  # text, to be encoded as plain text | the id of a control token

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
    template: str | None = None  # the model's own, in Jinja
    takes_tools: bool = False  # it writes descriptions, calls and results of tools itself
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
    def write(self, prompt: Prompt) -> Iterable[Segment]:
        """The segments of a prompt whose roles have been checked, up to where the assistant's answer begins.

        Where the answer goes on from the last message, that is written like any other: what is behind its text is cut.
        """

    def encode(self, prompt: Prompt | Dialog) -> list[int]:
        """The prompt's token ids. Raises DialogError."""
        return self.tokenizer.encode_pieces(self._segments(prompt))

    def text(self, prompt: Prompt | Dialog) -> str:
        """The prompt for people to read, each control token as its string. Raises DialogError."""
        segments = self._segments(prompt)
        return "".join(p if isinstance(p, str) else self.names.get(p, f"<{p}>") for p in segments)

    def parse(self, text: str) -> Message:
        """What the model answered, as the dialog's next message."""
        return {"role": "assistant", "content": text}

    @cached_property
    def tool_format(self) -> ToolFormat:
        """How the model calls tools."""
        return choose_tool_format(self.template, self.control)

    def spoken(self, text: str, tokens: Sequence[int], names: Sequence[str]) -> Spoken:
        """An answer taken apart: what it says, and its calls of the tools of these names."""
        parser = ToolParser(self.tool_format, names, self.tool_format.controls)
        pieces = [piece for shown, token in self.retold(text, tokens) for piece in parser.push(shown, token)]
        return Spoken.of([*pieces, *parser.end()])

    def retold(self, text: str, tokens: Sequence[int]) -> Iterator[tuple[str, int | None]]:
        """An answer as it came: what each token showed, a control token nothing; and what is left, without a token."""
        from llama.tokenizer import StreamDecoder

        decoder, room = StreamDecoder(self.tokenizer), len(text)
        for token in tokens:
            shown = decoder.push(token)[:room] if token < self.tokenizer.n_words else ""
            room -= len(shown)
            yield shown, token
        yield text[len(text) - room :], None

    def validate_roles(self, messages: Sequence[Message]) -> None:
        """Raises DialogError for a role that the format does not have, or not there."""
        for number, message in enumerate(messages, 1):
            allowed = self.roles[1:] if number > 1 and self.system_first else self.roles
            if message["role"] not in allowed:
                raise DialogError(f"message {number} has role {message['role']!r}; allowed: {', '.join(allowed)}")

    def is_unsafe(self, prompt: Prompt | Dialog) -> bool:
        """Whether any content holds one of `tags`, which the reference answers with UNSAFE_ERROR."""
        return any(tag in message["content"] for message in Prompt.of(prompt).messages for tag in self.tags)

    def _segments(self, prompt: Prompt | Dialog) -> Iterable[Segment]:
        prompt = Prompt.of(prompt)
        if not self.takes_tools:
            prompt = self._with_tools_as_text(prompt)
        *before, last = prompt.messages
        self.validate_roles(before if prompt.continues else prompt.messages)
        if not prompt.continues:
            return self.write(prompt)
        if not last["content"]:  # of which nothing is there yet
            return self.write(replace(prompt, messages=tuple(before), continues=False))
        return self._write_continued(prompt)

    def _with_tools_as_text(self, prompt: Prompt) -> Prompt:
        """The same without tools: the system message describes them, calls and results are what messages say."""
        if not prompt.tools and not any("tool_calls" in message for message in prompt.messages):
            return prompt
        system, turns = split_system(prompt.messages)
        is_taken = "tool" in self.roles and self.template is None  # nobody knows which roles a template takes
        told: list[Message] = []
        if prompt.tools:
            system = "\n\n".join(filter(None, (system, self.tool_format.instructions(prompt.tools))))
        for turn in turns:
            role, content = turn["role"], turn["content"]
            if "tool_calls" in turn:
                calls = [call["function"] for call in turn["tool_calls"]]
                written = self.tool_format.write([ToolCall(c["name"], _json(c["arguments"])) for c in calls])
                content = "\n".join(filter(None, (content, written)))
            elif role == "tool" and not is_taken:
                role, content = "user", self.tool_format.result(content)
            if told and told[-1]["role"] == role == "user":  # several results, or a result and a question
                told[-1] = {"role": role, "content": f"{told[-1]['content']}\n{content}"}
            else:
                told.append({"role": role, "content": content})
        before = () if system is None else ({"role": "system", "content": system},)
        return replace(prompt, messages=(*before, *told), tools=())

    def _write_continued(self, prompt: Prompt) -> list[Segment]:
        """What is written up to the end of the last message's text; a mark shows where, and keeps its spaces."""
        *before, last = prompt.messages
        mark = next(free_characters(message["content"] for message in prompt.messages))
        marked = {**last, "content": last["content"] + mark}
        segments = list(self.write(replace(prompt, messages=(*before, marked))))
        ends = [i for i, segment in enumerate(segments) if isinstance(segment, str) and mark in segment]
        if not ends:
            raise DialogError(f"chat format {self.name} leaves out the end of the last message: it cannot be continued")
        cut = [*segments[: ends[-1]], segments[ends[-1]].rpartition(mark)[0]]  # a template may write it before, too
        return [segment.replace(mark, "") if isinstance(segment, str) else segment for segment in cut]


class Llama2Format(ChatFormat):
    """Llama 2, to the token as `chat_completion` in Meta's llama/generation.py writes it; tags are plain text.

    `<s>[INST] <<SYS>>`, system, `<</SYS>>`, user ` [/INST] ` answer ` </s><s>[INST] ` user ` [/INST]`.
    """

    name = "llama2"
    needs_eos = True
    tags = SPECIAL_TAGS

    def validate_roles(self, messages: Sequence[Message]) -> None:
        """Raises DialogError in the reference's words."""
        turns = split_system(messages)[1]
        if any(turn["role"] != ("user", "assistant")[place % 2] for place, turn in enumerate(turns)):
            raise DialogError(
                "model only supports 'system', 'user' and 'assistant' roles, "
                "starting with 'system', then 'user' and alternating (u/a/u/a/u...)"
            )
        if messages[-1]["role"] != "user":
            raise DialogError(f"Last message must be from user, got {messages[-1]['role']}")

    def write(self, prompt: Prompt) -> Iterator[Segment]:
        system, turns = split_system(prompt.messages)
        contents = [turn["content"] for turn in turns]
        if system is not None:
            contents[0] = B_SYS + system + E_SYS + contents[0]
        for user, answer in zip(contents[::2], contents[1::2], strict=False):  # the last may have no answer yet
            yield from self.bos
            yield f"{B_INST} {user.strip()} {E_INST} {answer.strip()} "
            yield self.eos
        if not prompt.continues:
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

    def write(self, prompt: Prompt) -> Iterator[Segment]:
        begin, start, end, eot = (self.control[token] for token in self.needs)
        yield begin
        for message in prompt.messages:
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

    def write(self, prompt: Prompt) -> Iterator[Segment]:
        start, end = (self.control[token] for token in self.needs)
        if self.bos != (start,):
            yield from self.bos
        for message in prompt.messages:
            yield from (start, f"{message['role']}\n{message['content']}", end, "\n")
        yield from (start, "assistant\n")


class AtomFormat(ChatFormat):
    """Atom (Llama2-Chinese): `<s>Human: user`, newline, `</s><s>Assistant: `."""

    name = "atom"
    needs_eos = True
    stop = ("Human:",)
    LABELS: ClassVar[dict[str, str]] = {"system": "System", "user": "Human", "assistant": "Assistant"}

    def write(self, prompt: Prompt) -> Iterator[Segment]:
        for message in prompt.messages:
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
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )

    def write(self, prompt: Prompt) -> Iterator[Segment]:
        system, turns = split_system(prompt.messages)
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

    def write(self, prompt: Prompt) -> Iterator[Segment]:
        system, turns = split_system(prompt.messages)
        yield from self.bos
        yield f"{(self.PREAMBLE if system is None else system).strip()} "
        for turn in turns:
            if turn["role"] == "user":
                yield f"USER: {turn['content'].strip()} "
            else:
                yield from (f"ASSISTANT: {turn['content'].strip()}", self.eos)
        yield "ASSISTANT:"


def _json(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


FORMATS: dict[str, type[ChatFormat]] = {
    kind.name: kind for kind in (Llama2Format, Llama3Format, ChatMLFormat, AtomFormat, AlpacaFormat, VicunaFormat)
}
