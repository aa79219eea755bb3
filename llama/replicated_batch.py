"""A batch job over replicas: Ray Data has actors answer blocks of lines, this process reads and writes the files.

Lines wait in Ray's object store, which goes on on disk where there are many. Answers come a block at a time.

Source: Ray's documentation, "Data: map_batches", "ActorPoolStrategy".
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from llama.batch import Answerer, BatchJob, Line, LineAnswer, Take
from llama.cluster import ModelPlan

BLOCK_LINES = 64  # an actor has two of them at work, so that one fills the steps that the other's last answers leave


class LineWorker:
    """An actor with a model of its own. Lines and answers are texts: those that a file has, and JSON."""

    def __init__(self, plan: ModelPlan):
        self._llm = plan.build()

    def __call__(self, block: dict[str, Any]) -> dict[str, list[str]]:
        answers: list[str] = []
        lines = (Line(**json.loads(text)) for text in block["line"])
        Answerer(self._llm, lambda answer: answers.append(json.dumps(asdict(answer)))).run(lines)
        return {"answer": answers}


class ReplicatedBatch(BatchJob):
    """A job on the Ray cluster that this process is connected with."""

    def __init__(self, plan: ModelPlan, source: str | Path, target: str | Path):
        super().__init__(source, target)
        self.plan = plan

    def answer(self, lines: Iterable[Line], take: Take) -> None:
        import pyarrow
        import ray

        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        texts = line_texts(lines)
        blocks = [ray.put(pyarrow.table({"line": some})) for some in iter(lambda: list(islice(texts, BLOCK_LINES)), [])]
        if not blocks:
            return
        answers = ray.data.from_arrow_refs(blocks).map_batches(
            LineWorker,
            fn_constructor_args=[self.plan],
            batch_size=BLOCK_LINES,
            compute=ray.data.ActorPoolStrategy(
                size=self.plan.num_replicas, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
            ),
            **self.plan.share.options,
        )
        for row in answers.iter_rows():
            take(LineAnswer(**json.loads(row["answer"])))


def line_texts(lines: Iterable[Line]) -> Iterator[str]:
    for line in lines:
        yield json.dumps({"number": line.number, "custom_id": line.custom_id, "entry": line.entry})
