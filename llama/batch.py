"""Offline inference over a file: one request a line in, one answer a line out, in OpenAI's batch format.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 9}}

Answers are written as they are done, each with the number of its line, so that a job that was stopped goes on from
there. A line that cannot be answered becomes an error line, which the next run tries again. Of lines that are not on
their way nothing is kept but fingerprints.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from filelock import FileLock, Timeout

from llama.answer import Completion, Query
from llama.files.staging import staged
from llama.generation import Llama
from llama.service import MODEL_ENDPOINTS, Call, find_endpoint

LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}  # which some readers split lines at


@dataclass(eq=False)
class Line:
    """A line of the input on its way."""

    number: int  # counted from 1
    custom_id: str | None = None
    entry: dict[str, Any] = field(default_factory=dict)  # what stands there
    call: Call | None = None
    places: range = range(0)  # of its queries among all
    completions: list[Completion] = field(default_factory=list)


@dataclass
class Counts:
    answered: int = 0
    failed: int = 0
    skipped: int = 0  # lines that an earlier run has answered
    tokens: int = 0  # generated


class Fingerprints:
    """A set of any number of names, of which 64 bits each are kept: sorted ones, and what came since."""

    MOST_RECENT = 1 << 12

    def __init__(self) -> None:
        self._sorted = np.empty(0, dtype=np.uint64)
        self._recent: set[int] = set()

    def add(self, *name: object) -> None:
        self._recent.add(self._fingerprint(name))
        if len(self._recent) == self.MOST_RECENT:
            self._sorted = np.union1d(self._sorted, np.array(list(self._recent), dtype=np.uint64))
            self._recent.clear()

    def has(self, *name: object) -> bool:
        fingerprint = self._fingerprint(name)
        place = np.searchsorted(self._sorted, np.uint64(fingerprint))
        return fingerprint in self._recent or fingerprint in self._sorted[place : place + 1]

    def _fingerprint(self, name: tuple[object, ...]) -> int:
        return int.from_bytes(blake2b(repr(name).encode(), digest_size=8).digest())


@dataclass(frozen=True)
class LineAnswer:
    """What comes of a line: a response's body, or why there is none."""

    number: int
    custom_id: str | None
    body: dict[str, Any] | None = None
    error: str | None = None
    num_tokens: int = 0  # generated


Take = Callable[[LineAnswer], None]


class Answerer:
    """A model answering lines; `take` gets each answer as soon as it is there."""

    def __init__(self, llm: Llama, take: Take):
        self.llm = llm
        self.take = take
        self._waiting: dict[int, Line] = {}  # by the place of each of its queries

    def run(self, lines: Iterable[Line]) -> None:
        """Takes lines as the model has room for them. Returns when all are answered."""
        for completion in self.llm.run(self._queries(lines)):
            self._complete(completion)

    def _queries(self, lines: Iterable[Line]) -> Iterator[Query]:
        """What the model has to answer; lines that cannot be are refused on the spot."""
        num_queries = 0
        for line in lines:
            try:
                endpoint = find_endpoint(MODEL_ENDPOINTS, line.entry.get("url"))
                line.call = Call.open(self.llm, endpoint, line.entry.get("body"))
            except ValueError as error:
                self.take(LineAnswer(line.number, line.custom_id, error=str(error)))
                continue
            line.entry = {}
            line.places = range(num_queries, num_queries + len(line.call.queries))
            num_queries = line.places.stop
            self._waiting |= dict.fromkeys(line.places, line)
            yield from line.call.queries

    def _complete(self, completion: Completion) -> None:
        """One more completion of a line; the last one has it answered."""
        line = self._waiting[completion.place]
        line.completions.append(replace(completion, place=completion.place - line.places.start))
        if len(line.completions) < line.call.num_completions:
            return
        for place in line.places:
            del self._waiting[place]
        num_tokens = sum(len(one.tokens) for one in line.completions)
        try:
            body, error = line.call.respond(self.llm, line.completions), None
        except RuntimeError as failed:
            body, error = None, str(failed)
        self.take(LineAnswer(line.number, line.custom_id, body, error, num_tokens))


