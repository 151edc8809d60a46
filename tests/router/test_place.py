"""Places on one port, several of them in this process: on real sockets, as separate processes would."""

import asyncio
import contextlib
import os
import socket
import tempfile

import msgspec
import pytest
from router_wire import WAIT_S, client, post, until

from router.errors import ListenError
from router.http import listener
from router.http.server import Limits, Server
from router.openai_api import refusal
from router.place import Place, nobody
from router.port import Member, Port
from router.run_directory import Process

HOST = "127.0.0.1"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The ports' folders, apart from those of fleets that run."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"herd-{os.getuid()}"


class Router:
    """A place, and a server that answers with its name."""

    def __init__(self, name: str, port: int = 0, fleet: str = "ours") -> None:
        async def answer(request, reply):
            reply.send(200, [], name.encode())

        self.server = Server(answer, refusal, Limits())
        self.place = Place(HOST, port, fleet, self.server)

    async def stop(self, successor=nobody):
        await self.place.retire()
        handed_over = await self.place.hand_over(successor)
        await self.server.stop(10, 0.1)
        await self.place.leave()
        return handed_over


@contextlib.asynccontextmanager
async def routers():
    """Gives `router(name, port, fleet)`: one that has claimed its place; all are stopped in the end."""
    made = []

    async def router(*args):
        made.append(Router(*args))
        made[-1].rank = await made[-1].place.claim()
        return made[-1]

    try:
        yield router
    finally:
        for each in made:
            await each.stop()


def sockets(place: Place) -> list[int]:
    """How many sockets each process has, by rank."""
    return [len(member.listeners) for member in place.members if member.open]


def queued(port: int, count: int) -> list[socket.socket]:
    """Connections with a request, which nobody can have accepted: this does not let the event loop run."""
    connections = []
    for _ in range(count):
        connections.append(socket.create_connection((HOST, port)))
        connections[-1].sendall(post("/", b"", "connection: close"))
    return connections


async def answers(connections: list[socket.socket]) -> set[bytes]:
    """Who has answered; fails where one was reset."""
    said = set()
    for connection in connections:
        with connection:
            connection.setblocking(False)
            reply = b""
            while part := await asyncio.wait_for(
                asyncio.get_running_loop().sock_recv(connection, 4096), WAIT_S
            ):
                reply += part
            said.add(reply.rpartition(b"\r\n\r\n")[2])
    return said


async def test_ranks_and_sockets_of_processes_that_come_and_go():
    async with routers() as router:
        first = await router("first")
        await first.place.open()
        port = first.place.port
        second, third = await router("second", port), await router("third", port)
        await second.place.open()
        await third.place.open()
        assert [first.rank, second.rank, third.rank] == [0, 1, 2]
        assert sockets(first.place) == [1, 1, 1]
        known = {number for member in first.place.members for number in member.listeners}
        await second.stop()
        assert sorted(sockets(first.place)) == [1, 2]
        fourth = await router("fourth", port)
        await fourth.place.open()
        assert fourth.rank == 1
        assert sockets(first.place) == [1, 1, 1]
        assert {number for member in first.place.members for number in member.listeners} == known


async def test_what_is_queued_at_a_leaving_process_is_answered():
    async with routers() as router:
        first = await router("first")
        second = await router("second", first.place.port)
        await first.place.open()
        await second.place.open()
        connections = queued(first.place.port, 40)
        stopping = asyncio.create_task(first.stop())
        assert await answers(connections) <= {b"first", b"second"}
        assert await stopping
        assert await answers(queued(first.place.port, 40)) == {b"second"}


async def test_the_only_process_accepts_until_its_successor_has_its_socket():
    asked = asyncio.Event()

    async def coming():
        asked.set()
        return True

    async with routers() as router:
        first = await router("first")
        await first.place.open()
        (before,) = first.place.members
        stopping = asyncio.create_task(first.stop(coming))
        await asyncio.wait_for(asked.wait(), WAIT_S)
        assert await answers(queued(first.place.port, 10)) == {b"first"}
        second = await router("second", first.place.port)
        assert second.rank == 0
        assert await answers(queued(first.place.port, 10)) == {b"first"}
        await second.place.open()
        assert await answers(queued(first.place.port, 10)) == {b"second"}
        assert await stopping
        (after,) = second.place.members
        assert after.listeners == before.listeners


