"""Load shared between router processes: each tells every other what it has at the replicas.

Over UDP: what is lost is healed by the next round. A process is found where membership tells of it (the
folder of its port on one machine, Serve's news of routers on several), and with its address comes the key
that its datagrams are signed with: what strangers send is counted and dropped.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import socket
import struct
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import cast

import msgspec

from router.core.demand import Scaled
from router.core.fleet import Fleet, Load
from router.core.loads import Loads, Report
from router.core.quotas import Elsewhere, Quota, Use
from router.errors import ListenError
from router.metrics import Metrics
from router.port import Contact

log = logging.getLogger(__name__)

# Everything is told anew so often.
ROUND_S = 0.05
# Placements are told between rounds, those of so long in one datagram.
COALESCE_S = 0.005
# How often membership is asked who is there; a process that is not known and speaks is looked for at once.
LOOK_S = 1.0
# A UDP datagram has at most 65,507 bytes. A replica's load takes 30, its id rarely more than 100.
MOST_REPLICAS = 500
# A tenant's use takes 16, its name at most 64.
MOST_TENANTS = 500

VERSION = 1
# A datagram: version, name of the sender, keyed hash of the report, the report in msgpack.
HEAD = struct.Struct("!B8s16s")

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Report).decode

# Tells of all processes that membership knows, of the one that asks too.
Directory = Callable[[], Iterable[Contact]]
# Of tenants that have limits, by their names.
Quotas = Callable[[], Mapping[str, Quota]]
# Of models whose replicas are scaled.
Scalings = Callable[[], dict[str, Scaled]]


class Gossip(asyncio.DatagramProtocol):
    """One process among the others."""

    def __init__(
        self,
        fleet: Fleet,
        metrics: Metrics,
        directory: Directory,
        quotas: Quotas = dict,
        scalings: Scalings = dict,
    ) -> None:
        self._fleet = fleet
        self._quotas = quotas
        self._scalings = scalings
        self._fates = metrics.datagrams
        self._directory = directory
        self._contacts: dict[bytes, Contact] = {}
        self._told: list[Contact] = []
        self._looked_at = 0.0
        self._loads = Loads()
        self._elsewhere = Elsewhere()
        self._sequence = 0
        self._placed: set[str] = set()
        self._rounds: asyncio.Task[None] | None = None
        self._transport: asyncio.DatagramTransport
        metrics.peers.set_function(lambda: self.heard)

    async def start(self, host: str) -> Contact:
        """Speaks and listens from now on. Raises ListenError."""
        self._loop = asyncio.get_running_loop()
        bound = _bound(host)
        port = bound.getsockname()[1]
        self._self = Contact(secrets.token_hex(4), host, port, secrets.token_hex(16))
        await self._loop.create_datagram_endpoint(lambda: self, sock=bound)
        self._rounds = self._loop.create_task(self._run())
        return self._self

    def stop(self) -> None:
        """Says that this process has nothing anywhere, and falls silent."""
        if self._rounds is None:
            return
        self._rounds.cancel()
        self._tell({}, whole=True, scaled={})
        self._contacts = {}  # nobody is told anything any more
        self._transport.close()

    def placed(self, replica_id: str) -> None:
        """A request was placed on this replica."""
        if not self._contacts:
            return
        if not self._placed:
            self._loop.call_later(COALESCE_S, self._tell_placed)
        self._placed.add(replica_id)

    def look(self) -> None:
        """Asks who is there; newcomers are told at once how things are."""
        self._looked_at = self._loop.time()
        try:
            told = {each.name.encode(): each for each in self._directory() if each.name != self.name}
        except ListenError as error:
            log.warning("other router processes are not known: %s", error)
            return
        # One that membership does not tell of any more may have streams to finish.
        before, speaking = self._contacts, self._loads.peers
        self._contacts = {name: c for name, c in before.items() if c.name in speaking} | told
        self._told = list(told.values())
        if self._contacts.keys() - before.keys():
            self._tell_all()

    @property
    def name(self) -> str:
        """By which the others know this process."""
        return self._self.name

    @property
    def heard(self) -> int:
        """How many other processes speak."""
        return len(self._loads.peers)

    @property
    def complete(self) -> bool:
        """Whether every process that membership tells of speaks."""
        return all(contact.name in self._loads.peers for contact in self._told)

    @property
    def scaled(self) -> dict[str, dict[str, Scaled]]:
        """What each of the others told of models whose replicas it decides on, by its name."""
        return {name: peer.scaled for name, peer in self._loads.peers.items() if peer.scaled}

    @property
    def others(self) -> list[Contact]:
        """The other processes that speak, and that requests can be passed on to."""
        return [c for c in self._told if c.direct is not None and c.name in self._loads.peers]

    @property
    def peers(self) -> list[dict[str, object]]:
        """The other processes, for people: where each is, since when it is silent, its requests in flight."""
        now = self._loop.time()
        found: list[dict[str, object]] = []
        for contact in self._contacts.values():
            peer = self._loads.peers.get(contact.name)
            about = {"host": contact.host, "port": contact.port, "age_s": None, "in_flight": None}
            if peer is not None:
                in_flight = sum(load.in_flight for load in peer.loads.values())
                about |= {"age_s": round(now - peer.heard_at, 3), "in_flight": in_flight}
            found.append(about)
        return found

    # -- speaking

    async def _run(self) -> None:
        while True:
            now = self._loop.time()
            if now - self._looked_at > LOOK_S:
                self.look()
            self._note(self._loads.forget_silent(now))
            self._elsewhere.only(frozenset(self._loads.peers), self._quotas())
            if self._contacts:
                self._tell_all()
            await asyncio.sleep(ROUND_S)

    def _tell_all(self) -> None:
        """All that is had anywhere. What one datagram does not hold follows as if it had come later."""
        loads = iter(self._fleet.loads(self._loop.time()).items())
        self._tell(dict(islice(loads, MOST_REPLICAS)), whole=True)
        while more := dict(islice(loads, MOST_REPLICAS)):
            self._tell(more, whole=False)
        if scaled := self._scalings():
            self._tell({}, whole=False, scaled=scaled)
        uses = iter([(name, quota.use) for name, quota in self._quotas().items()])
        while some := dict(islice(uses, MOST_TENANTS)):
            self._tell({}, whole=False, uses=some)

    def _tell_placed(self) -> None:
        now = self._loop.time()
        placed = [s for replica_id in self._placed if (s := self._fleet.get(replica_id)) is not None]
        self._placed.clear()
        self._tell({standing.id: standing.own_load(now) for standing in placed}, whole=False)

    def _tell(
        self,
        loads: dict[str, Load],
        whole: bool,
        uses: dict[str, Use] | None = None,
        scaled: dict[str, Scaled] | None = None,
    ) -> None:
        self._sequence += 1
        report = _encode(Report(self._sequence, whole, loads, uses or {}, scaled))
        datagram = HEAD.pack(VERSION, self._self.name.encode(), self._self.sign(report)) + report
        for contact in self._contacts.values():
            self._transport.sendto(datagram, (contact.host, contact.port))
            self._fates["sent"].inc()

    # -- listening: the transport's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # uvloop's does not derive from it

    def datagram_received(self, data: bytes, addr: object) -> None:
        self._fates[self._take(data)].inc()

    def error_received(self, exc: Exception) -> None:
        """A datagram could not be sent; the next round says as much."""
        self._fates["unsent"].inc()
        log.debug("to another router process: %r", exc)

    def _take(self, data: bytes) -> str:
        """What became of a datagram."""
        if len(data) < HEAD.size or data[0] != VERSION:
            return "malformed"
        _, name, signature = HEAD.unpack_from(data)
        contact, told = self._contacts.get(name), data[HEAD.size :]
        if contact is None:
            if self._loop.time() - self._looked_at > ROUND_S:
                self.look()
            return "unknown"
        if not hmac.compare_digest(contact.sign(told), signature):
            return "forged"
        try:
            report = _decode(told)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return "malformed"
        now = self._loop.time()
        changed = self._loads.take(contact.name, report, now)
        if changed is None:
            return "stale"
        self._note(changed)
        self._elsewhere.heard(contact.name, report.uses, self._quotas(), now)
        return "taken"

    def _note(self, replica_ids: Iterable[str]) -> None:
        for replica_id in replica_ids:
            self._fleet.elsewhere(replica_id, self._loads.at(replica_id))


def _bound(host: str) -> socket.socket:
    """A socket on any free port."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        bound.bind((host, 0))
    except OSError as error:
        bound.close()
        raise ListenError(f"cannot listen to other routers on {host}: {error.strerror}") from None
    bound.setblocking(False)
    return bound
