"""Where Serve's news of replicas, and of routers, crosses to the router's event loop.

Serve pickles a request router's whole module by value, so module state beside those would be a copy in the
replica that unpickles it. This module is pickled by name, so both sides meet one object here.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from router.front import Endpoint
from router.port import Contact

LOOK_S = 0.01

Member = TypeVar("Member")


class Roster(Generic[Member]):
    """The members of every pool (one Serve deployment each), told whole to one listener on its own loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pools: dict[str, tuple[Member, ...]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener: Callable[[list[Member]], None] | None = None

    def follow(self, listener: Callable[[list[Member]], None]) -> None:
        """Tell `listener` every membership from now on, on the running loop; first what is known already."""
        with self._lock:
            self._loop, self._listener = asyncio.get_running_loop(), listener
        self._tell()

    def unfollow(self) -> None:
        """Tell nobody any more."""
        with self._lock:
            self._loop = self._listener = None

    async def heard(self, pools: int, within_s: float) -> None:
        """Waits until so many pools were announced, or no longer; the listener knows them then."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while len(self._pools) < pools:
                    await asyncio.sleep(LOOK_S)
        self._tell()

    def announce(self, pool: str, members: Iterable[Member]) -> None:
        """The whole membership of one pool as it is now. Callable from any thread."""
        with self._lock:
            self._pools[pool] = tuple(members)
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        with self._lock:
            listener, members = self._listener, [m for pool in self._pools.values() for m in pool]
        if listener is not None:
            listener(members)


ROSTER: Roster[Endpoint] = Roster()
PEERS: Roster[Contact] = Roster()
