"""The application: the rows of `llama.service` as routes, and what a server tells of itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from inspect import signature
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import Response

from llama.server.adapter_routes import add_adapter_routes
from llama.server.admin import AdminRoutes, body_reference
from llama.server.logs import unexpected
from llama.server.metrics import CONTENT_TYPE
from llama.server.model_routes import add_model_routes
from llama.server.models import slots, unloaded
from llama.server.page_files import add_page
from llama.server.refusing import refusal_response
from llama.server.response import CallResponse
from llama.server.router_routes import add_router_routes
from llama.server.server import Server
from llama.service import ENDPOINTS, OLLAMA_ENDPOINTS, Endpoint, Refusal
from llama.service.ollama_model import OLLAMA_VERSION, ollama_running, ollama_tags
from llama.version import VERSION

STATUSES = {
    400: "The request cannot be answered; the message says why.",
    401: "No valid API key came with the request.",
    403: "The request came under a name, or from a page, that is not allowed, or without the admin key.",
    404: "There is no such path or model.",
    405: "The path has another method.",
    408: "The request or its answer took too long.",
    413: "The body is too large.",
    415: "The body is no JSON.",
    429: "Too many requests are at work or waiting.",
    500: "The answer failed.",
    503: "The model is loading, or the server is stopping.",
}


def make_app(server: Server) -> FastAPI:
    """The routes; what stands around them is `run`'s to add."""
    app = FastAPI(title="llama", version=VERSION, docs_url=None, redoc_url=None, redirect_slashes=False)
    responses = {status: {"description": text} for status, text in STATUSES.items()}
    endpoints = ENDPOINTS | (OLLAMA_ENDPOINTS if server.settings.ollama else {})
    for url, endpoint in endpoints.items():
        app.add_api_route(
            url,
            handler(server, endpoint),
            methods=["POST"],
            summary=(endpoint.body.__doc__ or url).splitlines()[0],
            response_class=Response,
            responses={**responses, 200: {"description": "The answer.", "content": content_types(endpoint)}},
            openapi_extra={"requestBody": body_reference(endpoint.body)},
        )
    add_information(app, server, responses)
    admin = AdminRoutes(app, server, responses)
    add_adapter_routes(admin)
    add_model_routes(admin)
    add_router_routes(admin)
    add_page(app)
    add_errors(app)
    document_bodies(app, [*(endpoint.body for endpoint in endpoints.values()), *admin.bodies])
    return app


def content_types(endpoint: Endpoint) -> dict[str, Any]:
    return {"application/json": {"schema": {"type": "object"}}} | (
        {endpoint.frames.media_type: {"schema": {"type": "string"}}} if endpoint.frames else {}
    )


def handler(server: Server, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        key = request.scope.get("state", {}).get("key") or b""
        return CallResponse(server, await server.open(endpoint, await request.body(), salt=key))

    return handle


def add_information(app: FastAPI, server: Server, responses: dict[int, dict[str, Any]]) -> None:
    """What is asked by GET."""

    def get(path: str, needs_model: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            async def answer(request: Request) -> Response:
                if needs_model:
                    server.check_available()
                return JSONResponse(function(**request.path_params))

            of_path = {"in": "path", "required": True, "schema": {"type": "string"}}
            parameters = [of_path | {"name": name} for name in signature(function).parameters]
            app.add_api_route(
                path,
                answer,
                methods=["GET"],
                summary=function.__doc__,
                responses=responses,
                openapi_extra={"parameters": parameters},
            )
            return function

        return decorate

    @get("/health", needs_model=False)
    def health() -> dict[str, Any]:
        """Whether requests are answered: 503 while loading or stopping."""
        server.check_available()
        return {"status": "ok"}

    @get("/version", needs_model=False)
    def version() -> dict[str, Any]:
        """The server's version."""
        return {"version": VERSION}

    @app.get("/metrics", response_class=PlainTextResponse, responses=responses)
    async def metrics() -> Response:
        """What has happened so far, for Prometheus."""
        return Response(server.metrics.text(), media_type=CONTENT_TYPE)

    @get("/v1/models")
    def models() -> dict[str, Any]:
        """The model that is served, its adapters, and the models of its folder that could be."""
        others = [unloaded(*item) for item in server.others().items()]
        adapters = map(server.model.adapter_json, server.model.adapters)
        return {"object": "list", "data": [server.model.to_json(), *adapters, *others]}

    @get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        """One of the models that are listed."""
        if name == server.model.name:
            return server.model.to_json()
        if adapter := server.model.adapters.find(name):
            return server.model.adapter_json(adapter)
        others = server.others(name)
        if name not in others:
            raise Refusal(f"no model is called {name[:100]!r}", param="model", code="model_not_found", status=404)
        return unloaded(name, others[name])

    @get("/props")
    def props() -> dict[str, Any]:
        """The model's properties, as llama.cpp has them."""
        return server.model.props(server.llm.engine.stats())

    @get("/slots")
    def slot_list() -> list[dict[str, Any]]:
        """What is at work, as llama.cpp has it."""
        return slots(server.llm.engine.stats())

    @get("/tokenizer_info")
    def tokenizer_info() -> dict[str, Any]:
        """What the tokenizer is, as vLLM has it."""
        return server.model.tokenizer_info()

    if not server.settings.ollama:
        return

    @get("/api/version", needs_model=False)
    def ollama_version() -> dict[str, Any]:
        """The version of Ollama's API."""
        return {"version": OLLAMA_VERSION}

    @get("/api/tags")
    def tags() -> dict[str, Any]:
        """The models that there are, as Ollama has them."""
        return ollama_tags(server.llm, server.model.name, server.model.adapters.names)

    @get("/api/ps")
    def in_memory() -> dict[str, Any]:
        """The models in memory, as Ollama has them."""
        return ollama_running(server.llm, server.model.name)

    @app.head("/", include_in_schema=False)
    async def is_up() -> Response:
        """Ollama's own command asks so whether anybody is there."""
        return Response()


def add_errors(app: FastAPI) -> None:
    """Every error has the form of its wire, and none tells how the server is made."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return refusal_response(request.scope["path"], error)

    @app.exception_handler(HTTPException)
    async def wrong_path(request: Request, error: HTTPException) -> Response:
        code = "not_found" if error.status_code == 404 else None
        message = f"{request.method} {request.scope['path'][:200]}: {error.detail}"
        refusal = Refusal(message, code=code, status=error.status_code)
        response = refusal_response(request.scope["path"], refusal)
        response.headers.update(error.headers or {})  # which methods are allowed
        return response

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return refusal_response(request.scope["path"], unexpected(request.state.request_id))


def document_bodies(app: FastAPI, bodies: Iterable[type[BaseModel]]) -> None:
    """Adds the bodies' schemas, which routes only refer to, to the description that FastAPI makes."""
    made, known = app.openapi, set(bodies)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = made()
            modes = [(body, "validation") for body in sorted(known, key=lambda body: body.__name__)]
            _, definitions = models_json_schema(modes, ref_template="#/components/schemas/{model}")
            schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        return app.openapi_schema

    app.openapi = openapi
