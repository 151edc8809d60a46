"""An open loop sends when it is time, and notices every stream that is not what was expected."""

import asyncio
import contextlib
import itertools

import pytest

from loadtests import generator, mock_engine, open_loop
from loadtests.generator import Ask, BrokenReply

SAID = mock_engine.text(2)
EVENTS = mock_engine.events(2, ids=False, usage=False)
STREAM = b"".join(
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        *(b"%x\r\n%b\r\n" % (len(event), event) for event in EVENTS),
        b"0\r\n\r\n",
    ]
)
ASK = Ask(generator.message(1, b"{}"), SAID)


class Engine:
    """Answers nobody before so many have asked, then all at once."""

    def __init__(self, patience: int, reply: bytes = STREAM) -> None:
        self.asked = 0
        self.connections = 0
        self._patience = patience
        self._reply = reply
        self._all_here = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n{}")
                self.asked += 1
                if self.asked >= self._patience:
                    self._all_here.set()
                await self._all_here.wait()
                writer.write(self._reply)


async def asked(engine: Engine, moments: list[float]) -> list[float]:
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        try:
            return await open_loop.run(itertools.repeat(ASK, len(moments)), moments, port)
        finally:
            while asyncio.all_tasks() - {asyncio.current_task()}:  # those who serve see the end
                await asyncio.sleep(0)


def test_requests_do_not_wait_for_those_before() -> None:
    async def sent() -> None:
        engine = Engine(patience=5)
        first_s = await asked(engine, [0.0] * 5)
        assert engine.asked == engine.connections == len(first_s) == 5
        assert min(first_s) > 0

    asyncio.run(sent())


def test_an_idle_connection_is_used_again() -> None:
    async def sent() -> None:
        engine = Engine(patience=1)
        await asked(engine, [0.0, 0.2, 0.4])
        assert (engine.asked, engine.connections) == (3, 1)

    asyncio.run(sent())


@pytest.mark.parametrize(
    "reply",
    [
        STREAM.replace(b" beta", b" bets"),
        STREAM.replace(b"200 OK", b"503 Busy"),
        b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
def test_a_reply_that_was_not_expected_ends_the_run(reply: bytes) -> None:
    with pytest.raises(BrokenReply):
        asyncio.run(asked(Engine(patience=1, reply=reply), [0.0]))


def test_arrivals_have_their_rate_and_only_the_seed_decides_them() -> None:
    moments = open_loop.arrivals(50.0, 100.0, "a")
    assert len(moments) == 5000 and moments == sorted(moments)
    assert moments[-1] == pytest.approx(100.0, rel=0.05)
    assert open_loop.arrivals(50.0, 100.0, "a") == moments != open_loop.arrivals(50.0, 100.0, "b")
