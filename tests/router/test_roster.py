"""News of replicas from any thread reaches the router's loop, whole and in order."""

import asyncio
import threading

from router_wire import WAIT_S

from router.health import Endpoint
from router.roster import Roster

A, B, C = (Endpoint(id=name, url=f"http://{name}:1") for name in "abc")


async def test_the_listener_hears_the_union_of_all_pools_on_its_own_loop() -> None:
    roster, heard, threads = Roster(), asyncio.Queue[list[Endpoint]](), set()

    def listen(endpoints: list[Endpoint]) -> None:
        threads.add(threading.current_thread())
        heard.put_nowait(endpoints)

    roster.announce("one", [A])
    roster.follow(listen)
    assert await heard.get() == [A]
    for pool, endpoints in (("two", [B, C]), ("one", [])):
        await asyncio.to_thread(roster.announce, pool, endpoints)
    assert await asyncio.wait_for(heard.get(), WAIT_S) in ([A, B, C], [B, C])
    assert await asyncio.wait_for(heard.get(), WAIT_S) == [B, C]
    assert threads == {threading.current_thread()}


async def test_nothing_is_heard_after_unfollow() -> None:
    roster, heard = Roster(), []
    roster.follow(heard.append)
    roster.unfollow()
    await asyncio.to_thread(roster.announce, "one", [A])
    await asyncio.sleep(0)
    assert heard == [[]]


async def test_a_router_waits_until_it_has_heard_of_every_pool() -> None:
    roster, known = Roster(), []
    roster.follow(known.append)
    roster.announce("one", [A])
    waiting = asyncio.create_task(roster.heard(2, within_s=10))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await asyncio.to_thread(roster.announce, "two", [B])
    await waiting
    assert known[-1] == [A, B]
    await roster.heard(3, within_s=0.05)  # and no longer than that
