"""Request families of the endpoint, and what the router reads of a request. No I/O.

A JSON body is split into its top-level members, each kept as the bytes that the client sent: what the router
does not know passes through untouched. Of a form only the model is looked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import msgspec

from router import anthropic_api, multipart, responses_api, token_ids
from router.core.fleet import Standing
from router.errors import ApiError, BadRequest, NotIsolated
from router.http.event_watch import CHUNKS, UNKNOWN, Ending
from router.http.sse import EventStream, Usage, usage_of

Fields = dict[str, msgspec.Raw]
# What tells an engine to take KV blocks, or the prompt itself, from elsewhere. A prompt is what vLLM looks
# for in chats, messages and responses.
TRANSFER = "kv_transfer_params"
# With another one an engine shares no KV cache.
SALT = "cache_salt"
Aliases = Mapping[str, str]
# Of a client's own cache salt, if it sends one, what its engine gets.
Salt = Callable[[str | None], str]


def error_body(error: ApiError, request_id: str | None = None) -> bytes:
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


def error_event(error: ApiError, request_id: str | None = None, reading: object = None) -> bytes:
    """An error as the last event of a stream; no `[DONE]` follows, since nothing is done."""
    return b"data: " + error_body(error) + b"\n\n"


def _nothing(told: object) -> None:
    """What is not told, or not to be counted."""


def _told_usage(events: EventStream) -> Usage | None:
    return events.usage


def _ids_in_chat(ids: bytes) -> Fields:
    """With these vLLM renders no messages, but still checks them (online_renderer.py, preprocess_chat)."""
    return {TRANSFER: msgspec.Raw(b'{"prompt_token_ids":%b}' % token_ids.to_json(ids))}


def _ids_in_completion(ids: bytes) -> Fields:
    return {"prompt": msgspec.Raw(token_ids.to_json(ids))}


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of request: where it is served, and how its replies and errors are written.

    `path`: as metrics name it. `tokens`: its replies carry token ids, its streams are chunks of tokens.
    `forms`: a form is taken too. `keeps`: its replies are stored, and go on from what is stored. What is told
    of a stream is read from what read it: an `EventStream` where there are tokens, else an `EventWatch`.
    `sent_ids`: the members that give the engine its prompt as token ids; None where none are sent. `salted`:
    engines heed a cache salt, or use no cache for it.
    """

    path: str
    tokens: bool = False
    forms: bool = False
    keeps: bool = False
    ending: Ending = CHUNKS
    error_body: Callable[[ApiError, str | None], bytes] = error_body
    error_event: Callable[[ApiError, str | None, Any], bytes] = error_event
    usage_of: Callable[[bytes], Usage | None] = usage_of
    streamed_usage: Callable[[Any], Usage | None] = _nothing
    id_of: Callable[[bytes], str | None] = _nothing
    streamed_id: Callable[[Any], str | None] = _nothing
    sent_ids: Callable[[bytes], Fields] | None = None
    salted: bool = True


def _messages(path: str) -> Family:
    return Family(
        path,
        ending=anthropic_api.ENDING,
        error_body=anthropic_api.error_body,
        error_event=anthropic_api.error_event,
        usage_of=anthropic_api.usage_of,
        streamed_usage=anthropic_api.streamed_usage,
    )


def _responses(path: str, keeps: bool) -> Family:
    return Family(
        path,
        keeps=keeps,
        ending=responses_api.ENDING,
        error_event=responses_api.error_event,
        usage_of=responses_api.usage_of,
        streamed_usage=responses_api.streamed_usage,
        id_of=responses_api.id_of,
        streamed_id=responses_api.streamed_id,
    )


