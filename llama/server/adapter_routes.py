"""Loading and unloading adapters over HTTP, in three spellings: vLLM's, llama.cpp's and text-generation-webui's.

Sources: vLLM's documentation, "LoRA Adapters"; the README of llama.cpp's server; the API of text-generation-webui.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, RootModel
from starlette.responses import PlainTextResponse, Response

from llama.checkpoint import adapter_in, adapters_in
from llama.server.adapters import ServedAdapters
from llama.server.admin import AdminRoutes
from llama.server.server import Server
from llama.service import Refusal
from llama.service.fields import MOST_LORAS, Fields, Ignored, LoraScale

Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]


class LoadAdapterRequest(Fields):
    """vLLM's."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False
    base_model_name: Ignored = None
    is_3d_lora_weight: Ignored = None


class UnloadAdapterRequest(Fields):
    """vLLM's."""

    lora_name: Name
    lora_int_id: Ignored = None


class AdapterScalesRequest(RootModel[Annotated[list[LoraScale], Field(max_length=MOST_LORAS)]]):
    """llama.cpp's."""


class LoadAdaptersRequest(Fields):
    """text-generation-webui's."""

    lora_names: Annotated[list[Name], Field(max_length=MOST_LORAS)]


def add_adapter_routes(admin: AdminRoutes) -> None:
    server = admin.server

    @admin.post("/v1/load_lora_adapter", LoadAdapterRequest)
    async def load_adapter(body: LoadAdapterRequest) -> Response:
        """Put an adapter of the server's folder beside the model, as vLLM does."""
        adapters = served_adapters(server)
        if adapters.find(body.lora_name) and not body.load_inplace:
            raise Refusal(
                f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load the adapter in "
                "place, set 'load_inplace' to True.",
                param="lora_name",
                kind="InvalidUserInput",
            )
        if body.lora_name == server.model.name:
            message = f"The lora adapter '{body.lora_name}' cannot have the name of the model."
            raise Refusal(message, param="lora_name", kind="InvalidUserInput")
        path = path_of_adapter(server, body.lora_path)
        await asyncio.to_thread(adapters.load, body.lora_name, path, body.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @admin.post("/v1/unload_lora_adapter", UnloadAdapterRequest)
    async def unload_adapter(body: UnloadAdapterRequest) -> Response:
        """Take an adapter away from the model, as vLLM does; requests with it end with it."""
        adapters = served_adapters(server)
        if adapters.find(body.lora_name) is None:
            message = f"The lora adapter '{body.lora_name}' cannot be found."
            raise Refusal(message, kind="NotFoundError", param="lora_name", status=404)
        await asyncio.to_thread(adapters.unload, body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    def list_scales() -> list[dict[str, Any]]:
        """The adapters beside the model by number, and how strong each is for all, as llama.cpp has them."""
        return [{"id": one.id, "path": one.file_name, "scale": one.scale} for one in served_adapters(server)]

    admin.get("/lora-adapters", list_scales)

    @admin.post("/lora-adapters", AdapterScalesRequest)
    async def set_scales(body: AdapterScalesRequest) -> dict[str, bool]:
        """Set how strong adapters are for requests that choose none, as llama.cpp does; all others are off."""
        adapters = served_adapters(server)
        await asyncio.to_thread(adapters.set_scales, adapters.scales_of(body.root))
        return {"success": True}

    def list_adapters() -> dict[str, list[str]]:
        """The adapters of the server's folder, as text-generation-webui has them."""
        folder = server.settings.lora_dir
        return {"lora_names": list(adapters_in(folder)) if folder else []}

    admin.get("/v1/internal/lora/list", list_adapters)

    @admin.post("/v1/internal/lora/load", LoadAdaptersRequest)
    async def load_adapters(body: LoadAdaptersRequest) -> str:
        """Have all requests that choose no adapter answered with these of the server's folder, as that page does.

        Those that were on before stay beside the model, for requests that name them.
        """
        adapters = served_adapters(server)
        paths = {name: path_of_adapter(server, name) for name in body.lora_names if adapters.find(name) is None}
        for name, path in paths.items():
            await asyncio.to_thread(adapters.load, name, path)
        await asyncio.to_thread(adapters.set_scales, dict.fromkeys(body.lora_names, 1.0))
        return "OK"

    @admin.post("/v1/internal/lora/unload")
    async def unload_adapters(body: None) -> str:
        """Take all adapters away from the model, as text-generation-webui does."""
        adapters = served_adapters(server)
        for name in adapters.names:
            await asyncio.to_thread(adapters.unload, name)
        return "OK"


def served_adapters(server: Server) -> ServedAdapters:
    """Raises Refusal while there is no model."""
    server.check_available()
    return server.model.adapters


def path_of_adapter(server: Server, name: str) -> Path:
    """Where an adapter of the server's folder is. Raises Refusal for what is not there, or not in that folder."""
    folder = server.settings.lora_dir
    if folder is None:
        message = "no adapter can be loaded: start the server with --lora-dir DIR, a folder of adapters"
        raise Refusal(message, kind="permission_error", code="no_lora_dir", status=403)
    try:
        return adapter_in(folder, name)
    except FileNotFoundError as error:
        raise Refusal(str(error), param="lora_path", kind="NotFoundError", status=404) from error
