"""The affinity key: what tells that requests belong together and should meet one replica's KV cache.

A pure function of a request. A session that the client names comes first, then `prompt_cache_key`, then how
the conversation opens: everything up to the first message of the user. That stays as it is while turns are
added; and where all clients send one system prompt, the system prompt alone would be one key for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec
from xxhash import xxh3_64_intdigest

from router.http.headers import Headers
from router.openai_api import SALT, Call

# Headers that name a session: Ray Serve's, that of smg (the SGLang router), that of Claude Code. Proxies
# rewrite separators, so `_` counts as `-`, as in Ray.
SESSION_HEADERS = (b"x-session-id", b"x-smg-routing-key", b"x-claude-code-session-id")
# Of a message this much is hashed, in about a microsecond; images may follow.
MESSAGE_BYTES = 16 * 1024
# Of a completion's prompt, which is not in messages and grows at its end, only what later turns have too:
# about 256 tokens, a few blocks of a cache. A session that begins with less should be named.
PROMPT_BYTES = 1024

# What a JSON value begins with.
TEXT = b'"'
TEXT_OR_LIST = b'"['

# Families whose requests are conversations: the field of their messages, before it that of their rules where
# these are none of the messages.
_CONVERSATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "/v1/chat/completions": ("messages",),
        "/v1/messages": ("system", "messages"),
        "/v1/responses": ("instructions", "input"),
    }
)


class _Message(msgspec.Struct, frozen=True):
    role: str = ""
    content: msgspec.Raw = msgspec.Raw()


class _Opening(msgspec.Struct, frozen=True, array_like=True):
    """The first messages: rules, a greeting, a user. What follows is passed over without being kept."""

    first: _Message = _Message()
    second: _Message = _Message()
    third: _Message = _Message()
    fourth: _Message = _Message()


_decode_opening = msgspec.json.Decoder(_Opening).decode


def affinity_key(call: Call, headers: Headers) -> int | None:
    """64 bits that are the same for requests that belong together; None if nothing tells.

    The model is a part of it, and the cache salt. Engines keep the caches of a model's adapters apart, so
    nothing is gained where one session meets several, and a text that many adapters are asked would land on
    one replica for all; so it is with tenants.
    """
    told = session(headers) or _beginning(call.fields.get("prompt_cache_key"), TEXT) or _opening(call)
    if not told:
        return None
    apart = call.model.encode() + bytes(call.fields.get(SALT, b""))
    return xxh3_64_intdigest(told, xxh3_64_intdigest(apart))


def session(headers: Headers) -> bytes | None:
    """The session that the client names."""
    sent = {name.replace(b"_", b"-"): value for name, value in headers}
    return next((sent[name] for name in SESSION_HEADERS if sent.get(name)), None)


def _opening(call: Call) -> bytes | None:
    """How the conversation begins; None if the request is none, or not one that an engine would take."""
    if call.family.path == "/v1/completions":
        return _beginning(call.fields.get("prompt"), TEXT_OR_LIST, PROMPT_BYTES)
    if call.family.path not in _CONVERSATIONS:
        return None
    *rules, messages = (call.fields.get(name) for name in _CONVERSATIONS[call.family.path])
    try:
        said = _beginning(messages, TEXT) or _until_user(messages)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return b"".join([_beginning(raw, TEXT_OR_LIST) or b"" for raw in rules]) + said if said else None


def _until_user(messages: msgspec.Raw | None) -> bytes:
    """The contents up to the first message of the user."""
    contents = []
    for message in msgspec.structs.astuple(_decode_opening(messages or b"[]")):
        contents.append(memoryview(message.content)[:MESSAGE_BYTES])
        if message.role == "user":
            break
    return b"".join(contents)


def _beginning(raw: msgspec.Raw | None, kinds: bytes, limit: int = MESSAGE_BYTES) -> bytes | None:
    """The first bytes of a JSON value of one of these kinds that is not empty."""
    if raw is None or len(memoryview(raw)) <= len(b"[]"):
        return None
    beginning = bytes(memoryview(raw)[:limit])
    return beginning if beginning[0] in kinds else None