# What vLLM serves of a model. Paths outside /v1 are relayed only if they are here.
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.path: family
        for family in (
            Family("/v1/chat/completions", tokens=True, streamed_usage=_told_usage, sent_ids=_ids_in_chat),
            Family("/v1/completions", tokens=True, streamed_usage=_told_usage, sent_ids=_ids_in_completion),
            _responses("/v1/responses", keeps=True),
            _messages("/v1/messages"),
            _messages("/v1/messages/count_tokens"),
            Family("/v1/embeddings"),
            Family("/v2/embed", salted=False),
            Family("/pooling"),
            Family("/classify"),
            Family("/rerank"),
            Family("/v1/rerank"),
            Family("/v2/rerank"),
            Family("/score"),
            Family("/v1/score"),
            Family("/generative_scoring"),
            Family("/tokenize"),
            Family("/detokenize"),
            Family("/inference/v1/generate"),
            Family("/v1/audio/transcriptions", forms=True),
            Family("/v1/audio/translations", forms=True),
        )
    }
)
# A response that an engine keeps: GET, DELETE, POST to `/cancel`. Its tokens are counted when it is made.
STORED = replace(_responses("/v1/responses/{id}", keeps=False), usage_of=_nothing, streamed_usage=_nothing)
# Any other POST below /v1. How its streams end is not known, so one that ends cleanly is taken for whole.
OTHER = Family("/v1/*", forms=True, ending=UNKNOWN)
OTHER_MESSAGES = _messages("/v1/messages/*")

