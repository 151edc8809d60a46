"""What canaries make of an engine's answers; the engine says what a test wants it to."""

from __future__ import annotations

import json

import httpx
import msgspec
import pytest
from router_wire import answering, engine, reply

from router.canary import (
    BLOCKS,
    CHAT,
    COMPLETIONS,
    CONVERSATIONS,
    TOKENIZE,
    Engine,
    Finding,
    compare_cache,
    compare_tokens,
    conversations,
    request,
    tokenizable,
)
from router.core.blocks import Prompt
from router.core.fleet import Replica
from router.core.trust import Doubt

HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
OURS = [3, 1, 4, 1, 5]


def packed(ids):
    return b"".join(i.to_bytes(4, "little") for i in ids)


async def asked(pages, question):
    """What comes of a question to an engine with these pages, and what it was asked."""
    async with engine(answering(pages)) as (it, url), httpx.AsyncClient(trust_env=False) as client:
        replica = Replica("r", url, ("m", "lora"), block_size=16, max_model_len=4096)
        return await question(Engine(client, replica)), [
            json.loads(r.split(b"\r\n\r\n", 1)[1]) for r in it.requests
        ]


def tokens(ids):
    return reply(json.dumps({"count": len(ids), "tokens": ids}).encode())


@pytest.mark.parametrize(
    ("page", "finding"),
    [
        (tokens(OURS), None),
        (tokens([3, 1, 4, 9, 5]), "of which the router makes 5, and they part at token 3"),
        (
            tokens([3, 1, 4]),
            "makes 3 tokens of a prompt of which the router makes 5, and they part at token 3",
        ),
        (tokens([*OURS, 9]), "part at token 5"),
        (reply(b'{"error":{}}', status="400 Bad Request"), None),
    ],
)
async def test_tokens_are_compared_one_by_one(page, finding):
    call = request(CHAT, HELLO)
    found, bodies = await asked({TOKENIZE.encode(): page}, lambda e: compare_tokens(e, call, packed(OURS)))
    assert bodies == [HELLO]
    if finding is None:
        assert found is None
    else:
        assert found.kind is Doubt.TOKENS_DIFFER
        assert finding in found.reason


async def test_an_engine_without_tokenize_is_no_liar():
    found, _ = await asked({}, lambda e: compare_tokens(e, request(CHAT, HELLO), b""))
    assert found.kind is Doubt.NO_TOKENIZE


async def test_an_engine_that_does_not_stop_is_not_listened_to(monkeypatch):
    monkeypatch.setattr("router.canary.MAX_REPLY_BYTES", 1000)
    with pytest.raises(httpx.ReadError, match="more than 1000 bytes"):
        await asked(
            {TOKENIZE.encode(): tokens(list(range(1000)))},
            lambda e: compare_tokens(e, request(CHAT, HELLO), packed(OURS)),
        )


@pytest.mark.parametrize("status", ["500 Internal Server Error", "503 Service Unavailable"])
async def test_an_engine_in_trouble_proves_nothing(status):
    with pytest.raises(httpx.HTTPStatusError):
        await asked(
            {TOKENIZE.encode(): reply(b"", status=status)},
            lambda e: compare_tokens(e, request(CHAT, HELLO), packed(OURS)),
        )


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("path", "body", "asks"),
    [
        (CHAT, HELLO | {"temperature": 1, "n": 2}, HELLO),
        (CHAT, HELLO | {"tools": [TOOL], "tool_choice": "auto"}, HELLO | {"tools": [TOOL]}),
        (
            CHAT,
            HELLO | {"chat_template_kwargs": {"x": 1}, "add_generation_prompt": False},
            HELLO | {"add_generation_prompt": False, "chat_template_kwargs": {"x": 1}},
        ),
        (CHAT, HELLO | {"reasoning_effort": None, "documents": None}, HELLO),
        (
            CHAT,
            HELLO | {"reasoning_effort": "low", "chat_template_kwargs": {"x": 1}},
            HELLO | {"chat_template_kwargs": {"x": 1, "reasoning_effort": "low", "enable_thinking": True}},
        ),
        (
            CHAT,
            HELLO | {"documents": [{"text": "t"}]},
            HELLO | {"chat_template_kwargs": {"documents": [{"text": "t"}]}},
        ),
        (CHAT, HELLO | {"tools": [TOOL], "tool_choice": "none"}, None),
        (COMPLETIONS, {"model": "m", "prompt": "p", "max_tokens": 3}, {"model": "m", "prompt": "p"}),
        (COMPLETIONS, {"model": "m", "prompt": [1, 2]}, None),
        (COMPLETIONS, {"model": "m", "prompt": ["a", "b"]}, None),
        ("/v1/embeddings", {"model": "m", "input": "p"}, None),
    ],
)
def test_tokenize_is_asked_what_it_can_tell(path, body, asks):
    asked = tokenizable(request(path, body))
    assert msgspec.json.decode(msgspec.json.encode(asked)) == asks


