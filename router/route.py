"""`herd route`: a router in front of engines that others started, without Ray. One process of it.

Run as a module it is one of several, below the parent in `router.processes`: standard input is a link whose
end means that the parent is gone, and standard output tells the parent how far this process is.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec
import uvloop

from router.config import parse_router
from router.errors import ConfigError, HerdError
from router.front import Endpoint, FrontDoor
from router.processes import LEFT, LINK, OPEN
from router.tokenizer_config import ANY
from router.watchdog import watch

# After the first signal streams end by themselves within this, else they are cut.
GRACE_S = 30.0
# When another process takes over, nobody waits for the end of this one. As long as a long answer.
DRAIN_S = 600.0

Tell = Callable[[str], None]


def run(urls: Sequence[str], settings: dict[str, Any], say: Tell) -> None:
    """Routes to the engines at `urls` until SIGINT or SIGTERM. Raises ConfigError and ListenError."""

    def tell(front: FrontDoor) -> None:
        say(f"Routing to {len(urls)} engines on port {front.port}; metrics and state: {front.admin_port}.")

    _run(urls, settings, f"herd route {os.getpid()}", tell)


def run_as_one_of_several(urls: Sequence[str], settings: dict[str, Any], fleet: str) -> None:
    """The same below a parent, which can also have this process leave, by SIGHUP."""

    def tell(front: FrontDoor) -> None:
        print(OPEN, front.admin_port, flush=True)

    _run(urls, settings, fleet, tell, LINK)


def endpoint(url: str) -> Endpoint:
    """A worker's URL as a member of the fleet; such a member is known by its URL alone."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ConfigError(f"--worker-urls: {url!r} is not of the form http://HOST:PORT")
    address = f"http://{parts.netloc}"
    return Endpoint(id=address, url=address)


def stands_for(given: Sequence[str]) -> dict[str, str]:
    """What each `ALIAS=MODEL` of the command line stands for."""
    aliases: dict[str, str] = {}
    for pair in given:
        alias, _, model = pair.partition("=")
        if not alias or not model:
            raise ConfigError(f"--model-alias: {pair!r} is not of the form ALIAS=MODEL")
        if aliases.setdefault(alias, model) != model:
            raise ConfigError(f"--model-alias: {alias!r} is given twice")
    return aliases


def tokenizers(given: Sequence[str]) -> dict[str, dict[str, str]]:
    """Where each `MODEL=DIR` of the command line has its tokenizer; a `DIR` alone is that of all others."""
    sources: dict[str, dict[str, str]] = {}
    for one in given:
        model, separator, directory = one.rpartition("=")
        if not directory or (separator and not model):
            raise ConfigError(f"--tokenizer: {one!r} is not of the form [MODEL=]DIR")
        if sources.setdefault(model or ANY, {"source": directory})["source"] != directory:
            raise ConfigError(f"--tokenizer: that of {model or 'all models'} is given twice")
    return sources


def promised(ttft_ms: float | None, tpot_ms: float | None) -> dict[str, dict[str, float]]:
    """What the command line promises of all models; nothing where it says nothing."""
    said = {"ttft_s": ttft_ms, "tpot_s": tpot_ms}
    slo = {name: ms / 1e3 for name, ms in said.items() if ms is not None}
    return {ANY: slo} if slo else {}


class Orders:
    """What signals and the link to a parent ask for: to leave to others (SIGHUP), or to end."""

    def __init__(self, link: int | None) -> None:
        self.told, self.ended = asyncio.Event(), asyncio.Event()
        self._loop, self._link = asyncio.get_running_loop(), link
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._end)
        if link is not None:
            self._loop.add_signal_handler(signal.SIGHUP, self.told.set)
            self._loop.add_reader(link, self._end)

    async def successor(self) -> bool:
        """Whether the parent starts another process in this one's place."""
        return not self.ended.is_set()

    def _end(self) -> None:
        self.told.set()
        self.ended.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.remove_signal_handler(number)  # the next one has its usual effect
        if self._link is not None:
            self._loop.remove_reader(self._link)


def _run(
    urls: Sequence[str],
    settings: dict[str, Any],
    fleet: str,
    opened: Callable[[FrontDoor], None],
    link: int | None = None,
) -> None:
    endpoints = [endpoint(url) for url in urls]
    config = parse_router(settings)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_route(FrontDoor(config, fleet=fleet), endpoints, opened, link))


async def _route(
    front: FrontDoor, endpoints: list[Endpoint], opened: Callable[[FrontDoor], None], link: int | None
) -> None:
    orders = Orders(link)
    watchdog = asyncio.create_task(watch(front.metrics.loop_lag))
    await front.start()
    front.membership(endpoints)
    await front.open()
    gc.freeze()  # else a full collection, now and then, holds the loop for tens of milliseconds
    opened(front)
    await orders.told.wait()
    if not orders.ended.is_set():
        await _leave(front, orders)
    if orders.ended.is_set():
        await front.stop(GRACE_S)
    watchdog.cancel()


async def _leave(front: FrontDoor, orders: Orders) -> None:
    """Others go on: returns when the last stream has ended here, or when all of them are to end."""
    await front.retire()
    print(LEFT, flush=True)
    leaving = asyncio.create_task(front.stop(DRAIN_S, orders.successor))
    ended = asyncio.create_task(orders.ended.wait())
    await asyncio.wait({leaving, ended}, return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    ended.cancel()
    await asyncio.gather(leaving, ended, return_exceptions=True)


if __name__ == "__main__":
    try:
        run_as_one_of_several(**msgspec.json.decode(sys.argv[1]))
    except HerdError as error:
        sys.exit(f"Error: {error}")
