"""Requests passed on to the router that owns them: two routers, each in front of an engine of its own."""

import asyncio
import contextlib
from dataclasses import dataclass

import msgspec
from router_wire import LAST_CHUNK, VLLM_PAGES, Engine, answering, client, engine, post, reply, stream, until

from router.config import RouterConfig
from router.front import FrontDoor
from router.health import Endpoint

TALKS = [f"conversation {n}" for n in range(12)]


@dataclass
class Router:
    """A router and what is behind it: who has answered shows at the engine."""

    front: FrontDoor
    engine: Engine

    @property
    def port(self):
        return self.front.port

    @property
    def asked(self):
        """Bodies of the requests that its engine got, less those of probes."""
        return [body for r in self.engine.requests if (body := r.partition(b"\r\n\r\n")[2])]

    def outcomes(self):
        return {outcome: count.value for outcome, count in self.front.metrics.relayed_to_owner.items()}


@contextlib.asynccontextmanager
async def router(name, script):
    async with engine(script) as (it, url):
        config = RouterConfig(host="127.0.0.1", port=0, admin_port=0, replicas=2, shards=2)
        front = FrontDoor(config, fleet=name)
        await front.start()
        front.membership([Endpoint(name, url)])
        await front.open()
        try:
            yield Router(front, it)
        finally:
            await front.stop(0)


@contextlib.asynccontextmanager
async def two_routers(script):
    async with router("one", script) as one, router("two", script) as two:
        for each in (one, two):
            each.front.meet([one.front.contact, two.front.contact])
        await until(
            lambda: all(
                each.front.metrics.registry.get_sample_value("herd_gossip_peers") for each in (one, two)
            )
        )
        yield one, two


def says_who(extra=()):
    """Answers with its own port, as one piece or as a stream of two events."""
    pages = {**VLLM_PAGES, **dict(extra)}

    async def script(request, reader, writer):
        if b'"stream":true' in request:
            writer.write(stream(EVENT % b"Hello", b"data: [DONE]\n\n") + LAST_CHUNK)
        elif request.startswith(b"POST /v1/chat/completions"):
            writer.write(reply(b'{"port":%d}' % writer.get_extra_info("sockname")[1]))
        else:
            await answering(pages)(request, reader, writer)

    return script


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


async def owned_by(two, one, count=20):
    """Something said that belongs to the first of these routers, seen from the second."""
    for said in (f"try {n}" for n in range(count)):
        before = len(two.asked)
        await told(one.port, chat(said))
        if len(two.asked) > before:
            return said
    raise AssertionError(f"none of {count} belongs to it")


async def test_a_conversation_meets_one_router_whichever_it_reaches():
    async with two_routers(says_who()) as (one, two):
        answers = [{(await told(each.port, chat(said)))[2] for each in (one, two)} for said in TALKS]
        assert [len(answer) for answer in answers] == [1] * len(TALKS)
        assert len(set.union(*answers)) == 2
        passed = one.outcomes()["passed"] + two.outcomes()["passed"]
        assert passed == len(TALKS)
        counts = [
            f.metrics.requests("m", "/v1/chat/completions", "200").value for f in (one.front, two.front)
        ]
        assert sum(counts) == 2 * len(TALKS)  # each is counted once, where it was placed


async def test_a_stream_passes_through_as_it_is():
    async with two_routers(says_who()) as (one, two):
        said = await owned_by(two, one)
        asked = chat(said, "x-request-id: mine", "x-custom: kept", stream=True)
        here, there = await told(two.port, asked), await told(one.port, asked)
        assert here == there
        assert (here[0], here[1]["x-request-id"]) == (200, "mine")
        assert here[2].endswith(b"data: [DONE]\n\n")
        assert two.engine.requests[-1] == two.engine.requests[-2]
        assert b"x-custom: kept" in two.engine.requests[-1]


async def test_what_has_no_owner_is_answered_where_it_arrives():
    async with two_routers(says_who({b"/v1/responses": reply(b'{"id":"resp_1"}')})) as (one, two):
        for message in (
            b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n",
            post("/v1/embeddings", b'{"model":"m","input":"x"}'),
            post("/v1/responses", b'{"model":"m","input":"x","previous_response_id":"resp_1"}'),
            chat("x", model=None),
        ):
            await told(one.port, message)
        assert not two.asked
        assert one.outcomes() == {"passed": 0, "failed": 0}


async def test_what_was_passed_on_is_not_passed_on_again():
    async with two_routers(says_who()) as (one, two):
        said = await owned_by(two, one)
        await told(one.front.contact.direct, chat(said))
        assert said.encode() in one.asked[-1]


async def test_a_request_whose_owner_is_gone_is_answered_here():
    async with two_routers(says_who()) as (one, two):
        said = await owned_by(two, one)
        await two.front._direct.stop(0)
        status, _, body = await told(one.port, chat(said))
        assert (status, body) == (200, b'{"port":%d}' % one.engine.port)
        assert one.outcomes()["failed"] == 1


async def test_once_a_router_is_silent_its_requests_belong_to_others():
    async with two_routers(says_who()) as (one, two):
        said = await owned_by(two, one)
        two.front._gossip.stop()
        await until(lambda: not one.front._gossip.others)
        assert (await told(one.port, chat(said)))[2] == b'{"port":%d}' % one.engine.port
        assert one.outcomes()["failed"] == 0


async def test_a_stream_whose_owner_dies_is_cut_not_ended():
    arrived = asyncio.Event()

    async def endless(request, reader, writer):
        if b'"stream":true' in request:
            writer.write(stream(EVENT % b"Hello"))
            await arrived.wait()
        else:
            await says_who()(request, reader, writer)

    async with two_routers(endless) as (one, two):
        said = await owned_by(two, one)
        async with client(one.port) as c:
            await c.send(chat(said, stream=True))
            await c.head()
            assert b"Hello" in await anext(c.chunks())
            for connection in list(two.front._direct.connections):
                connection.abort()
            assert await c.at_end()
        arrived.set()


async def test_a_client_that_leaves_is_told_to_the_engine_behind_the_owner():
    async def endless(request, reader, writer):
        if b'"stream":true' in request:
            writer.write(stream(EVENT % b"Hello"))
            await reader.read(1)
            raise ConnectionResetError
        await says_who()(request, reader, writer)

    async with two_routers(endless) as (one, two):
        said = await owned_by(two, one)
        two.engine.disconnected.clear()
        async with client(one.port) as c:
            await c.send(chat(said, stream=True))
            await c.head()
        await asyncio.wait_for(two.engine.disconnected.wait(), 10)
        await until(lambda: not two.front.fleet.get("two").in_flight)