def test_a_canary_speaks_of_all_that_templates_differ_in():
    calls = dict(conversations("m"))
    assert len(calls) == len(CONVERSATIONS) >= 4
    assert all(call.model == "m" and tokenizable(call) for call in calls.values())


# -- blocks and cache

LONG = list(range(BLOCKS * 16 + 5))
WHOLE = BLOCKS * 16


async def render(call):
    return Prompt(len(LONG), packed(LONG))


def generated(cached=None, ids=None):
    details = None if cached is None else {"cached_tokens": cached}
    usage = {"prompt_tokens": len(LONG), "completion_tokens": 1, "prompt_tokens_details": details}
    return reply(json.dumps({"usage": usage, "prompt_token_ids": ids}).encode())


async def cache(*pages, held=lambda prompt: WHOLE, path=CHAT, renders=render, block_size=16):
    """What a canary finds where these are the replies, one after the other."""
    replies = iter(pages)

    async def script(message, reader, writer):
        served = f"POST {path} ".encode() in message
        writer.write(next(replies) if served else reply(b"", status="404 Not Found"))

    async with engine(script) as (it, url), httpx.AsyncClient(trust_env=False) as client:
        replica = Replica("r", url, ("m",), block_size=block_size, max_model_len=4096)
        found = await compare_cache(Engine(client, replica), renders, held, "nonce")
        return found, [json.loads(r.split(b"\r\n\r\n", 1)[1]) for r in it.requests]


async def test_a_canary_is_computed_once_and_found_the_second_time():
    found, (first, second) = await cache(generated(0, LONG), generated(WHOLE))
    assert found is True
    assert "nonce" in first["messages"][0]["content"]
    assert (first["max_tokens"], first["return_token_ids"], "kv_transfer_params" in first) == (1, True, False)
    assert second["kv_transfer_params"] == {"prompt_token_ids": LONG}
    assert second["messages"] == first["messages"]


async def test_who_does_not_report_is_not_held_to_it():
    assert (await cache(generated(), generated()))[0] is False


async def test_where_there_are_no_chats_completions_do():
    found, bodies = await cache(generated(0, LONG), generated(WHOLE), path=COMPLETIONS)
    assert found is True
    assert bodies[-1]["prompt"] == LONG


async def test_who_serves_neither_is_known_by_load():
    found, _ = await cache(path="/v1/embeddings")
    assert found.kind is Doubt.NO_TEXT


@pytest.mark.parametrize(
    ("pages", "held", "kind"),
    [
        ((generated(0, LONG[1:]),), WHOLE, Doubt.TOKENS_DIFFER),
        ((generated(0, LONG),), WHOLE - 16, Doubt.BLOCKS_DIFFER),
        ((generated(0, LONG), generated(WHOLE - 32)), WHOLE, Doubt.BLOCKS_DIFFER),
        ((generated(0, LONG), generated(0)), WHOLE, Doubt.BLOCKS_DIFFER),
        ((generated(0, LONG), reply(b"", status="400 Bad Request")), WHOLE, Doubt.TOKENS_DIFFER),
    ],
)
async def test_what_does_not_fit_is_found(pages, held, kind, monkeypatch):
    monkeypatch.setattr("router.canary.EVENTS_S", 0.05)
    found, _ = await cache(*pages, held=lambda prompt: held)
    assert isinstance(found, Finding)
    assert found.kind is kind


async def test_without_events_and_tokens_it_is_enough_that_something_is_found():
    async def knows_nothing(call):
        return Prompt(0)

    pages = (generated(0), generated(64))
    assert (await cache(*pages, held=None, renders=knows_nothing, block_size=None))[0] is True
    pages = (generated(0), generated(0))
    found, _ = await cache(*pages, held=None, renders=knows_nothing, block_size=None)
    assert found.kind is Doubt.HISTORY_WRONG
