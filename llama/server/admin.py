"""What only whoever runs a server may do, with the key that `--admin-key` sets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from llama.server.server import Server, read_body
from llama.service import Refusal
from llama.service.fields import parse

Handler = Callable[[Any], Awaitable[object]]  # of a parsed body, None where a path has none, to what is answered


def check_admin(request: Request, server: Server) -> None:
    """Raises Refusal unless the admin key came with the request."""
    if request.scope.get("state", {}).get("is_admin"):
        return
    if server.settings.admin_key is None:
        message = "this is off: a server that is started with --admin-key KEY (or LLAMA_ADMIN_KEY) has it for that key"
        raise Refusal(message, status=403, kind="permission_error", code="admin_off")
    message = "this takes the admin key: send it as 'Authorization: Bearer KEY' or 'X-Api-Key: KEY'"
    raise Refusal(message, status=403, kind="permission_error", code="admin_key_needed")


def body_reference(body: type[BaseModel]) -> dict[str, Any]:
    """How a route's description refers to its body."""
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


class AdminRoutes:
    """Adds routes that ask for the admin key; one change at a time is made. `bodies` are those to be described."""

    def __init__(self, app: FastAPI, server: Server, responses: dict[int, dict[str, Any]]):
        self.server = server
        self.bodies: list[type[BaseModel]] = []
        self._app = app
        self._responses = responses

    def post(self, path: str, body: type[BaseModel] | None = None) -> Callable[[Handler], Handler]:
        """A decorator: what a function makes of the body is the answer, as JSON unless it is a response.

        OSError and ValueError are refused with what they say.
        """

        def decorate(change: Handler) -> Handler:
            async def answer(request: Request) -> Response:
                check_admin(request, self.server)
                ignores = self.server.settings.ignore_unknown
                parsed = None if body is None else parse(body, read_body(await request.body()), ignores)
                try:
                    async with self.server.changing:
                        said = await change(parsed)
                except Refusal:
                    raise
                except (OSError, ValueError) as error:
                    raise Refusal(str(error)) from error
                return said if isinstance(said, Response) else JSONResponse(said)

            extra = {}
            if body is not None:
                self.bodies.append(body)
                extra = {"requestBody": body_reference(body)}
            self._app.add_api_route(
                path,
                answer,
                methods=["POST"],
                summary=(change.__doc__ or path).splitlines()[0],
                response_class=Response,
                responses=self._responses,
                openapi_extra=extra,
            )
            return change

        return decorate

    def get(self, path: str, told: Callable[[], Any]) -> None:
        """What is asked by GET, without the admin key; `told` may have to be awaited."""

        async def answer(request: Request) -> Response:
            said = told()
            return JSONResponse(await said if isawaitable(said) else said)

        self._app.add_api_route(
            path, answer, methods=["GET"], summary=told.__doc__, responses=self._responses, response_class=Response
        )
