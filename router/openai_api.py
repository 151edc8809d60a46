"""Request families and error bodies of the OpenAI-compatible endpoint. No I/O.

A body is split into its top-level members, each kept as the bytes that the client sent: what the router does
not know passes through untouched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec

from router.core.fleet import Standing
from router.errors import ApiError, BadRequest

Fields = dict[str, msgspec.Raw]


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of request. `tokens`: its replies carry token ids, its streams are events of chunks."""

    path: str
    tokens: bool


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.path: family
        for family in (
            Family("/v1/chat/completions", tokens=True),
            Family("/v1/completions", tokens=True),
            Family("/v1/responses", tokens=False),
            Family("/v1/messages", tokens=False),
            Family("/v1/embeddings", tokens=False),
            Family("/tokenize", tokens=False),
            Family("/detokenize", tokens=False),
        )
    }
)


@dataclass(frozen=True, slots=True)
class Call:
    """A request as far as the router reads it, and its body in pieces."""

    family: Family
    model: str
    stream: bool
    wants_ids: bool
    wants_usage: bool
    fields: Fields
    body: bytes

    @property
    def transformed(self) -> bool:
        """Whether its reply is a stream of chunks that the router reads along."""
        return self.stream and self.family.tokens

    def upstream_body(self) -> bytes:
        """The body for the engine: as it came, but streams are asked for token ids and usage too."""
        if not self.transformed or (self.wants_ids and self.wants_usage):
            return self.body
        fields = dict(self.fields)
        fields["return_token_ids"] = msgspec.Raw(b"true")
        if not self.wants_usage:
            fields["stream_options"] = msgspec.Raw(b'{"include_usage":true}')
        return msgspec.json.encode(fields)


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = False


_decode_fields = msgspec.json.Decoder(Fields).decode
_OPTIONS = msgspec.json.Decoder(_StreamOptions | None)
_TEXT = msgspec.json.Decoder(str | None)
_FLAG = msgspec.json.Decoder(bool | None)


def parse(family: Family, body: bytes) -> Call:
    """Reads what the router must know of a request; raises BadRequest, naming the field."""
    try:
        fields = _decode_fields(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"The body is not a JSON object: {error}") from None
    options = _member(fields, "stream_options", _OPTIONS) or _StreamOptions()
    model = _member(fields, "model", _TEXT)
    if not model:
        raise BadRequest("The field 'model' is required", param="model")
    return Call(
        family=family,
        model=model,
        stream=bool(_member(fields, "stream", _FLAG)),
        wants_ids=bool(_member(fields, "return_token_ids", _FLAG)),
        wants_usage=bool(options.include_usage),
        fields=fields,
        body=body,
    )


def _member(fields: Fields, name: str, decoder: msgspec.json.Decoder[Any]) -> Any:
    raw = fields.get(name)
    if raw is None:
        return None
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"The field {name!r} is wrong: {error}", param=name) from None


def error_body(error: ApiError) -> bytes:
    """An error in OpenAI's shape, as JSON."""
    return msgspec.json.encode(
        {
            "error": {
                "message": error.message,
                "type": error.type,
                "param": error.param,
                "code": error.code,
            }
        }
    )


def error_event(error: ApiError) -> bytes:
    """An error as the last event of a stream; no `[DONE]` follows, since nothing is done."""
    return b"data: " + error_body(error) + b"\n\n"


def models_body(promised: Iterable[str], standings: Iterable[Standing], created: int) -> bytes:
    """`GET /v1/models` from the router's own registry; `created`: the router's start in Unix seconds."""
    lengths: dict[str, int | None] = dict.fromkeys(promised)
    for standing in standings:
        for model in standing.replica.models:
            lengths[model] = standing.replica.max_model_len or lengths.get(model)
    data = [
        {"id": model, "object": "model", "created": created, "owned_by": "herd", "max_model_len": length}
        for model, length in sorted(lengths.items())
    ]
    return msgspec.json.encode({"object": "list", "data": data})
