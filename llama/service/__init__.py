"""What a request means, once: for each endpoint what its body asks of the model, and the answer."""

from collections.abc import Callable
from typing import Any

from llama.service.call import Call, Endpoint, find_endpoint
from llama.service.chat import CHAT
from llama.service.completions import COMPLETIONS
from llama.service.embeddings import EMBEDDINGS
from llama.service.frames import Frames
from llama.service.messages import COUNT_TOKENS, MESSAGES
from llama.service.ollama import OLLAMA_CHAT, OLLAMA_EMBED, OLLAMA_GENERATE, ollama_error
from llama.service.ollama_model import OLLAMA_SHOW
from llama.service.refusal import Refusal, failure
from llama.service.responses import RESPONSES
from llama.service.tokens import APPLY_TEMPLATE, DETOKENIZE, TOKENIZE
from llama.service.tutorial import GENERATE

__all__ = [
    "ENDPOINTS",
    "MODEL_ENDPOINTS",
    "OLLAMA_ENDPOINTS",
    "Call",
    "Endpoint",
    "Frames",
    "Refusal",
    "error_form",
    "failure",
    "find_endpoint",
]

# What the model answers, which batch files may ask too.
MODEL_ENDPOINTS = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/v1/embeddings": EMBEDDINGS,
    "/v1/responses": RESPONSES,
}
ENDPOINTS = {
    **MODEL_ENDPOINTS,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": COUNT_TOKENS,
    "/tokenize": TOKENIZE,
    "/detokenize": DETOKENIZE,
    "/generate": GENERATE,
    "/apply-template": APPLY_TEMPLATE,
}
# Only where it is asked for: a server that looks like Ollama is asked by whatever looks for one.
OLLAMA_ENDPOINTS = {
    "/api/chat": OLLAMA_CHAT,
    "/api/generate": OLLAMA_GENERATE,
    "/api/embed": OLLAMA_EMBED,
    "/api/show": OLLAMA_SHOW,
}


def error_form(path: str) -> Callable[[Refusal], dict[str, Any]]:
    """What an error's body looks like to the clients that ask at this path: OpenAI's, unless it has another."""
    if path in ENDPOINTS:
        return ENDPOINTS[path].error_json
    return ollama_error if path.startswith("/api/") else Refusal.to_json
