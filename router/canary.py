"""The canary: conversations whose tokens, blocks and cache hits the router and an engine must agree on.

What the router sends along replaces the engine's own rendering, so a wrong template would be wrong in silence
if nobody asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx
import msgspec

from router.core.blocks import Prompt
from router.core.fleet import Replica
from router.core.trust import Doubt
from router.http.sse import Usage
from router.openai_api import FAMILIES, Call, Fields, parse
from workers.chat_messages import template_variables
from workers.tokenizer import ids_of

CHAT, COMPLETIONS, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"

# The prompt that the router makes of a request; without token ids where it does not know them.
Render = Callable[[Call], Awaitable[Prompt]]
# How many tokens of a prompt a replica has cached, as its events told.
Held = Callable[[Prompt], int]

# An engine with a queue answers its canary late.
TIMEOUT_S = 30.0
# The tokens of the longest prompt take half of it; what goes on is no answer.
MAX_REPLY_BYTES = 16 * 1024 * 1024
# Events come milliseconds after the reply; a busy machine adds to that.
EVENTS_S, EVENTS_LOOK_S = 3.0, 0.01
# What the canary of the cache fills: a chain of blocks, not only a first one.
BLOCKS = 3
USUAL_BLOCK = 32
# At least one token in every tokeniser, and hardly more than four.
WORD, WORD_TOKENS = "sheep ", 4
# Status codes of an engine that does not serve such requests, or not of this model.
NOT_SERVED = frozenset({400, 404, 405, 501})

JSON = {"content-type": "application/json"}
ONE_TOKEN = {"max_tokens": 1, "temperature": 0, "stream": False}

# What shapes a prompt and /tokenize takes as it is.
TOKENIZED = {
    CHAT: (*("messages", "tools", "add_generation_prompt", "continue_final_message", "add_special_tokens"),),
    COMPLETIONS: ("prompt", "add_special_tokens"),
}
VARIABLES = ("chat_template_kwargs", "reasoning_effort", "documents")

_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place, now or on a day.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "day": {"type": ["string", "null"], "default": None}},
            "required": ["place"],
        },
    },
}
_CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"place": "Zürich", "day": null}'},
}
_SYSTEM = {"role": "system", "content": "You are the canary of a herd. Answer in one word."}
# Beside each other all that templates and tokenisers are known to differ in.
CONVERSATIONS: Mapping[str, dict[str, Any]] = {
    "plain": {"messages": [_SYSTEM, {"role": "user", "content": "Is the air good?"}]},
    "tools": {
        "messages": [
            _SYSTEM,
            {"role": "user", "content": "What is the weather in Zürich?"},
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": '{"sky": "clear", "°C": -3.5}'},
            {"role": "assistant", "content": "Clear, -3.5 °C."},
            {"role": "user", "content": "And tomorrow?"},
        ],
        "tools": [_WEATHER],
    },
    "unicode": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "Grüße, 日本語, العربية, e\u0301 🐄👩\u200d👧"}],
            },
            {"role": "assistant", "content": "  two  spaces\t\r\n\n<|im_end|> </s> "},
            {"role": "user", "content": "def f(x): return 1_000 - x  # don't\u200b"},
        ]
    },
    "long": {"messages": [{"role": "user", "content": "How many sheep are in the herd, 7 or 77? " * 160}]},
}


class Finding(NamedTuple):
    """What speaks against a replica."""

    kind: Doubt
    reason: str


class Reply(msgspec.Struct):
    """Of a reply to a canary, what it tells of the prompt."""

    usage: Usage = msgspec.field(default_factory=Usage)
    prompt_token_ids: list[int] | None = None


class _Tokenized(msgspec.Struct):
    tokens: list[int]


_decode_reply = msgspec.json.Decoder(Reply).decode
_decode_tokens = msgspec.json.Decoder(_Tokenized).decode


def conversations(model: str) -> list[tuple[str, Call]]:
    """The requests of which a canary compares the tokens, each with its name."""
    return [
        (f"canary '{name}'", request(CHAT, {"model": model, **body})) for name, body in CONVERSATIONS.items()
    ]


def request(path: str, body: Mapping[str, Any]) -> Call:
    """A request as if a client had sent it."""
    return parse(FAMILIES[path], msgspec.json.encode(body))


def tokenizable(call: Call) -> dict[str, Any] | None:
    """The body of /tokenize that asks for a request's tokens; None if it cannot be asked."""
    shaping = TOKENIZED.get(call.family.path)
    if shaping is None:
        return None
    fields: Fields = {name: raw for name, raw in call.fields.items() if bytes(raw) != b"null"}
    if not bytes(fields.get("prompt", b'"')).startswith(b'"'):
        return None  # ids, or several prompts
    if "tools" in fields and bytes(fields.get("tool_choice", b"")) == b'"none"':
        return None  # /tokenize shows the tools, a chat may not
    variables = _variables(fields)
    body = {name: fields[name] for name in shaping if name in fields}
    return {"model": call.model, **body, **({"chat_template_kwargs": variables} if variables else {})}


def _variables(fields: Fields) -> dict[str, Any]:
    """What a chat tells its template by members that /tokenize has not."""
    told = {name: msgspec.json.decode(raw) for name, raw in fields.items() if name in VARIABLES}
    effort, documents = told.get("reasoning_effort"), told.get("documents")
    variables = template_variables(told.get("chat_template_kwargs") or {}, effort)
    return variables | ({"documents": documents} if documents else {})


