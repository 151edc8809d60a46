"""What one router process has of a port: a rank, and listening sockets that pass from process to process.

Every process listens on a socket of its own (SO_REUSEPORT), and the kernel spreads connections over them. It
also resets what is queued at such a socket when the last process that has it closes it. So none is closed
while the fleet has another process on the port: who leaves passes its sockets on, and who comes takes one
that is to spare before it makes another. There are as many sockets as processes, however many come and go.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from router.errors import ListenError
from router.http import listener
from router.http.server import Server
from router.port import Contact, Member, Port
from router.run_directory import this_process

log = logging.getLogger(__name__)

# A router answers within a turn of its loop; one that takes longer than this is passed over.
ANSWER_S = 2.0
# How often a process that waits for its successor asks whether one is still to come.
SUCCESSOR_LOOK_S = 0.5

# What processes say to each other.
TAKE = b"take"  # these sockets are yours
SPARE = b"spare"  # give me one that you can do without
ALL = b"all"  # you are leaving: give me every one
DONE = b"done"

# Whether another process of the fleet will take this one's place.
Successor = Callable[[], Awaitable[bool]]


async def nobody() -> bool:
    """The fleet ends, on this port."""
    return False


class Place:
    """This process among those of its fleet on a port. `server` takes the connections."""

    def __init__(self, host: str, port: int, fleet: str, server: Server) -> None:
        self._host = host
        self.port = port
        self._server = server
        self._self = Member(secrets.token_hex(4), this_process(), fleet)
        self._retired = False
        self._bound: socket.socket | None = None
        self._listeners: list[socket.socket] = []
        self._control: socket.socket | None = None
        self._answers: set[asyncio.Task[None]] = set()

    @property
    def members(self) -> list[Member]:
        """Every process on the port, this one too."""
        return self._port.members()

    async def claim(self) -> int:
        """Joins the processes on the port; its rank is the lowest that is free. Raises ListenError."""
        if self.port == 0:  # any free one is had by binding it, and kept until this process listens
            self._bound = listener.bind(self._host, 0, shared=True)
            self.port = self._bound.getsockname()[1]
        self._port = Port(self.port)
        async with self._port.locked():
            members = self.members
            self._refuse_others(members)
            taken = {member.rank for member in members}
            rank = next(rank for rank in range(len(taken) + 1) if rank not in taken)
            self._listen_to_others()
            self._tell(rank=rank)
        return rank

    def announce(self, admin_port: int) -> None:
        """Tells where this process can be looked at."""
        self._tell(admin_port=admin_port)

    def introduce(self, contact: Contact) -> None:
        """Tells the others how they reach this process."""
        self._tell(contact=contact)

    async def open(self) -> None:
        """From now on this process takes connections, unless it was retired meanwhile. Raises ListenError."""
        async with self._port.locked():
            if self._retired:
                return
            members = self.members
            self._refuse_others(members)
            found = await self._inherit(members)
            await self._adopt(found or [listener.listen(self._host, self.port, shared=True)])

    async def retire(self) -> None:
        """Gives up the rank, and the sockets where another process can take them."""
        self._retired = True
        if self._self.rank is None:
            return
        async with self._port.locked():
            self._tell(rank=None, admin_port=None)
            siblings = [member for member in self.members if member.open]
            for member in sorted(siblings, key=lambda m: len(m.listeners)):
                if self._listeners and await self._offer(member):
                    self._release(list(self._listeners))

    async def hand_over(self, successor: Successor) -> bool:
        """Takes connections until others have the sockets; False when nobody comes for them.

        Then what is queued is taken, and they are closed.
        """
        while self._listeners and await successor():
            await asyncio.sleep(SUCCESSOR_LOOK_S)
        if not self._listeners:
            return True
        async with self._port.locked():
            for each in self._listeners:
                await self._server.drain(each)
                each.close()
            self._listeners.clear()
            self._tell()
        return False

    async def leave(self) -> None:
        """Forgets the port."""
        if self._bound is not None:
            self._bound.close()
        for each in self._listeners:
            each.close()
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self._control = None
            async with self._port.locked():
                self._port.forget(self._self.name)

    # -- joining

    def _refuse_others(self, members: list[Member]) -> None:
        """SO_REUSEPORT lets any process of this user listen here too, and take its share of connections."""
        present = [member for member in members if member.present]
        for member in present:
            if member.fleet != self._self.fleet:
                raise ListenError(
                    f"port {self.port} is taken: another fleet has it ({member.fleet}, "
                    f"process {member.process.pid})"
                )
        ours = {number for member in present for number in member.listeners}
        for foreign in listener.listening(self._host, self.port) - ours:
            raise ListenError(f"port {self.port} is taken: {listener.holder(foreign)} listens on it")

    async def _inherit(self, members: list[Member]) -> list[socket.socket]:
        """Every socket of a process that is leaving, else one of a process that has several."""
        leaving = [m for m in members if m.rank is None and m.listeners]
        wealthy = [m for m in members if m.open and len(m.listeners) > 1]
        for member in [*leaving, *sorted(wealthy, key=lambda m: -len(m.listeners))]:
            if found := await self._obtain(member):
                return found
        return []

    def _listen_to_others(self) -> None:
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        with self._port.address(self._self.name) as path:
            self._control.bind(path)
        self._control.listen()
        asyncio.get_running_loop().add_reader(self._control, self._called)

    async def _adopt(self, found: list[socket.socket]) -> None:
        for each in found:
            await self._server.accept(each)
            self._listeners.append(each)
        self._tell()

    def _release(self, given: Iterable[socket.socket]) -> None:
        for each in given:
            self._server.ignore(each)
            self._listeners.remove(each)
            each.close()
        self._tell()

    def _tell(self, **changes: Any) -> None:
        numbers = tuple(listener.inode(each) for each in self._listeners)
        self._self = msgspec.structs.replace(self._self, listeners=numbers, **changes)
        self._port.write(self._self)

    # -- asking others

    async def _offer(self, member: Member) -> bool:
        """Whether it has taken the sockets of this process."""
        try:
            async with self._call(member, TAKE, self._listeners) as channel:
                answer, _ = await _received(channel)
        except OSError as error:
            log.warning("router process %d does not take over: %r", member.process.pid, error)
            return False
        return answer == DONE

    async def _obtain(self, member: Member) -> list[socket.socket]:
        """The sockets that it gives."""
        try:
            async with self._call(member, ALL if member.rank is None else SPARE) as channel:
                _, found = await _received(channel)
                listener.send(channel, DONE)
                await _received(channel)  # its end: the giver has let go
        except OSError as error:
            log.warning("router process %d gives no socket: %r", member.process.pid, error)
            return []
        return found

    @asynccontextmanager
    async def _call(
        self, member: Member, message: bytes, giving: Iterable[socket.socket] = ()
    ) -> AsyncIterator[socket.socket]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
            channel.setblocking(False)
            async with asyncio.timeout(ANSWER_S):
                with self._port.address(member.name) as path:
                    channel.connect(path)
                listener.send(channel, message, giving)
                yield channel

    # -- answering others

    def _called(self) -> None:
        assert self._control is not None
        channel, _ = self._control.accept()
        channel.setblocking(False)
        task = asyncio.get_running_loop().create_task(self._answer(channel))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _answer(self, channel: socket.socket) -> None:
        try:
            with channel:
                async with asyncio.timeout(ANSWER_S):
                    await self._converse(channel)
        except OSError as error:
            log.warning("another router process broke off: %r", error)

    async def _converse(self, channel: socket.socket) -> None:
        verb, taken = await _received(channel)
        if verb == TAKE:
            await self._adopt(taken)
            listener.send(channel, DONE)
        elif verb in (SPARE, ALL):
            given = self._listeners[1:2] if verb == SPARE else list(self._listeners)
            listener.send(channel, DONE, given)
            answer, _ = await _received(channel)
            if answer == DONE:
                self._release(given)


async def _received(channel: socket.socket) -> tuple[bytes, list[socket.socket]]:
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(channel, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(channel)
    return listener.receive(channel)
