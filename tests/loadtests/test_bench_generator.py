"""The generator notices every reply that is not what the engines sent."""

import asyncio
import contextlib
import time

import pytest

from loadtests import mock_engine
from loadtests.generator import BrokenReply, Sample, check, request, run, same

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = mock_engine.events(4, ids=False, usage=False)
TEXT = mock_engine.text(4)


def chunked(*payloads: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in payloads) + b"0\r\n\r\n"


def test_a_whole_stream_passes_however_it_was_chunked() -> None:
    body = b"".join(EVENTS)
    check(HEAD + chunked(*EVENTS), TEXT, stream=True)
    check(HEAD + chunked(body), TEXT, stream=True)
    check(HEAD + chunked(body[:100], body[100:101], body[101:]), TEXT, stream=True)


@pytest.mark.parametrize(
    ("fault", "raw"),
    [
        ("a lost event", HEAD + chunked(*EVENTS[:2], *EVENTS[3:])),
        ("an event twice", HEAD + chunked(*EVENTS[:2], *EVENTS[1:])),
        ("two events exchanged", HEAD + chunked(EVENTS[0], EVENTS[2], EVENTS[1], *EVENTS[3:])),
        ("an altered token", HEAD + chunked(*EVENTS).replace(b" beta", b" bets")),
        ("a cut event", HEAD + chunked(EVENTS[0], EVENTS[1][:-10] + b"\n\n", *EVENTS[2:])),
        ("no [DONE]", HEAD + chunked(*EVENTS[:-1])),
        ("something after [DONE]", HEAD + chunked(*EVENTS, EVENTS[1])),
        ("an error event", HEAD + chunked(*EVENTS[:3], b'data: {"error":{"code":500}}\n\n', EVENTS[-1])),
        ("a chunk longer than its size", HEAD + b"1" + chunked(*EVENTS)),
        ("another status", chunked(*EVENTS).join([HEAD.replace(b"200 OK", b"503 Busy"), b""])),
        ("nothing", b""),
    ],
)
def test_a_stream_that_is_not_whole_is_broken(fault: str, raw: bytes) -> None:
    with pytest.raises(BrokenReply):
        check(raw, TEXT, stream=True)


def test_a_whole_reply_is_compared_by_its_text() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n"
    check(head + mock_engine.completion(), mock_engine.text(1), stream=False)
    with pytest.raises(BrokenReply):
        check(head + mock_engine.completion(), mock_engine.text(2), stream=False)
    with pytest.raises(BrokenReply):
        check(head + b'{"error":{}}', mock_engine.text(1), stream=False)


def test_a_window_in_which_nothing_ran_goes_on() -> None:
    """Replies take 20 ms here; a busy machine makes them take longer than a whole window."""
    sample = asyncio.run(against_a_slow_engine(window_s=0.001))
    assert sample.requests >= 2 and not sample.broken and sample.seconds > 0.02


async def against_a_slow_engine(window_s: float) -> Sample:
    reply = mock_engine.completion()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            while await reader.read(4096):
                await asyncio.sleep(0.02)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(reply), reply))

    async with await asyncio.start_server(serve, "127.0.0.1") as server:
        port = server.sockets[0].getsockname()[1]
        load = same(request(port, mock_engine.MODEL, stream=False), mock_engine.text(1), 1, 0, stream=False)
        return await run(load, [port], window_s, time.process_time)