class BatchJob(ABC):
    """Requests of one file answered into another. The source "-" is standard input."""

    def __init__(self, source: str | Path, target: str | Path):
        self.source = Path(source)
        self.target = Path(target)
        self.counts = Counts()

    @abstractmethod
    def answer(self, lines: Iterable[Line], take: Take) -> None:
        """Has the lines answered; `take` gets the answers, in any order."""

    def run(self, progress: Callable[[Counts], None] | None = None) -> Counts:
        """Answers every line that is not answered yet; `progress` is told after each.

        Raises ValueError where the target holds the answers to another file, or another run is writing to it.
        """
        with locked(self.target), opened(self.source) as lines:
            done = finished_lines(self.target)
            # half a surrogate pair, which UTF-8 cannot hold, is written as JSON's escape
            with open(self.target, "a", encoding="utf-8", errors="backslashreplace") as out:

                def take(answer: LineAnswer) -> None:
                    self._write(out, answer)
                    if progress:
                        progress(self.counts)

                self.answer(self._lines(lines, done, take), take)
        return self.counts

    def _lines(self, lines: Iterable[str], done: Fingerprints, take: Take) -> Iterator[Line]:
        """Those that are to be answered; `take` is told of those that are no requests."""
        seen = Fingerprints()
        for number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            line = Line(number)
            refusal = None
            try:
                line.entry = self._parse(line, text, seen)
            except ValueError as error:
                refusal = str(error)
            if done.has(number):
                self._check_answered(line, done)
                self.counts.skipped += 1
            elif refusal is not None:
                take(LineAnswer(number, line.custom_id, error=refusal))
            else:
                yield line

    def _parse(self, line: Line, text: str, seen: Fingerprints) -> dict[str, Any]:
        """The line's object; fills the line's custom_id. Raises ValueError."""
        try:
            text.encode()
            entry = json.loads(text)
        except UnicodeEncodeError as error:
            raise ValueError(f"line {line.number} is not text in UTF-8, from character {error.start + 1} on") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {line.number} is not JSON: {error}") from error
        custom_id = entry.get("custom_id") if isinstance(entry, dict) else None
        if not isinstance(custom_id, str):
            raise ValueError(f"line {line.number} has no custom_id")
        line.custom_id = custom_id
        if seen.has(custom_id):
            raise ValueError(f"custom_id {custom_id!r} stands on an earlier line too")
        seen.add(custom_id)
        return entry

    def _check_answered(self, line: Line, done: Fingerprints) -> None:
        if done.has(line.number, line.custom_id):
            return
        with open(self.target, "rb") as answers:
            found = dict(filter(None, (read_answer(self.target, text) for text in answers)))
        raise ValueError(
            f"{self.target} answers another file: its line {line.number} is {found[line.number]!r}, "
            f"not {line.custom_id!r}; give another file"
        )

    def _write(self, out: TextIO, answer: LineAnswer) -> None:
        """One line at once, so that a job that is stopped leaves whole lines."""
        request_id = uuid.uuid4().hex
        entry = {
            "id": f"batch_req_{request_id}",
            "line": answer.number,
            "custom_id": answer.custom_id,
            "response": answer.body and {"status_code": 200, "request_id": request_id, "body": answer.body},
            "error": answer.error and {"code": "invalid_request", "message": answer.error},
        }
        text = json.dumps(entry, ensure_ascii=False, allow_nan=False)
        out.write(text.translate(LINE_ENDS) + "\n")
        out.flush()
        self.counts.tokens += answer.num_tokens
        if answer.error is None:
            self.counts.answered += 1
        else:
            self.counts.failed += 1


class Batch(BatchJob):
    """A job of one model. Under torchrun rank 0 reads and writes."""

    def __init__(self, llm: Llama, source: str | Path, target: str | Path):
        super().__init__(source, target)
        self.llm = llm

    def run(self, progress: Callable[[Counts], None] | None = None) -> Counts:
        if self.llm.rank == 0:
            return super().run(progress)
        for _ in self.llm.run(()):
            pass
        return self.counts

    def answer(self, lines: Iterable[Line], take: Take) -> None:
        Answerer(self.llm, take).run(lines)


def finished_lines(target: Path) -> Fingerprints:
    """The lines that `target` answers, by number and by number and custom_id.

    What failed, and a last line that was cut off, is taken out of the file, to be tried again.
    """
    done = Fingerprints()
    if not target.exists():
        return done
    is_whole = True
    with open(target, "rb") as answers:
        for text in answers:
            if answer := read_answer(target, text):
                done.add(answer[0])
                done.add(*answer)
            else:
                is_whole = False
    if not is_whole:
        with (
            staged(target, target.stat().st_size, is_directory=False) as staging,
            open(target, "rb") as answers,
            open(staging, "wb") as kept,
        ):
            kept.writelines(text for text in answers if read_answer(target, text))
    return done


def read_answer(target: Path, text: bytes) -> tuple[int, str] | None:
    """The line and custom_id that a line of `target` answers; None where it failed or was cut off."""
    try:
        if not text.endswith(b"\n") and text.startswith(b'{"id": "batch_req_'[: len(text)]):
            return None
        entry = json.loads(text)
        return None if entry["error"] else (entry["line"], entry["custom_id"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{target} does not hold answers of this command: give another file") from error


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Keeps other runs from writing to `target`. Raises ValueError where one is at it."""
    path = target.resolve()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such directory; make it, or name another file")
    path = path.with_name(f".{path.name}.lock")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"{target}: another run is writing to it; wait for its end, or name another file") from error
    try:
        yield
    finally:
        if os.name == "posix":  # elsewhere an open file cannot be removed
            path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def opened(source: Path) -> Iterator[TextIO]:
    """The lines of a file, a pipe or, for "-", standard input, in any encoding of JSON.

    Bytes that are not UTF-8 come as lone surrogates, so that the lines around them can still be read.
    """
    is_standard_input = str(source) == "-"
    if is_standard_input and sys.stdin is None:
        raise ValueError("standard input is closed: give a file")
    with sys.stdin.buffer if is_standard_input else open(source, "rb") as binary:
        encoding = json.detect_encoding(binary.peek(4)[:4])  # also by its byte order mark
        errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"
        yield TextIOWrapper(binary, encoding=encoding, errors=errors)
