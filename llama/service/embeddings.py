"""OpenAI's /v1/embeddings. Source: OpenAI's API reference, "Embeddings"."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from typing import Any, Literal

from llama.answer import Completion, Query, unit_vectors
from llama.generation import Llama
from llama.sampling_params import SamplingParams
from llama.service.call import Call, Endpoint
from llama.service.completions import prompt_tokens
from llama.service.fields import Body, Ignored, Prompts
from llama.service.openai import Usage
from llama.service.refusal import Refusal


class EmbeddingRequest(Body):
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"  # base64: of float32, little-endian
    dimensions: int | None = None
    user: Ignored = None


def embedding_queries(llm: Llama, body: EmbeddingRequest) -> list[Query]:
    dim = llm.model.params.dim
    if body.dimensions not in (None, dim):
        raise Refusal(f"dimensions is {body.dimensions}: this model's vectors have {dim}", param="dimensions")
    params = SamplingParams().resolve()
    return [Query(tokens, params, "mean") for tokens in prompt_tokens(llm, "input", body.input)]


def embedding_response(llm: Llama, call: Call, completions: Sequence[Completion]) -> dict[str, Any]:
    vectors = unit_vectors(completions).numpy().astype("<f4")
    is_base64 = call.body.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": b64encode(vector.tobytes()).decode() if is_base64 else vector.tolist(),
        }
        for index, vector in enumerate(vectors)
    ]
    counts = Usage.of(call.queries).to_json()
    usage = {name: counts[name] for name in ("prompt_tokens", "total_tokens")}
    return {"object": "list", "model": call.model, "data": data, "usage": usage}


EMBEDDINGS = Endpoint(EmbeddingRequest, embedding_queries, embedding_response, prompt="input", needs_model=True)
