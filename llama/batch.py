"""Offline inference over a file: one request a line in, one answer a line out, in OpenAI's batch format.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 9}}

Answers are written as they are done, each with the number of its line, so that a job that was stopped goes on from
there. A line that cannot be answered becomes an error line.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, TextIO

from llama.answer import Completion, Query
from llama.generation import Llama, unit_vectors
from llama.protocol import (
    Body,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    chat_response,
    completion_response,
    embedding_response,
    parse,
    prompts_of,
)
from llama.sampling_params import SamplingParams

ENDPOINTS: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
}


@dataclass
class Job:
    """A line of the input on its way."""

    line: int  # counted from 1
    custom_id: str | None = None
    request: Body | None = None
    queries: list[Query] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)


@dataclass
class Counts:
    answered: int = 0
    failed: int = 0
    skipped: int = 0  # lines that an earlier run has answered
    tokens: int = 0  # generated


class Batch:
    """A model answering one file into another."""

    def __init__(self, llm: Llama, source: Path, target: Path):
        self.llm = llm
        self.source = source
        self.target = target
        self.counts = Counts()

    def run(self, progress: Callable[[Counts], None] | None = None) -> Counts:
        """Answers every line that is not answered yet. Under torchrun rank 0 reads and writes.

        Raises ValueError where the target holds the answers to another file.
        """
        if self.llm.rank != 0:
            for _ in self.llm.run(()):
                pass
            return self.counts
        done = finished_lines(self.target)
        jobs: list[Job] = []  # by place of request; a job of several prompts stands there several times
        with open(self.source, encoding="utf-8") as lines, open(self.target, "a", encoding="utf-8") as out:

            def queries() -> Iterator[Query]:
                for job in self._jobs(lines, done, out):
                    for query in job.queries:
                        jobs.append(job)
                        yield query

            for completion in self.llm.run(queries()):
                job = jobs[completion.place]
                job.completions.append(completion)
                self.counts.tokens += len(completion.tokens)
                if len(job.completions) == sum(query.params.n for query in job.queries):
                    self._answer(job, out)
                if progress:
                    progress(self.counts)
        return self.counts

    def _jobs(self, lines: TextIO, done: dict[int, str | None], out: TextIO) -> Iterator[Job]:
        """The lines that the engine has to answer; bad lines and embeddings are written on the spot."""
        seen: set[str] = set()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            job = Job(number)
            try:
                entry = self._parse(job, line, seen)
            except ValueError as error:
                entry, refusal = None, str(error)
            if number in done:
                if done[number] != job.custom_id:
                    raise ValueError(
                        f"{self.target} answers another file: its line {number} is {done[number]!r}, "
                        f"not {job.custom_id!r}; give another file"
                    )
                self.counts.skipped += 1
                continue
            if entry is not None:
                try:
                    self._prepare(job, entry)
                    refusal = None
                except ValueError as error:
                    refusal = str(error)
            if refusal is not None:
                self._write(out, job, error=refusal)
            elif isinstance(job.request, EmbeddingRequest):
                completions = sorted(self.llm.run(job.queries), key=attrgetter("place"))
                num_prompt_tokens = sum(len(query.tokens) for query in job.queries)
                body = embedding_response(job.request, unit_vectors(completions).tolist(), num_prompt_tokens)
                self._write(out, job, body)
            else:
                yield job

    def _parse(self, job: Job, line: str, seen: set[str]) -> dict[str, Any]:
        """The line's object; fills the job's custom_id. Raises ValueError."""
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {job.line} is not JSON: {error}") from error
        custom_id = entry.get("custom_id") if isinstance(entry, dict) else None
        if not isinstance(custom_id, str):
            raise ValueError(f"line {job.line} has no custom_id")
        job.custom_id = custom_id
        if custom_id in seen:
            raise ValueError(f"custom_id {custom_id!r} stands on an earlier line too")
        seen.add(custom_id)
        return entry

    def _prepare(self, job: Job, entry: dict[str, Any]) -> None:
        """Makes token ids and parameters of the line's body. Raises ValueError."""
        kind = ENDPOINTS.get(entry.get("url"))
        if kind is None:
            raise ValueError(f"url is {entry.get('url')!r}: give {', '.join(ENDPOINTS)}")
        job.request = request = parse(kind, entry.get("body"))
        if isinstance(request, EmbeddingRequest):
            params = SamplingParams().resolve(self.llm.defaults)
            tokens = self.llm.prompt_tokens(prompts_of(request.input))
            job.queries = [Query(prompt, params, "mean") for prompt in tokens]
        else:
            params = request.params().resolve(self.llm.defaults)
            if isinstance(request, ChatRequest):
                dialog = [{"role": m.role, "content": m.content} for m in request.messages]
                job.queries = [self.llm.chat_query(dialog, params)]
            else:
                tokens = self.llm.prompt_tokens(prompts_of(request.prompt))
                job.queries = [Query(prompt, params) for prompt in tokens]
        for query in job.queries:
            self.llm.check(query)

    def _answer(self, job: Job, out: TextIO) -> None:
        completions = sorted(job.completions, key=attrgetter("place", "index"))
        failed = next((c for c in completions if c.finish_reason == "error"), None)
        if failed is not None:
            self._write(out, job, error=failed.error)
            return
        respond = chat_response if isinstance(job.request, ChatRequest) else completion_response
        num_prompt_tokens = sum(len(query.tokens) for query in job.queries)
        self._write(out, job, respond(job.request, completions, num_prompt_tokens, self.llm.tokenizer))

    def _write(
        self, out: TextIO, job: Job, body: dict[str, Any] | None = None, error: str | None = None
    ) -> None:
        """One line at once, so that a job that is stopped leaves whole lines."""
        request_id = uuid.uuid4().hex
        entry = {
            "id": f"batch_req_{request_id}",
            "line": job.line,
            "custom_id": job.custom_id,
            "response": body and {"status_code": 200, "request_id": request_id, "body": body},
            "error": error and {"code": "invalid_request", "message": error},
        }
        out.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")
        out.flush()
        if error is None:
            self.counts.answered += 1
        else:
            self.counts.failed += 1


def finished_lines(target: Path) -> dict[int, str | None]:
    """By line number, the custom ids that `target` answers; a last line that was cut off is removed from it."""
    if not target.exists():
        return {}
    content = target.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with open(target, "r+b") as out:
            out.truncate(len(whole))
    try:
        entries = [json.loads(line) for line in whole.splitlines()]
        return {entry["line"]: entry["custom_id"] for entry in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{target} does not hold answers of this command: give another file") from error
