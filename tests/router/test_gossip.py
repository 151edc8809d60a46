"""Two and more processes' gossip over real sockets."""

import asyncio
import contextlib
import socket

import pytest
from router_wire import until

from router.core.fleet import Fleet, Load, Replica
from router.core.loads import SILENT_S, Report
from router.core.quotas import Allowance, Quota
from router.errors import ListenError
from router.gossip import HEAD, MOST_REPLICAS, MOST_TENANTS, ROUND_S, VERSION, Gossip, _encode
from router.metrics import Metrics
from router.port import Contact


class Router:
    """What gossip needs of a router process, in front of replicas a, b and c."""

    def __init__(self, directory, replicas=("a", "b", "c"), tenants=()):
        self.fleet, self.metrics, self._directory = Fleet(), Metrics(), directory
        for name in replicas:
            self.fleet.joined(Replica(name, f"http://{name}", ("m",)), now=0.0)
        self.quotas = {name: Quota(Allowance(8, 1000, 100_000)) for name in tenants}
        self.gossip = Gossip(self.fleet, self.metrics, lambda: list(directory), lambda: self.quotas)

    async def start(self):
        self.contact = await self.gossip.start("127.0.0.1")
        self._directory.append(self.contact)
        return self

    def place(self, replica_id):
        flight = self.fleet.started(replica_id, asyncio.get_running_loop().time())
        self.gossip.placed(replica_id)
        return flight

    def elsewhere(self, *replicas):
        return [self.fleet.get(name).elsewhere.in_flight for name in replicas or "abc"]

    def dropped(self):
        return {
            fate: c.value
            for fate, c in self.metrics.datagrams.items()
            if fate not in ("sent", "unsent", "taken")
        }


def spoken(router):
    return sum(peer["age_s"] is not None for peer in router.gossip.peers)


def fall_silent(router):
    """As if it were killed: it tells nothing more by itself, and says no word of farewell."""
    router.gossip._rounds.cancel()


@contextlib.asynccontextmanager
async def routers(count, directory=None, **kwargs):
    directory = [] if directory is None else directory
    started = [await Router(directory, **kwargs).start() for _ in range(count)]
    try:
        await until(lambda: all(spoken(router) == count - 1 for router in started))
        yield started
    finally:
        for router in started:
            router.gossip.stop()


async def test_each_sees_what_all_others_have():
    async with routers(3) as (one, two, three):
        flights = [one.place("a"), one.place("a"), two.place("a"), two.place("b")]
        await until(lambda: three.elsewhere() == [3, 1, 0])
        assert (one.elsewhere(), two.elsewhere()) == ([1, 1, 0], [2, 0, 0])
        assert [s.requests for s in one.fleet] == [3, 1, 0]
        for router, flight in zip((one, one, two, two), flights, strict=True):
            router.fleet.finished(flight, now=0.0)
        await until(lambda: one.elsewhere() + two.elsewhere() + three.elsewhere() == [0] * 9)


async def test_placements_are_told_between_rounds_and_a_burst_at_once():
    async with routers(2) as (one, two):
        fall_silent(one)
        said = one.metrics.datagrams["sent"].value
        for _ in range(20):
            one.place("b")
        one.place("c")
        await until(lambda: two.elsewhere() == [0, 20, 1])
        assert one.metrics.datagrams["sent"].value == said + 1


async def test_a_newcomer_hears_at_once_and_is_heard():
    directory = []
    async with routers(2, directory) as (one, two):
        one.place("a")
        async with routers(0, directory):
            late = await Router(directory).start()
            await until(lambda: late.elsewhere("a") == [1])
            late.place("c")
            await until(lambda: one.elsewhere("c") == two.elsewhere("c") == [1])
            late.gossip.stop()
        await until(lambda: one.elsewhere("c") == two.elsewhere("c") == [0])


