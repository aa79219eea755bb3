"""What routers ask of the servers behind them, in the words of SGLang's gateway.

Source: sgl-project/sglang, the workers' registration and health checks of sgl-router. vLLM's routers ask for /health,
/v1/models and /metrics, which stand elsewhere.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.responses import PlainTextResponse

from llama.server.admin import AdminRoutes
from llama.version import VERSION


def add_router_routes(admin: AdminRoutes) -> None:
    server = admin.server

    def model_info() -> dict[str, Any]:
        """What the model is, as SGLang has it."""
        server.check_available()
        name = server.model.name
        return {
            "model_path": name,
            "tokenizer_path": name,
            "served_model_name": name,
            "is_generation": server.llm.engine.can_generate,
            "preferred_sampling_params": None,
            "model_type": "llama",
        }

    def server_info() -> dict[str, Any]:
        """What the server has room for, as SGLang has it."""
        server.check_available()
        parallel, scheduler = server.llm.model.parallel, server.llm.engine.scheduler
        return {
            "model_path": server.model.name,
            "served_model_name": server.model.name,
            "version": VERSION,
            "tp_size": parallel.tensor.size,
            "pp_size": parallel.num_stages,
            "dp_size": 1,
            "context_length": server.llm.max_seq_len,
            "page_size": scheduler.block_size,
            "max_total_num_tokens": scheduler.block_size * scheduler.stats().num_blocks,
            "max_running_requests": server.settings.max_queue,
        }

    def load() -> list[dict[str, int]]:
        """How much is at work and waits, as SGLang has it."""
        server.check_available()
        stats = server.llm.engine.stats()
        return [
            {
                "dp_rank": 0,
                "num_reqs": stats.num_running + stats.num_waiting,
                "num_waiting_reqs": stats.num_waiting,
                "num_tokens": stats.num_referenced_blocks * server.llm.engine.scheduler.block_size,
            }
        ]

    async def health_generate() -> dict[str, Any]:
        """Whether requests are answered, and the engine takes a word between two steps."""
        server.check_available()
        await asyncio.wrap_future(server.engine.ask(lambda: None))
        return {"status": "ok"}

    for path in ("/get_model_info", "/model_info"):
        admin.get(path, model_info)
    for path in ("/get_server_info", "/server_info"):
        admin.get(path, server_info)
    admin.get("/get_load", load)
    admin.get("/health_generate", health_generate)

    @admin.post("/flush_cache")
    async def flush_cache(body: None) -> PlainTextResponse:
        """Forget the prompts of earlier requests; what is at work keeps its own."""
        server.check_available()
        await asyncio.wrap_future(server.engine.ask(server.llm.engine.scheduler.forget_prefixes))
        return PlainTextResponse("Cache flushed.\n")
