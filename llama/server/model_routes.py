"""Which models there are, which is served, and another one: text-generation-webui's /v1/internal/model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from llama.chat import FORMATS as CHAT_FORMATS
from llama.device import SPELLINGS
from llama.quantization import resolve_format
from llama.server.adapter_routes import Name, path_of_adapter
from llama.server.admin import AdminRoutes
from llama.server.server import LOAD, UNLOAD
from llama.server.switching import ModelSwitch
from llama.service import Refusal
from llama.service.fields import MOST_LORAS, Fields, Ignored, Unserved


class ModelOptions(Fields):
    """How to load it: some parameters of `Llama.build`, and that page's words for them."""

    max_seq_len: Annotated[int, Field(ge=1)] | None = None
    ctx_size: Annotated[int, Field(ge=1)] | None = Field(None, description="max_seq_len, in that page's word.")
    quantization: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    dtype: str | None = None
    kv_dtype: Literal["auto", "int8"] | None = None
    chat_format: str | None = None
    cpu: bool = False
    lora: Annotated[list[Name], Field(max_length=MOST_LORAS)] = Field(
        [], description="Adapters of the server's folder, to be merged into the model."
    )
    loader: Ignored = None

    def options(self) -> dict[str, Any]:
        """As parameters of `Llama.build`, but for adapters. Raises ValueError."""
        for name, given, known in (
            ("dtype", self.dtype, ["auto", *SPELLINGS]),
            ("chat_format", self.chat_format, list(CHAT_FORMATS)),
        ):
            if given is not None and given not in known:
                raise Refusal(f"{name} is {given[:100]!r}: give one of {', '.join(known)}", param="args")
        format = (
            None
            if self.quantization == "none"
            else resolve_format(self.quantization, self.load_in_4bit, self.load_in_8bit)
        )
        given = {
            "max_seq_len": self.max_seq_len or self.ctx_size,
            "quantization": self.quantization if self.quantization == "none" else format,
            "dtype": self.dtype,
            "kv_dtype": self.kv_dtype,
            "chat_format": self.chat_format,
            "device": "cpu" if self.cpu else None,
        }
        return {name: value for name, value in given.items() if value is not None}


class LoadModelRequest(Fields):
    """text-generation-webui's."""

    model_name: Name
    args: ModelOptions = ModelOptions()
    settings: Unserved = None


def add_model_routes(admin: AdminRoutes) -> None:
    server = admin.server
    switch = ModelSwitch(server)

    def list_models() -> dict[str, list[str]]:
        """The models that can be served, as text-generation-webui has them."""
        return {"model_names": switch.names()}

    def info() -> dict[str, Any]:
        """The model that is served, and the adapters that are on for all; null where there is none."""
        model = server.model if server.has_model else None
        return {
            "model_name": model and model.name,
            "lora_names": [one.name for one in model.adapters if one.scale] if model else [],
            "loader": "llama",
            "loading": server.loading,
        }

    admin.get("/v1/internal/model/list", list_models)
    admin.get("/v1/internal/model/info", info)

    @admin.post(LOAD, LoadModelRequest)
    async def load_model(body: LoadModelRequest) -> str:
        """Serve another model of the server's folder in the place of this one."""
        options = body.args.options()
        if body.args.lora:
            options["adapter"] = [str(path_of_adapter(server, name)) for name in body.args.lora]
        await switch.load(body.model_name, options)
        return "OK"

    @admin.post(UNLOAD)
    async def unload_model(body: None) -> str:
        """Serve no model: its memory is free until another one is loaded."""
        await switch.unload()
        return "OK"