async def test_who_is_silent_has_nothing():
    async with routers(2) as (one, two):
        loop = asyncio.get_running_loop()
        two.place("a")
        await until(lambda: one.elsewhere("a") == [1])
        fall_silent(two)
        began = loop.time()
        await until(lambda: one.elsewhere("a") == [0])
        assert SILENT_S - ROUND_S < loop.time() - began < SILENT_S + 0.5
        assert one.gossip.peers[0]["age_s"] is None


async def test_a_replica_that_joins_later_gets_its_load():
    async with routers(2) as (one, two):
        two.fleet.joined(Replica("d", "http://d", ("m",)), now=0.0)
        two.place("d")
        await until(lambda: one.gossip.peers[0]["in_flight"] == 1)
        one.fleet.joined(Replica("d", "http://d", ("m",)), now=0.0)
        await until(lambda: one.elsewhere("d") == [1])


async def test_more_than_a_datagram_holds():
    names = [f"http://some-rather-long-name-of-a-host.example:{n}" for n in range(2 * MOST_REPLICAS + 1)]
    async with routers(2, replicas=names) as (one, two):
        for name in names:
            one.fleet.started(name, now=0.0)
        await until(lambda: two.elsewhere(*names) == [1] * len(names))


async def test_tenants_have_one_allowance_at_all_routers():
    names = [f"tenant-{n}" for n in range(MOST_TENANTS + 1)]
    async with routers(2, tenants=names) as (one, two):
        await until(lambda: spoken(one) == spoken(two) == 1)
        for name in names:
            one.quotas[name].enter(0.0)
        await until(lambda: [two.quotas[name].elsewhere for name in names] == [1] * len(names))
        fall_silent(one)
        await until(lambda: not any(quota.elsewhere for quota in two.quotas.values()))


@pytest.mark.parametrize(
    ("fate", "datagram"),
    [
        ("malformed", lambda of: b""),
        ("malformed", lambda of: b"\x01 too short"),
        ("malformed", lambda of: bytes([VERSION + 1]) + signed(of, REPORT)[1:]),
        ("malformed", lambda of: signed(of, b"\x93\x01")),
        ("malformed", lambda of: signed(of, _encode([1, True, {"a": ["many"]}]))),
        ("unknown", lambda of: signed(Contact("stranger", of.host, of.port, of.key), REPORT)),
        ("forged", lambda of: signed(Contact(of.name, of.host, of.port, "guessed"), REPORT)),
        ("stale", lambda of: signed(of, _encode(Report(1, True, {"a": Load(9)})))),
    ],
)
async def test_what_is_no_news_of_a_peer_is_counted_and_dropped(fate, datagram):
    async with routers(2) as (one, two):
        two.place("b")
        await until(lambda: one.elsewhere() == [0, 1, 0])
        before = one.dropped()
        with socket.socket(type=socket.SOCK_DGRAM) as stranger:
            stranger.sendto(datagram(two.contact), (one.contact.host, one.contact.port))
        await until(lambda: one.dropped() != before)
        assert {f for f, count in one.dropped().items() if count > before[f]} == {fate}
        assert one.elsewhere() == [0, 1, 0]


def signed(sender, report):
    return HEAD.pack(VERSION, sender.name.encode(), sender.sign(report)) + report


REPORT = _encode(Report(1_000_000, True, {"a": Load(9)}))


async def test_one_that_cannot_listen_says_so():
    router = Router([])
    with pytest.raises(ListenError, match=r"cannot listen to other routers on 192\.0\.2\.1: "):
        await router.gossip.start("192.0.2.1")
    router.gossip.stop()


async def test_a_datagram_that_cannot_be_sent_is_counted_and_the_others_are():
    async with routers(2) as (one, two):
        one._directory.insert(0, Contact("gone", "255.255.255.255", 1, "key"))  # broadcasts are not allowed
        one.gossip.look()
        one.place("a")
        await until(lambda: two.elsewhere("a") == [1])
        assert one.metrics.datagrams["unsent"].value > 0
        assert {"host": "255.255.255.255", "port": 1, "age_s": None, "in_flight": None} in one.gossip.peers
