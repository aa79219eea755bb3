"""The tutorials' POST /generate: the server of Llama2-Chinese, whose client runs unchanged.

Source: scripts/api/accelerate_server.py and accelerate_client.py of Llama2-Chinese. That server reads five of the
fourteen fields that its client sends, and cuts a long history to its last 2048 characters. Here all of them count, and
the oldest turns leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field

from llama.answer import Completion, Query
from llama.chat import Dialog, DialogError, fit_dialog
from llama.generation import Llama
from llama.sampling_params import SamplingParams
from llama.service.call import Call, Endpoint
from llama.service.chat import MOST_MESSAGES
from llama.service.completions import completion_logprobs
from llama.service.fields import Fields, SamplingBody
from llama.service.refusal import Refusal

ROLES = {"Human": "user", "Assistant": "assistant", "Assitant": "assistant"}  # the last as the client's sample has it


class TutorialTurn(Fields):
    role: Literal["Human", "Assistant", "Assitant"]
    content: str


class TutorialRequest(SamplingBody):
    history: Annotated[list[TutorialTurn], Field(max_length=MOST_MESSAGES)]
    system_prompt: str = ""
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    best_of: int | None = Field(None, description="How many answers to draw, of which the n likeliest are given.")
    use_beam_search: bool = False
    logprobs: int | None = None

    def own_params(self) -> dict[str, Any]:
        if self.use_beam_search:
            raise Refusal("use_beam_search is true: answers are sampled here; leave it out", param="use_beam_search")
        n = self.n or 1
        if self.best_of is not None and self.best_of < n:
            raise Refusal(f"best_of is {self.best_of}: draw at least n ({n}) answers", param="best_of")
        drawn = self.best_of or n
        wanted = 0 if drawn > 1 and self.logprobs is None else self.logprobs  # by which the likeliest are found
        return {"n": drawn, "logprobs": wanted} | (
            {} if self.max_new_tokens is None else {"max_tokens": self.max_new_tokens}
        )


def tutorial_queries(llm: Llama, body: TutorialRequest) -> list[Query]:
    system: Dialog = [{"role": "system", "content": body.system_prompt}] if body.system_prompt else []
    dialog = [*system, *({"role": ROLES[turn.role], "content": turn.content} for turn in body.history)]
    params = body.params().resolve(llm.defaults)
    return [llm.chat_query(fitted(llm, dialog, params), params)]


def fitted(llm: Llama, dialog: Dialog, params: SamplingParams) -> Dialog:
    """The dialog without as many of its oldest turns as leave room for the answer, or at least for some of it."""
    try:
        return llm.fit(dialog, params)
    except DialogError:
        return fit_dialog(dialog, llm.max_seq_len - 1, llm.tokenizer, llm.chat_format)


def tutorial_response(llm: Llama, call: Call, completions: Sequence[Completion]) -> dict[str, Any]:
    """The likeliest answer; with `n` above 1 all that were asked for too."""
    ranked = sorted(completions, key=total_logprob, reverse=True)
    answer = {"response": ranked[0].text, **told_at(200)}
    if (n := call.body.n or 1) > 1:
        answer["responses"] = [completion.text for completion in ranked[:n]]
    if call.body.logprobs is not None:
        answer["logprobs"] = completion_logprobs(ranked[0], llm.tokenizer)
    return answer


def total_logprob(completion: Completion) -> float:
    return sum(entry.logprob for entry in completion.logprobs or ())


def tutorial_error(refusal: Refusal) -> dict[str, Any]:
    return {"error": str(refusal), **told_at(refusal.status)}


def told_at(status: int) -> dict[str, Any]:
    return {"status": status, "time": datetime.now().strftime("%Y-%m-%d %H:%M:%S")}


GENERATE = Endpoint(TutorialRequest, tutorial_queries, tutorial_response, error_json=tutorial_error, prompt="history")
