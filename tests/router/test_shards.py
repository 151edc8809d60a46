"""The fleet divided between two routers: each knows its share, and passes on what the other owns."""

import asyncio
import contextlib
from dataclasses import dataclass

import msgspec
from router_wire import LAST_CHUNK, VLLM_PAGES, WAIT_S, answering, client, engine, post, reply, stream, until

from router.config import RouterConfig
from router.front import FrontDoor
from router.health import Endpoint
from router.keys import hash_of

# Of so many all routers have some, whatever their names.
REPLICAS = 16
TALKS = [f"conversation {n}" for n in range(16)]


@dataclass
class Router:
    """A router in front of replicas that are all one engine."""

    front: FrontDoor

    @property
    def port(self):
        return self.front.port

    @property
    def answered(self):
        """Requests that it placed."""
        return sum(standing.finished for standing in self.front.fleet)

    def outcomes(self):
        return {outcome: count.value for outcome, count in self.front.metrics.relayed_to_owner.items()}


@contextlib.asynccontextmanager
async def router(name, url, **settings):
    config = RouterConfig(
        host="127.0.0.1", port=0, admin_port=0, policy="least_requests", replicas=2, shards=2, **settings
    )
    front = FrontDoor(config, fleet=name)
    await front.start()
    front.membership(Endpoint(f"r{n}", url) for n in range(REPLICAS))
    await front.open()
    try:
        yield Router(front)
    finally:
        await front.stop(0)


@contextlib.asynccontextmanager
async def two_routers(script, **settings):
    async with (
        engine(script) as (it, url),
        router("one", url, **settings) as one,
        router("two", url, **settings) as two,
    ):
        for each in (one, two):
            each.front.meet([one.front.contact, two.front.contact])
        await until(
            lambda: len(shares := [share(each) for each in (one, two)]) == 2 and not shares[0] & shares[1]
        )
        yield it, one, two


def share(router):
    """The replicas that it offers."""
    return {standing.id for standing in router.front.fleet.view("m").replicas}


async def says(request, reader, writer):
    """An engine that answers in one piece, or as a stream of one event."""
    if b'"stream":true' in request:
        writer.write(stream(EVENT % b"Hello", b"data: [DONE]\n\n") + LAST_CHUNK)
    elif request.startswith(b"POST "):
        writer.write(reply(b'{"id":"resp_1"}'))
    else:
        await answering(VLLM_PAGES)(request, reader, writer)


async def endless(request, reader, writer):
    """The same, but its streams go on until the client leaves."""
    if b'"stream":true' not in request:
        await says(request, reader, writer)
        return
    writer.write(stream(EVENT % b"Hello"))
    await reader.read(1)
    raise ConnectionResetError


EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":'
    b'0,"delta":{"content":"%b"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
)


def chat(said, *headers, **fields):
    body = {"model": "m", "messages": [{"role": "user", "content": said}], **fields}
    return post("/v1/chat/completions", msgspec.json.encode(body), *headers)


async def told(port, message):
    async with client(port) as c:
        await c.send(message)
        return await c.reply()


async def owned_by(router, seen_from, *headers):
    """Something said that belongs to one router, found by asking the other."""
    for said in TALKS:
        before = router.answered
        await told(seen_from.port, chat(said, *headers))
        if router.answered > before:
            return said
    raise AssertionError(f"none of {len(TALKS)} conversations belongs to it")


async def test_a_conversation_meets_one_router_whichever_it_reaches():
    async with two_routers(says) as (_, one, two):
        by_one = []
        for said in TALKS:
            before = one.answered
            for each in (one, two):
                assert (await told(each.port, chat(said)))[0] == 200
            by_one.append(one.answered - before)
        assert set(by_one) == {0, 2}
        assert one.outcomes()["passed"] + two.outcomes()["passed"] == len(TALKS)
        counts = [r.front.metrics.requests("m", "/v1/chat/completions", "200").value for r in (one, two)]
        assert counts == [one.answered, two.answered]  # each counts where it was placed