@dataclass(frozen=True, slots=True)
class Engine:
    """The one that is asked."""

    client: httpx.AsyncClient
    replica: Replica

    @property
    def model(self) -> str:
        """The model, not an adapter of it."""
        return self.replica.models[0]

    async def tokens(self, body: dict[str, Any]) -> list[int] | Finding | None:
        """What /tokenize makes of a prompt; None if it refuses this one."""
        reply = await self._post(TOKENIZE, body)
        if reply.status_code in (404, 405):
            return Finding(Doubt.NO_TOKENIZE, "its engine has no /tokenize to compare tokens with")
        if reply.status_code == 400:
            return None  # its template refuses the messages
        return _decode_tokens(reply.raise_for_status().content).tokens

    async def prefill(self, call: Call, **fields: Any) -> Reply | None:
        """The reply to a request for one token; None if the engine does not serve such."""
        asked = {**call.fields, **ONE_TOKEN, **fields}
        reply = await self._post(call.family.path, asked)
        if reply.status_code in NOT_SERVED:
            return None
        return _decode_reply(reply.raise_for_status().content)

    async def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """The whole reply. Raises httpx.HTTPError, also for one that does not end."""
        url, content = f"{self.replica.url}{path}", msgspec.json.encode(body)
        whole = bytearray()
        async with self.client.stream("POST", url, content=content, headers=JSON, timeout=TIMEOUT_S) as reply:
            async for part in reply.aiter_bytes():
                whole += part
                if len(whole) > MAX_REPLY_BYTES:
                    raise httpx.ReadError(f"a reply of more than {MAX_REPLY_BYTES} bytes")
            return httpx.Response(reply.status_code, content=bytes(whole), request=reply.request)


async def compare_tokens(engine: Engine, call: Call, ours: bytes) -> Finding | None:
    """Compares the router's tokens of a request with those that the engine makes of it."""
    body = tokenizable(call)
    theirs = await engine.tokens(body) if body is not None else None
    if isinstance(theirs, Finding) or theirs is None:
        return theirs
    return _different(ours, theirs)


async def compare_cache(engine: Engine, render: Render, held: Held | None, nonce: str) -> Finding | bool:
    """Has a new prompt computed twice: events must tell of its blocks, the second time they must be found.

    `held`: None where no events are to be looked at. `nonce`: makes it new. True if the engine reports cached
    tokens, False if not.
    """
    found = await _first(engine, render, nonce)
    if isinstance(found, Finding):
        return found
    call, prompt, reply = found
    if prompt.token_ids is not None and reply.prompt_token_ids is not None:
        finding = _different(prompt.token_ids, reply.prompt_token_ids)
        if finding is not None:
            return finding
    whole = prompt.num_tokens
    if size := engine.replica.block_size:
        whole = len(prompt.keys(size)) * size
    if held is not None and not await _told(held, prompt, whole):
        return Finding(
            Doubt.BLOCKS_DIFFER,
            f"its KV events did not tell of the {whole} tokens that the canary had it compute",
        )
    return await _repeated(engine, call, prompt, whole)


async def _first(engine: Engine, render: Render, nonce: str) -> tuple[Call, Prompt, Reply] | Finding:
    """Of chats and completions the first that the engine serves."""
    text = f"Canary {nonce}. " + WORD * _words(engine.replica)
    bodies = (
        (CHAT, {"messages": [{"role": "user", "content": text}]}),
        (COMPLETIONS, {"prompt": text}),
    )
    for path, body in bodies:
        call = request(path, {"model": engine.model, **body})
        prompt = await render(call)
        reply = await engine.prefill(call, return_token_ids=True)
        if reply is not None:
            return call, prompt, reply
    return Finding(Doubt.NO_TEXT, "its engine serves neither chats nor completions")


def _words(replica: Replica) -> int:
    wanted = BLOCKS * (replica.block_size or USUAL_BLOCK)
    return min(wanted, (replica.max_model_len or wanted * WORD_TOKENS) // WORD_TOKENS)


async def _told(held: Held, prompt: Prompt, whole: int) -> bool:
    try:
        async with asyncio.timeout(EVENTS_S):
            while held(prompt) < whole:
                await asyncio.sleep(EVENTS_LOOK_S)
    except TimeoutError:
        return False
    return True


async def _repeated(engine: Engine, call: Call, prompt: Prompt, whole: int) -> Finding | bool:
    """The same again, by its tokens where the router knows them."""
    ids = prompt.token_ids and ids_of(prompt.token_ids)
    if not ids:
        fields: dict[str, Any] = {}
    elif call.family.path == CHAT:
        fields = {"kv_transfer_params": {"prompt_token_ids": ids}}
    else:
        fields = {"prompt": ids}
    reply = await engine.prefill(call, **fields)
    if reply is None:
        return Finding(Doubt.TOKENS_DIFFER, "its engine refuses the router's tokens")
    if reply.usage.prompt_tokens_details is None:
        return False
    found, size = reply.usage.cached_tokens, engine.replica.block_size
    if size and ids and abs(found - whole) > size:
        return Finding(
            Doubt.BLOCKS_DIFFER, f"it found {found} tokens of the canary's repetition cached, not {whole}"
        )
    if not found:
        return Finding(Doubt.HISTORY_WRONG, "it found nothing of the canary's repetition cached")
    return True


def _different(ours: bytes, theirs: list[int]) -> Finding | None:
    """Where two token sequences part; never what they say, which may be a client's."""
    mine = ids_of(ours)
    if mine == theirs:
        return None
    pairs = enumerate(zip(mine, theirs, strict=False))
    at = next((n for n, (a, b) in pairs if a != b), min(len(mine), len(theirs)))
    return Finding(
        Doubt.TOKENS_DIFFER,
        f"its engine makes {len(theirs)} tokens of a prompt of which the router makes {len(mine)}, and they "
        f"part at token {at}",
    )
