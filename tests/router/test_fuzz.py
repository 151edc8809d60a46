"""What nobody thought of: inputs that are nearly right, at the pure parsers and over real sockets.

No parser raises what it does not declare, no client gets a status of ours beyond 499, nothing is kept.
"""

import asyncio
import contextlib
import gc
import re
import sys

import httptools
import pytest
from fuzzing import mutations, split
from request_cases import SHORT, read
from router_wire import WAIT_S, client, engine, post, relaying, reply, says, serving, until

from router import openai_api
from router.errors import BadRequest
from router.http.framing import Chunked, FramingError, Sized
from router.http.requests import Limits
from router.http.sse import EventStream, StreamTooLong

PURE = 100_000  # inputs for each kind of parser
AGAINST_LLHTTP = 20_000
OVER_SOCKETS = 2_000
STATUS_LINE = re.compile(rb"HTTP/1\.1 (\d{3}) ")  # it may follow a body that ends without a line break
# Objects that caches of a fixed size may still take after the first part of the inputs.
CACHED_BLOCKS = 5_000
LIMITS = Limits(head_bytes=1000, headers=20, body_bytes=200)

CHAT = b'{"model":"m","messages":[{"role":"user","content":"hi"}],"temperature":0}'
STREAMED = CHAT.replace(b'"temperature":0', b'"stream":true,"stream_options":{"include_usage":true}')
EVENTS = [
    b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}],"prompt_token_ids":[]}\n\n',
    b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"a"},"token_ids":[5]}]}\r\n\r\n',
    b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":1}}\n\n',
    b'data: {"error":{"message":"gone"}}\n\ndata: [DONE]\n\n',
    b": comment\n\nevent: x\ndata: y\n\n",
]


def read_requests(data, seed):
    requests, error = read(*split(data, seed), limits=LIMITS)
    assert error is None or 400 <= error.status < 500
    for request in requests:
        assert request.target == "*" or request.target.startswith("/")
        assert len(request.body) <= LIMITS.body_bytes and len(request.headers) <= LIMITS.headers


def read_json(data, seed):
    with contextlib.suppress(BadRequest):
        call = openai_api.parse(openai_api.FAMILIES["/v1/chat/completions"], data)
        assert isinstance(call.upstream_body(), bytes)


def read_events(data, seed):
    events = EventStream()
    with contextlib.suppress(StreamTooLong):
        for part in split(data, seed):
            assert isinstance(events.feed(part), bytes)


def read_chunks(data, seed):
    for framing in (Chunked(), Sized(40)):
        with contextlib.suppress(FramingError):
            for part in split(data, seed):
                assert len(framing.feed(part)) <= len(data)
                if framing.done:
                    break


PARSERS = {
    "requests": (read_requests, SHORT),
    "JSON bodies": (read_json, [CHAT, STREAMED, b'{"a":' * 50 + b"1" + b"}" * 50, b"[1]"]),
    "events": (read_events, [b"".join(EVENTS), *EVENTS]),
    "chunked replies": (read_chunks, [b"2;x=y\r\nab\r\n10\r\n" + b"c" * 16 + b"\r\n0\r\nt: r\r\n\r\n"]),
}


@pytest.mark.parametrize("kind", PARSERS)
def test_no_input_breaks_a_parser_or_stays_in_memory(kind):
    parser, examples = PARSERS[kind]
    early = 0
    for n, data in enumerate(mutations(examples, seed=3, count=PURE)):
        if n == PURE // 10:
            early = allocated()
        try:
            parser(data, n)
        except Exception as error:
            raise AssertionError(f"input {n}: {data!r}") from error
    assert allocated() - early < CACHED_BLOCKS


def test_where_llhttp_takes_a_request_too_both_read_the_same():
    """A reader of other authors: whoever finds other ends of requests than it does could be smuggled past."""
    both = 0
    for data in mutations(SHORT, seed=6, count=AGAINST_LLHTTP):
        mine = [(r.method.encode(), r.headers, r.body) for r in until_close(read(data, limits=Limits())[0])]
        with contextlib.suppress(httptools.HttpParserUpgrade):  # it leaves out the body then
            theirs = LLHTTP.read(data)
            common = min(len(mine), len(theirs))
            assert mine[:common] == theirs[:common], data
            both += common
    assert both > AGAINST_LLHTTP / 20


def until_close(requests):
    """Those up to the last that the connection takes."""
    last = next((n for n, request in enumerate(requests, 1) if not request.keep_alive), None)
    return requests[:last]


class LLHTTP:
    """Requests as httptools reads them, by its callbacks."""

    @classmethod
    def read(cls, data):
        """Method, headers and body of each request that is there whole."""
        reader = cls()
        reader.parser, reader.requests = httptools.HttpRequestParser(reader), []
        with contextlib.suppress(httptools.HttpParserError):
            reader.parser.feed_data(data)
        return reader.requests

    def on_message_begin(self):
        self.headers, self.body, self.in_head = [], b"", True

    def on_header(self, name, value):
        if self.in_head:
            self.headers.append((name.lower(), value.strip()))

    def on_headers_complete(self):
        self.in_head = False

    def on_body(self, body):
        self.body += body

    def on_message_complete(self):
        self.requests.append((self.parser.get_method(), self.headers, self.body))


def allocated():
    gc.collect()
    return sys.getallocatedblocks()


async def test_over_sockets_every_request_is_answered_and_none_breaks_the_server():
    """Half of the inputs are requests of any kind, half are chat requests whose body is nearly right."""
    heads = mutations([*SHORT, post("/v1/chat/completions", CHAT)], seed=4, count=OVER_SOCKETS // 2)
    bodies = mutations([CHAT, STREAMED], seed=5, count=OVER_SOCKETS // 2)
    inputs = [*heads, *(post("/v1/chat/completions", body) for body in bodies)]
    async with (
        engine(says(reply(b'{"id":"x"}'))) as (_, url),
        relaying(url) as (relay, fleet, _),
        serving(relay) as (server, port),
    ):
        for n in range(0, OVER_SOCKETS, 50):
            batch = enumerate(inputs[n : n + 50], n)
            await asyncio.gather(*(ask(port, data, seed) for seed, data in batch))
            async with client(port) as c:
                await c.send(post("/v1/chat/completions", CHAT))
                assert (await c.reply())[::2] == (200, b'{"id":"x"}')
        await until(lambda: not server.connections)
        assert fleet.get("r0").in_flight == 0


async def ask(port, data, seed):
    """Sends these bytes and waits for as many replies as there are requests in them, and a refusal."""
    requests, error = read(data, limits=Limits())
    answered = until_close(requests)
    refused = error is not None and all(request.keep_alive for request in answered)
    expected = len(answered) + refused
    statuses = []
    async with client(port) as c:
        with contextlib.suppress(ConnectionError):  # what follows a refusal may not be taken
            for part in split(data, seed):
                await c.send(part)
        while len(statuses) < expected:
            line = await asyncio.wait_for(c.reader.readline(), WAIT_S)
            assert line, f"{len(statuses)} replies instead of {expected} to {data!r}"
            if (match := STATUS_LINE.search(line)) and match[1] != b"100":
                statuses.append(int(match[1]))
    assert all(200 <= status < 500 for status in statuses), f"{statuses} for {data!r}"
    if refused:
        assert statuses[-1] == error.status