async def test_the_last_process_answers_what_is_queued_and_leaves_nothing(folder):
    async with routers() as router:
        only = await router("only")
        await only.place.open()
        connections = queued(only.place.port, 40)
        stopping = asyncio.create_task(only.stop())
        assert await answers(connections) == {b"only"}
        assert not await stopping
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(HOST, only.place.port)
        assert list(folder.iterdir()) == []


async def test_a_process_that_is_ended_while_it_starts_takes_nothing():
    """Serve calls the destructor of a router whose constructor still runs, and then kills it."""
    async with routers() as router:
        first = await router("first")
        await first.place.open()
        second = await router("second", first.place.port)
        await second.stop()
        await second.place.open()
        assert sockets(first.place) == [1]
        assert await answers(queued(first.place.port, 10)) == {b"first"}


async def test_a_process_that_does_not_answer_is_passed_over():
    async with routers() as router:
        first = await router("first")
        await first.place.open()
        (it,) = first.place.members
        port = Port(first.place.port)
        async with port.locked():  # one that is said to be there, and has no control socket
            port.write(msgspec.structs.replace(it, name="mute", rank=1))
        assert not await first.stop()
        async with port.locked():
            port.forget("mute")


async def test_a_listener_of_others_is_refused_by_name():
    with listener.listen(HOST, 0, shared=True) as theirs:
        port = theirs.getsockname()[1]
        told = rf"port {port} is taken: .+ \(process {os.getpid()}\) listens on it"
        with pytest.raises(ListenError, match=told):
            await Router("ours", port).place.claim()


async def test_a_listener_that_comes_between_claim_and_open_is_refused():
    async with routers() as router:
        ours = await router("ours")
        told = pytest.raises(ListenError, match="is taken")
        with listener.listen(HOST, ours.place.port, shared=True), told:
            await ours.place.open()


async def test_another_fleet_is_refused_until_it_only_finishes_its_streams():
    async with routers() as router:
        theirs = await router("theirs", 0, "theirs")
        port = theirs.place.port
        told = rf"port {port} is taken: another fleet has it \(theirs, process {os.getpid()}\)"
        with pytest.raises(ListenError, match=told):
            await Router("ours", port).place.claim()
        await theirs.place.open()
        with pytest.raises(ListenError, match=told):
            await Router("ours", port).place.claim()
        await theirs.place.retire()
        await theirs.place.hand_over(nobody)
        ours = await router("ours", port)
        assert ours.rank == 0


async def test_the_dead_are_forgotten():
    async with routers() as router:
        ours = await router("ours")
        port = Port(ours.place.port)
        async with port.locked():  # the id is this process's, the start is not
            port.write(Member("dead", Process(os.getpid(), 1), "theirs", rank=1, listeners=(1,)))
        assert [member.rank for member in port.members()] == [0]
        second = await router("second", ours.place.port)
        assert second.rank == 1


async def test_a_folder_that_others_may_enter_is_refused(folder):
    folder.mkdir(mode=0o755)
    ours = Router("ours")
    with pytest.raises(ListenError, match="nobody else may enter"):
        await ours.place.claim()
    await ours.stop()


async def test_a_kept_connection_ends_with_a_reply_that_says_so():
    async with routers() as router:
        first = await router("first")
        second = await router("second", first.place.port)
        await first.place.open()
        async with client(first.place.port) as kept:
            await kept.send(post("/", b""))
            assert "connection" not in (await kept.reply())[1]
            await second.place.open()
            await first.place.retire()
            stopping = asyncio.create_task(first.server.stop(10, 10))
            await until(lambda: first.server.closing)
            await kept.send(post("/", b""))
            _, headers, body = await kept.reply()
            assert (headers["connection"], body) == ("close", b"first")
            assert await kept.at_end()
            await stopping


async def test_a_record_that_cannot_be_read_is_named():
    """Another version's, left behind by a process that was killed."""
    router = Router("a")
    with listener.bind(HOST, 0, shared=True) as bound:
        router.place.port = bound.getsockname()[1]
    port = Port(router.place.port)
    async with port.locked():
        record = port._path / "old.json"
        record.write_bytes(b'{"name":"old"}')
        with pytest.raises(ListenError, match=f"{record} cannot be read"):
            port.members()
        record.unlink()
