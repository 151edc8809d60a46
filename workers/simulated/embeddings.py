"""POST /v1/embeddings: unit vectors that depend on nothing but the tokens."""

import base64
import math
import struct
from collections.abc import Sequence
from typing import Any

import xxhash

from workers.simulated import errors
from workers.simulated.requests import EmbeddingsRequest, check_vocabulary
from workers.simulated.service import Service

DIMENSIONS = 64


async def answer(service: Service, request: EmbeddingsRequest) -> dict[str, Any]:
    """The body of the answer. A real vLLM serves embeddings only of an embedding model."""
    service.check_model(request.model)
    given = request.input
    if not given:
        raise errors.invalid("input must not be empty.", "input")
    single = isinstance(given, str) or isinstance(given[0], int)
    inputs: Sequence[Any] = [given] if single else given
    prompts = [await _token_ids(service, value) for value in inputs]
    size = request.dimensions or DIMENSIONS
    identity = service.identity("embd", None)
    tokens = sum(len(prompt) for prompt in prompts)
    return {
        "id": identity.id,
        "object": "list",
        "created": identity.created,
        "model": identity.model,
        "data": [
            {
                "index": index,
                "object": "embedding",
                "embedding": _encoded(unit_vector(prompt, size), request.encoding_format),
            }
            for index, prompt in enumerate(prompts)
        ],
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        },
    }


def unit_vector(token_ids: Sequence[int], size: int) -> list[float]:
    """A direction drawn by the tokens' hash."""
    seed = xxhash.xxh3_64_intdigest(struct.pack(f"<{len(token_ids)}I", *token_ids))
    values = [xxhash.xxh3_64_intdigest(n.to_bytes(4, "little"), seed=seed) / 2**63 - 1 for n in range(size)]
    length = math.hypot(*values)
    return [value / length for value in values]


async def _token_ids(service: Service, value: str | list[int]) -> list[int]:
    if isinstance(value, str):
        return await service.encode(value, add_special_tokens=True)
    check_vocabulary(value, service.tokenizer.vocab_size)
    service.check_length(value)
    return value


def _encoded(vector: list[float], form: str) -> list[float] | str:
    if form == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
