"""Taking an answer apart while it comes: text for people, and calls of tools."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from llama.chat.tools.calls import AnswerPiece, CallPiece, Spoken, new_call_id
from llama.chat.tools.scanning import BLANK, NoCall, Reader

if TYPE_CHECKING:
    from llama.chat.tools.formats import ToolFormat


class ToolParser:
    """One answer, in whatever pieces it comes: they make no difference to what is found in them.

    What turns out to be no call is text, to the letter; so is a call of a tool that nobody has. White space beside
    calls is left out. A call that is cut off has the arguments that there are.
    """

    def __init__(self, format: ToolFormat, names: Collection[str], controls: Mapping[int, str] = {}) -> None:
        """`names` are those of the tools, `controls` the texts of control tokens that may mark calls, by their ids."""
        self._format = format
        self._names = frozenset(names)
        self._controls = controls
        self._found: list[AnswerPiece] = []
        self._held = ""  # of text: white space that calls may follow, and what may become a mark
        self._has_spoken = False
        self._is_behind_calls = False
        self._reader: Reader | None = None  # of calls, behind a mark
        self._raw = ""  # what is text if it is no call
        self._num_marked = 0  # how much of that is certainly text then
        self._num_calls = 0
        self._num_before = 0  # calls in front of the mark
        self._is_open = False  # a call has begun and not ended

    @property
    def has_calls(self) -> bool:
        return self._num_calls > 0

    def push(self, text: str, token: int | None = None) -> list[AnswerPiece]:
        """What has become certain by the text that a token brought. What a control token marks stands behind it."""
        self._read(text + self._controls.get(token, ""))
        return self._taken()

    def end(self) -> list[AnswerPiece]:
        """What follows from there being no more."""
        while self._reader is not None:
            if self._num_calls > self._num_before:
                self._close()
            else:
                self._read(self._give_back())
        self._say(self._held)
        self._held = ""
        return self._taken()

    # ---- what readers tell

    def begin(self, name: str) -> None:
        if name not in self._names:
            raise NoCall
        self._found.append(CallPiece(self._num_calls, name, id=new_call_id(self._format.id_length)))
        self._num_calls += 1
        self._is_open = True
        self._raw = ""

    def more(self, arguments: str) -> None:
        self._found.append(CallPiece(self._num_calls - 1, arguments=arguments))

    def finish(self) -> None:
        self._is_open = False

    # ---- how it is done

    def _taken(self) -> list[AnswerPiece]:
        found, self._found = self._found, []
        return merged(found)

    def _say(self, text: str) -> None:
        if text:
            self._found.append(text)
            self._has_spoken = True

    def _read(self, text: str) -> None:
        while text:
            text = self._read_text(text) if self._reader is None else self._read_calls(text)

    def _read_text(self, text: str) -> str:
        """Says what calls no tool, up to where calls may begin; -> what is left to read."""
        self._held += text
        if self._is_behind_calls:
            self._held = self._held.lstrip(BLANK)
        if not self._held:
            return ""
        self._is_behind_calls = False
        if self._format.bare and not self._has_spoken and not self._num_calls:
            begun = self._held.lstrip(BLANK)
            if not begun:
                return ""
            if begun[0] in self._format.bare:
                return self._open("", self._held[: -len(begun)], begun)
        found = [(at, mark) for mark in self._format.marks if (at := self._held.find(mark)) >= 0]
        end, mark = min(found, default=(len(self._held), ""))
        if not mark:
            end -= max((overlap(self._held, mark) for mark in self._format.marks), default=0)
        said = self._held[:end].rstrip(BLANK)
        self._say(said)
        if mark:
            return self._open(mark, self._held[len(said) : end], self._held[end + len(mark) :])
        self._held = self._held[len(said) :]
        return ""

    def _open(self, mark: str, blank: str, rest: str) -> str:
        """Begins to read calls; -> what is left to read."""
        self._held = ""
        self._raw = blank + mark
        self._num_marked = len(blank) + max(1, len(mark))
        self._num_before = self._num_calls
        self._reader = self._format.read(mark, self)
        next(self._reader)
        return rest

    def _read_calls(self, text: str) -> str:
        """Reads calls to their end; -> what is left to read."""
        for place, char in enumerate(text):
            was_open = self._is_open
            if not was_open:
                self._raw += char
            try:
                self._reader.send(char)
            except StopIteration:
                self._close()
                return text[place + 1 :]
            except NoCall:
                if not was_open:
                    return self._give_back() + text[place + 1 :]
                self._close()  # the arguments end in front of what cannot belong to them
                return text[place:]
        return ""

    def _close(self) -> None:
        self._reader, self._raw, self._is_open = None, "", False
        self._is_behind_calls = True

    def _give_back(self) -> str:
        """Ends reading calls where there are no more; -> what was read of one, to be read as text."""
        raw, self._reader = self._raw, None
        if self._num_calls > self._num_before:
            self._close()
            return raw
        self._say(raw[: self._num_marked])
        return raw[self._num_marked :]


def parse_answer(format: ToolFormat, names: Collection[str], text: str) -> Spoken:
    """A whole answer taken apart."""
    parser = ToolParser(format, names)
    return Spoken.of([*parser.push(text), *parser.end()])


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of the text may be the beginning of the mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def merged(pieces: list[AnswerPiece]) -> list[AnswerPiece]:
    """Neighbours as one, except that a name stands alone."""
    found: list[AnswerPiece] = []
    for piece in pieces:
        last = found[-1] if found else None
        if isinstance(piece, str) and isinstance(last, str):
            found[-1] = last + piece
        elif isinstance(piece, CallPiece) and isinstance(last, CallPiece) and piece.name is None and last.name is None:
            found[-1] = CallPiece(piece.index, arguments=last.arguments + piece.arguments)
        else:
            found.append(piece)
    return found
