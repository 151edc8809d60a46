"""`herd route`: a router in front of engines that others started, without Ray."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import uvloop
from pydantic import ValidationError

from router.config import RouterConfig
from router.errors import ConfigError
from router.front import Endpoint, FrontDoor

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# After the first signal streams end by themselves within this, else they are cut.
GRACE_S = 30.0


def run(urls: Sequence[str], settings: dict[str, Any], say: Callable[[str], None]) -> None:
    """Routes to the engines at `urls` until SIGINT or SIGTERM. Raises ConfigError and ListenError."""
    endpoints = [endpoint(url) for url in urls]
    try:
        config = RouterConfig(**settings)
    except ValidationError as error:
        raise ConfigError("; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())) from None
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_route(endpoints, config, say))


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


async def _route(endpoints: list[Endpoint], config: RouterConfig, say: Callable[[str], None]) -> None:
    front = FrontDoor(config)
    await front.start()
    front.membership(endpoints)
    say(f"Routing to {len(endpoints)} engines on port {front.port}; metrics and state: {front.admin_port}.")
    await _signalled()
    await front.stop(GRACE_S)


async def _signalled() -> None:
    """Waits for SIGINT or SIGTERM; the next one has its usual effect again."""
    event, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, event.set)
    await event.wait()
    for number in STOP_SIGNALS:
        loop.remove_signal_handler(number)