async def test_each_router_places_on_its_share():
    async with two_routers(says) as (_, one, two):
        assert share(one) | share(two) == {f"r{n}" for n in range(REPLICAS)}
        for said in TALKS:
            await told(one.port, chat(said))
        for each in (one, two):
            assert {s.id for s in each.front.fleet if s.finished} <= share(each)


async def test_a_stream_passes_through_as_it_is():
    async with two_routers(says) as (it, one, two):
        said = await owned_by(two, seen_from=one)
        asked = chat(said, "x-request-id: mine", "x-custom: kept", stream=True)
        here, there = await told(two.port, asked), await told(one.port, asked)
        assert here == there
        assert (here[0], here[1]["x-request-id"]) == (200, "mine")
        assert here[2].endswith(b"data: [DONE]\n\n")
        *_, last, again = (request for request in it.requests if request.startswith(b"POST "))
        assert last == again
        assert b"x-custom: kept" in last


async def test_what_has_no_owner_is_answered_where_it_arrives():
    async with two_routers(says) as (_, one, two):
        for message in (
            b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n",
            post("/v1/embeddings", b'{"model":"m","input":"x"}'),
            post("/v1/responses", b'{"model":"m","input":"x","previous_response_id":"resp_1"}'),
            chat("x", model="unheard of"),
            chat("x", model=None),
        ):
            await told(one.port, message)
        assert two.answered == 0
        assert one.outcomes() == {"passed": 0, "failed": 0}


async def test_what_was_passed_on_is_not_passed_on_again():
    async with two_routers(says) as (_, one, two):
        said = await owned_by(two, seen_from=one)
        before = one.answered
        await told(one.front.contact.direct, chat(said))
        assert one.answered == before + 1


async def test_a_key_is_asked_for_wherever_a_request_arrives_and_is_passed_on_to_its_owner():
    key = "authorization: Bearer the key"
    async with two_routers(says, tenants={"keys": [hash_of("the key")]}) as (it, one, two):
        said = await owned_by(two, one, key)
        for port in (one.port, two.port, one.front.contact.direct, two.front.contact.direct):
            assert (await told(port, chat(said, key)))[0] == 200
            assert (await told(port, chat(said)))[0] == 401
        assert one.outcomes()["passed"] > 0
        assert not any(b"the key" in request for request in it.requests)


async def test_a_request_whose_owner_is_gone_is_answered_here():
    async with two_routers(says) as (_, one, two):
        said = await owned_by(two, seen_from=one)
        before = one.answered
        await two.front._direct.stop(0)
        assert (await told(one.port, chat(said)))[0] == 200
        assert one.answered == before + 1
        assert one.outcomes()["failed"] == 1


async def test_once_a_router_is_silent_all_belongs_to_the_other():
    async with two_routers(says) as (_, one, two):
        said = await owned_by(two, seen_from=one)
        two.front._gossip.stop()
        await until(lambda: len(share(one)) == REPLICAS)
        before = one.answered
        assert (await told(one.port, chat(said)))[0] == 200
        assert one.answered == before + 1
        assert one.outcomes()["failed"] == 0


async def test_a_stream_whose_owner_dies_is_cut_not_ended():
    async with two_routers(endless) as (_, one, two):
        said = await owned_by(two, seen_from=one)
        async with client(one.port) as c:
            await c.send(chat(said, stream=True))
            await c.head()
            assert b"Hello" in await anext(c.chunks())
            for connection in list(two.front._direct.connections):
                connection.abort()
            assert await c.at_end()


async def test_a_client_that_leaves_is_told_to_the_engine_behind_the_owner():
    async with two_routers(endless) as (it, one, two):
        said = await owned_by(two, seen_from=one)
        async with client(one.port) as c:
            await c.send(chat(said, stream=True))
            await c.head()
            assert sum(s.in_flight for s in two.front.fleet) == 1
        await until(lambda: not any(s.in_flight for s in two.front.fleet))
        await asyncio.wait_for(it.disconnected.wait(), WAIT_S)
