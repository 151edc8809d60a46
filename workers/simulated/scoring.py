"""POST /score and /rerank: how alike two texts are, which depends on nothing but their tokens."""

from collections.abc import Sequence
from typing import Any

from workers.simulated import errors
from workers.simulated.embeddings import DIMENSIONS, unit_vector
from workers.simulated.requests import RerankRequest, ScoreRequest, as_list
from workers.simulated.service import Service, usage


async def score(service: Service, request: ScoreRequest, header: str | None) -> dict[str, Any]:
    """The body of the answer. A real vLLM scores only with a model made for it."""
    service.check_model(request.model)
    scores, tokens = await _scored(service, *request.pairs)
    identity = service.identity("score", header)
    return {
        "id": identity.id,
        "object": "list",
        "created": identity.created,
        "model": identity.model,
        "data": [{"index": i, "object": "score", "score": value} for i, value in enumerate(scores)],
        "usage": usage(tokens, 0, prompt_tokens_details=None, completion_tokens_details=None),
    }


async def rerank(service: Service, request: RerankRequest, header: str | None) -> dict[str, Any]:
    """The body of the answer: documents, the most relevant first."""
    service.check_model(request.model)
    documents = as_list(request.documents)
    scores, tokens = await _scored(service, [request.query], documents)
    order = sorted(range(len(documents)), key=lambda i: scores[i], reverse=True)
    identity = service.identity("score", header)
    return {
        "id": identity.id,
        "model": identity.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "results": [
            {
                "index": i,
                "document": {"text": documents[i], "multi_modal": None},
                "relevance_score": scores[i],
            }
            for i in order[: request.top_n or None]
        ],
    }


async def _scored(service: Service, left: Sequence[str], right: Sequence[str]) -> tuple[list[float], int]:
    """A score from 0 to 1 for each pair, and the tokens of all; one left text goes with every right one."""
    if not left or not right:
        which = "text_pair" if left else "text"
        raise errors.ApiError(f"At least one {which} element must be given")
    if len(left) not in (1, len(right)):
        raise errors.ApiError("Input lengths must be either 1:1, 1:N or N:N")
    pairs = list(zip(left if len(left) > 1 else [left[0]] * len(right), right, strict=True))
    ids = [[await service.encode(text, add_special_tokens=True) for text in pair] for pair in pairs]
    return [_likeness(*pair) for pair in ids], sum(len(a) + len(b) for a, b in ids)


def _likeness(left: Sequence[int], right: Sequence[int]) -> float:
    cosine = sum(
        a * b for a, b in zip(unit_vector(left, DIMENSIONS), unit_vector(right, DIMENSIONS), strict=True)
    )
    return (1 + cosine) / 2
