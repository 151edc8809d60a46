"""The affinity key, and requests that find their replica by it."""

import json
from contextlib import AsyncExitStack, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from router_wire import client, engine, post, relaying, reply, says

from router.affinity import MESSAGE_BYTES, PROMPT_BYTES, affinity_key
from router.core.placement import consistent_hash, power_of_two, random
from router.errors import BadRequest
from router.openai_api import FAMILIES, parse

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def key(path, members, *headers):
    call = parse(FAMILIES[path], json.dumps({"model": "m", **members}).encode())
    return affinity_key(call, [(name.encode(), value.encode()) for name, value in headers])


def message(role, content):
    return {"role": role, "content": content}


RULES, HELLO, HI = message("system", "be good"), message("user", "hello"), message("user", "hi")
ANSWER, MORE = message("assistant", "yes?"), message("user", "go on")
ASKED = {"messages": [RULES, HELLO]}
IMAGE = message("user", [{"type": "image_url", "image_url": {"url": "data:"}}])


@pytest.mark.parametrize(
    ("path", "first", "later"),
    [
        (CHAT, {"messages": [HELLO]}, {"messages": [HELLO, ANSWER, MORE]}),
        (CHAT, {"messages": [RULES, HELLO]}, {"messages": [RULES, HELLO, ANSWER, MORE], "stream": True}),
        (CHAT, {"messages": [RULES, RULES, ANSWER, HELLO]}, {"messages": [RULES, RULES, ANSWER, HELLO, 3]}),
        (CHAT, {"messages": [IMAGE]}, {"messages": [IMAGE, ANSWER]}),
        (MESSAGES, {"system": "s", "messages": [HELLO]}, {"system": "s", "messages": [HELLO, ANSWER, MORE]}),
        (RESPONSES, {"input": [HELLO]}, {"input": [HELLO, {"type": "reasoning"}, ANSWER, MORE]}),
        (RESPONSES, {"input": "hello"}, {"input": [HELLO, ANSWER, MORE]}),
        (TEXT, {"prompt": "a" * PROMPT_BYTES}, {"prompt": "a" * PROMPT_BYTES + "b"}),
        (TEXT, {"prompt": [7] * PROMPT_BYTES}, {"prompt": [7] * PROMPT_BYTES + [8]}),
        (CHAT, {"prompt_cache_key": "k", "messages": [HELLO]}, {"prompt_cache_key": "k", "messages": [HI]}),
    ],
)
def test_turns_of_one_conversation_have_one_key(path, first, later):
    assert key(path, first) == key(path, later) is not None


@pytest.mark.parametrize(
    ("path", "one", "other"),
    [
        (CHAT, {"messages": [RULES, HELLO]}, {"messages": [RULES, HI]}),
        (CHAT, {"messages": [RULES, HELLO]}, {"messages": [message("system", "be bad"), HELLO]}),
        (
            CHAT,
            {"messages": [HELLO], "prompt_cache_key": "k"},
            {"messages": [HELLO], "prompt_cache_key": "l"},
        ),
        (MESSAGES, {"system": "s", "messages": [HELLO]}, {"system": "s", "messages": [HI]}),
        (MESSAGES, {"system": "s", "messages": [HELLO]}, {"system": [{"text": "s"}], "messages": [HELLO]}),
        (RESPONSES, {"instructions": "s", "input": "hello"}, {"instructions": "s", "input": "hi"}),
        (RESPONSES, {"instructions": "s", "input": "hello"}, {"instructions": "t", "input": "hello"}),
        (TEXT, {"prompt": "hello"}, {"prompt": "hi"}),
        (CHAT, {"messages": [HELLO]}, {"messages": [HELLO], "model": "lora"}),
        (CHAT, {"cache_salt": "a", **ASKED}, {"cache_salt": "b", **ASKED}),
    ],
)
def test_different_conversations_have_different_keys(path, one, other):
    assert None not in (key(path, one), key(path, other))
    assert key(path, one) != key(path, other)


@pytest.mark.parametrize(
    "name", ["x-session-id", "x_session_id", "x-smg-routing-key", "x-claude-code-session-id"]
)
def test_a_session_header_comes_first(name):
    told = key(CHAT, {**ASKED, "prompt_cache_key": "k"}, ("accept", "a"), (name, "s"))
    assert told == key("/v1/embeddings", {"input": "text"}, ("x-session-id", "s"))
    assert told != key(CHAT, {**ASKED, "prompt_cache_key": "k"}, (name, "t"))


def test_of_several_session_headers_one_wins_whatever_their_order():
    mine, other = ("x-session-id", "s"), ("x-smg-routing-key", "t")
    assert key(CHAT, ASKED, mine, other) == key(CHAT, ASKED, other, mine) == key(CHAT, ASKED, mine)
    assert key(CHAT, ASKED, ("x-session-id", ""), other) == key(CHAT, ASKED, other)


@pytest.mark.parametrize(
    ("members", "headers"),
    [({}, [("x-session-id", "")]), *[({"prompt_cache_key": k}, []) for k in ("", None, 3)]],
)
def test_what_names_nothing_is_passed_over(members, headers):
    assert key(CHAT, {**ASKED, **members}, *headers) == key(CHAT, ASKED)


