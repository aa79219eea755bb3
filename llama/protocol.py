"""OpenAI's request bodies, for programs that check what they are about to send: no model is needed.

    parse(ChatRequest, {"messages": [{"role": "user", "content": "Hi"}]})  # raises Refusal, which names the field

What the endpoints make of them stands in `llama.service`.
"""

from llama.service.chat import ChatRequest
from llama.service.completions import CompletionRequest
from llama.service.embeddings import EmbeddingRequest
from llama.service.fields import parse
from llama.service.refusal import Refusal

__all__ = ["ChatRequest", "CompletionRequest", "EmbeddingRequest", "Refusal", "parse"]