# No empty segments, no `..`, no escapes: nothing that an engine or a proxy before it might read otherwise.
_OTHER_PATH = re.compile(r"/v1(?:/[\w-]+(?:\.[\w-]+)*)+", re.ASCII)
_STORED_PATH = re.compile(r"/v1/responses/([\w-][\w.:~-]*)(/cancel|/input_items)?", re.ASCII)
# The router's own, and what would change one engine behind the back of the others.
_UNRELAYED = frozenset({"/v1/models", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"})


def family_of(method: str, path: str) -> Family | None:
    """The family of a request; None for what no replica is asked."""
    if (known := FAMILIES.get(path)) is not None:
        return known
    if (stored := _STORED_PATH.fullmatch(path)) and (method in ("GET", "DELETE") or stored[2] == "/cancel"):
        return STORED
    if method != "POST" or path in _UNRELAYED or not _OTHER_PATH.fullmatch(path):
        return None
    return OTHER_MESSAGES if path.startswith("/v1/messages/") else OTHER


def refusal(error: ApiError, path: str) -> bytes:
    """The body of an error that the HTTP layer found, when this much of the request is known."""
    family = family_of("POST", path) or OTHER
    return family.error_body(error, None)


@dataclass(frozen=True, slots=True)
class Kept:
    """What a call has to do with stored responses.

    `about`: the one that it goes on from or asks for. `nameless`: its own reply is stored, and the client
    left its id to others.
    """

    about: str | None
    nameless: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A request as far as the router reads it, and its body: as it came, and its members unless it is a form.

    `model` is what engines call it.
    """

    family: Family
    model: str
    stream: bool = False
    wants_ids: bool = False
    wants_usage: bool = False
    fields: Fields = field(default_factory=dict)
    body: bytes = b""
    kept: Kept | None = None

    @property
    def transformed(self) -> bool:
        """Whether its reply is a stream of chunks that the router reads along."""
        return self.stream and self.family.tokens

    def upstream_body(self, response_id: str | None = None, prompt_ids: bytes | None = None) -> bytes:
        """The body for the engine: as it came, but streams are asked for token ids and usage too.

        `response_id`: the id for the reply that is stored. `prompt_ids`: token ids (little-endian uint32) in
        place of the prompt, for families that take them.
        """
        fields = self.fields
        if prompt_ids is not None and self.family.sent_ids is not None:
            fields = {**fields, **self.family.sent_ids(prompt_ids)}
        if response_id is not None:
            fields = {**fields, "request_id": _raw(response_id)}
        if self.transformed and not (self.wants_ids and self.wants_usage):
            fields = {**fields, "return_token_ids": msgspec.Raw(b"true")}
            if not self.wants_usage:
                fields["stream_options"] = msgspec.Raw(b'{"include_usage":true}')
        return self.body if fields is self.fields else msgspec.json.encode(fields)


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = False


_decode_fields = msgspec.json.Decoder(Fields).decode
_OPTIONS = msgspec.json.Decoder(_StreamOptions | None)
_TEXT = msgspec.json.Decoder(str | None)
_FLAG = msgspec.json.Decoder(bool | None)
NO_ALIASES: Aliases = MappingProxyType({})


def parse(
    family: Family,
    body: bytes,
    aliases: Aliases = NO_ALIASES,
    *,
    allow_transfer: bool = False,
    salt: Salt | None = None,
) -> Call:
    """Reads what the router must know of a JSON request; raises BadRequest, naming the field.

    Unless `allow_transfer`, a client's own kv_transfer_params are dropped: with them it could have an engine
    read another prompt than the router knows. With `salt` the client's cache salt is replaced; raises
    NotIsolated where engines would not heed it. What is stored gets no id from such a client either: it could
    be the id of another one's.
    """
    try:
        fields = _decode_fields(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"The body is not a JSON object: {error}") from None
    options = _member(fields, "stream_options", _OPTIONS) or _StreamOptions()
    model = _member(fields, "model", _TEXT)
    if not model:
        raise BadRequest("The field 'model' is required", param="model")
    changed = not allow_transfer and fields.pop(TRANSFER, None) is not None
    if model in aliases:
        model = aliases[model]
        fields["model"] = _raw(model)
        changed = True
    if salt is not None:
        if not family.salted:
            raise NotIsolated(f"At {family.path} engines cannot keep the caches of tenants apart")
        fields[SALT] = _raw(salt(_member(fields, SALT, _TEXT)))
        if family.keeps:
            fields.pop("request_id", None)
        changed = True
    if changed:
        body = msgspec.json.encode(fields)
    return Call(
        family=family,
        model=model,
        stream=bool(_member(fields, "stream", _FLAG)),
        wants_ids=bool(_member(fields, "return_token_ids", _FLAG)),
        wants_usage=bool(options.include_usage),
        fields=fields,
        body=body,
        kept=_kept(fields) if family.keeps else None,
    )


def _kept(fields: Fields) -> Kept:
    """Engines store what they answer unless they are told not to."""
    named = _member(fields, "request_id", _TEXT)
    stored = bytes(fields.get("store", b"")) != b"false"
    return Kept(_member(fields, "previous_response_id", _TEXT), nameless=stored and not named)


def parse_form(family: Family, content_type: bytes, body: bytes, aliases: Aliases = NO_ALIASES) -> Call:
    """Reads the model of a form; raises BadRequest."""
    span = multipart.find_field(content_type, body, "model")
    if span is None or span.begin == span.end:
        raise BadRequest("The form's field 'model' is required", param="model")
    try:
        model = body[span.begin : span.end].decode()
    except UnicodeDecodeError:
        raise BadRequest("The form's field 'model' is not text", param="model") from None
    if model in aliases:
        model = aliases[model]
        body = multipart.replaced(body, span, model.encode())
    return Call(family, model, body=body)


def stored_id(path: str) -> str:
    """The response that a path of the family STORED is about."""
    found = _STORED_PATH.fullmatch(path)
    assert found is not None
    return found[1]


def _raw(value: str) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def _member(fields: Fields, name: str, decoder: msgspec.json.Decoder[Any]) -> Any:
    raw = fields.get(name)
    if raw is None:
        return None
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"The field {name!r} is wrong: {error}", param=name) from None


def model_cards(
    promised: Iterable[str], standings: Iterable[Standing], created: int, aliases: Aliases = NO_ALIASES
) -> dict[str, dict[str, Any]]:
    """Every model by its name, from the router's own registry; `created`: its start in Unix seconds.

    An alias tells the model behind it as `root` and `parent`, as vLLM does for adapters.
    """
    lengths: dict[str, int | None] = dict.fromkeys(promised)
    for standing in standings:
        for model in standing.replica.models:
            lengths[model] = standing.replica.max_model_len or lengths.get(model)
    cards = {name: _card(name, created, length) for name, length in lengths.items()}
    for alias, model in aliases.items():
        cards[alias] = _card(alias, created, lengths.get(model)) | {"root": model, "parent": model}
    return dict(sorted(cards.items()))


def models_body(cards: Mapping[str, dict[str, Any]]) -> bytes:
    """`GET /v1/models`."""
    return msgspec.json.encode({"object": "list", "data": list(cards.values())})


def _card(name: str, created: int, max_model_len: int | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "herd",
        "max_model_len": max_model_len,
    }
