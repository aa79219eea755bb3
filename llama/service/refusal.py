"""What is said to a client that gets no answer."""

from __future__ import annotations

from typing import Any


class Refusal(ValueError):
    """A request that cannot be answered, in one line, with what OpenAI's clients look at.

    `param` is the field at fault, `code` a word for programs, `status` HTTP's, `kind` OpenAI's type of the error;
    `retry_after`: in how many seconds it may be tried again.
    Source: OpenAI's API reference, "Error codes".
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status
        self.kind = kind
        self.retry_after = retry_after

    def to_json(self) -> dict[str, Any]:
        """OpenAI's body: all four keys, always."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def failure(message: str) -> Refusal:
    """For a request that was fine, and whose answer failed."""
    return Refusal(message, status=500, kind="server_error", code="internal_error")