@pytest.mark.parametrize(
    ("path", "members"),
    [
        (CHAT, {}),
        (CHAT, {"messages": None}),
        (CHAT, {"messages": []}),
        (CHAT, {"messages": {"role": "user"}}),
        (CHAT, {"messages": [None]}),
        (CHAT, {"messages": [{"role": 3, "content": "x"}]}),
        (MESSAGES, {"system": "s"}),
        (RESPONSES, {"instructions": "s", "input": []}),
        (TEXT, {"prompt": ""}),
        (TEXT, {"prompt": []}),
        (TEXT, {"prompt": 3}),
        (TEXT, {"prompt": {"a": 1}}),
        ("/v1/embeddings", {"input": "text"}),
        ("/tokenize", {"messages": [HELLO]}),
    ],
)
def test_where_nothing_tells_there_is_no_key(path, members):
    assert key(path, members) is None


@pytest.mark.parametrize("path", [CHAT, TEXT, MESSAGES, RESPONSES])
@given(
    members=st.dictionaries(
        st.sampled_from(["messages", "system", "input", "instructions", "prompt", "prompt_cache_key"]),
        json_values | st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": json_values})),
    )
)
def test_nothing_in_a_body_is_an_error(path, members):
    told = key(path, members)
    assert told is None or 0 <= told < 2**64


def test_a_role_that_is_not_text_is_no_error():
    call = parse(FAMILIES[CHAT], b'{"model":"m","messages":[{"role":"\xff","content":"x"}]}')
    assert affinity_key(call, []) is None


def test_what_is_nested_as_deeply_as_a_body_may_be_is_no_error():
    depth = 2
    with suppress(BadRequest):
        while True:
            call = parse(FAMILIES[CHAT], b'{"model":"m","messages":' + b"[" * depth + b"]" * depth + b"}")
            assert affinity_key(call, []) is None
            depth += 1
    assert depth > 100


@pytest.mark.parametrize(
    ("path", "members"),
    [
        (CHAT, lambda text: {"messages": [message("user", text)]}),
        (CHAT, lambda text: {"messages": [message("system", text), HELLO]}),
        (CHAT, lambda text: {"messages": [HELLO], "prompt_cache_key": text}),
        (MESSAGES, lambda text: {"messages": [HELLO], "system": text}),
        (RESPONSES, lambda text: {"input": text}),
    ],
)
def test_only_the_beginning_of_a_long_text_counts(path, members):
    long = "x" * MESSAGE_BYTES
    assert key(path, members(long + "a")) == key(path, members(long + "b"))
    assert key(path, members(long[:-9] + "a")) != key(path, members(long[:-9] + "b"))


def test_what_the_user_says_counts_after_rules_of_any_length():
    rules = message("system", "x" * MESSAGE_BYTES)
    assert key(CHAT, {"messages": [rules, HELLO]}) != key(CHAT, {"messages": [rules, HI]})


# -- over sockets

OK = says(reply(b"{}"))
TURNS = [[HELLO], [HELLO, ANSWER, MORE], [HELLO, ANSWER, MORE, ANSWER, MORE]]


async def served(engines, port, requests):
    """Which engine answered each of these requests, sent one after the other."""
    places = []
    async with client(port) as c:
        for request in requests:
            before = [len(it.requests) for it in engines]
            await c.send(request)
            assert (await c.reply())[0] == 200
            places += [i for i, it in enumerate(engines) if len(it.requests) > before[i]]
    return places


def turns_of(session):
    """The turns of a session that is told by a header, by a cache key, or only by its words."""
    asked = [{"model": "m", "messages": messages} for messages in TURNS]
    if session.startswith("header"):
        return [post(CHAT, json.dumps(body).encode(), f"X-Session-Id: {session}") for body in asked]
    if session.startswith("cache"):
        return [post(CHAT, json.dumps({**body, "prompt_cache_key": session}).encode()) for body in asked]
    return [post(CHAT, json.dumps(body).replace("hello", session).encode()) for body in asked]


async def started(stack, count):
    pairs = [await stack.enter_async_context(engine(OK)) for _ in range(count)]
    return [it for it, _ in pairs], [url for _, url in pairs]


@pytest.mark.parametrize("kind", ["header", "cache key", "words"])
async def test_turns_of_a_session_meet_one_engine_and_sessions_spread(kind):
    async with AsyncExitStack() as stack:
        engines, urls = await started(stack, 3)
        _, _, port = await stack.enter_async_context(relaying(*urls, policy=consistent_hash))
        places = [set(await served(engines, port, turns_of(f"{kind} {i}"))) for i in range(12)]
    assert all(len(place) == 1 for place in places)
    assert set.union(*places) == {0, 1, 2}


async def test_a_new_router_moves_the_sessions_of_a_dead_engine_and_no_others():
    sessions = [turns_of(f"header {i}")[0] for i in range(12)]
    async with AsyncExitStack() as stack:
        engines, urls = await started(stack, 3)
        async with relaying(*urls, policy=consistent_hash) as (_, _, port):
            before = await served(engines, port, sessions)
        await engines[0].stop()
        async with relaying(*urls, policy=consistent_hash) as (_, _, port):
            after = await served(engines, port, sessions)
    assert 0 in before
    assert 0 not in after
    assert all(old in (new, 0) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("policy", [random, power_of_two])
async def test_policies_that_draw_are_given_chance(policy):
    """32 requests to idle engines: all on one of two happens once in two thousand million times."""
    async with AsyncExitStack() as stack:
        engines, urls = await started(stack, 2)
        _, _, port = await stack.enter_async_context(relaying(*urls, policy=policy))
        assert set(await served(engines, port, turns_of("words")[:1] * 32)) == {0, 1}
