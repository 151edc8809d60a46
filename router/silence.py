"""Notices a replica of which nothing is heard though something should be: a process that hangs cuts nothing.

All streams of a replica are one witness: while any of them is heard, it lives. How long it may say nothing is
predicted, so a long prefill alarms nobody.
"""

from __future__ import annotations

import asyncio

from router.core.fleet import Fleet, Standing
from router.health import Watch
from router.http.upstream import Upstreams

LOOK_S = 0.25
# Silence is odd after so many times the time within which something was to be heard, and so many seconds.
# The probe that then has to be answered takes two seconds more (health.PROBE_SUSPECT_S).
TIMES, LEAST_S = 5.0, 1.5


class Silence:
    """Listens to all replicas that have streams."""

    def __init__(self, fleet: Fleet, upstreams: Upstreams, watch: Watch) -> None:
        self._fleet = fleet
        self._upstreams = upstreams
        self._watch = watch
        self._heard_at: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Listens from now on."""
        self._task = asyncio.get_running_loop().create_task(self._listen())

    async def stop(self) -> None:
        """Listens no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LOOK_S)
            now = loop.time()
            self._heard_at = {s.id: self._heard(s, now) for s in self._fleet if s.streams}

    def _heard(self, standing: Standing, now: float) -> float:
        """When the replica was last heard, or began to be listened to; too long ago, it is asked."""
        upstream = self._upstreams.known(standing.replica.url)
        heard_at = self._heard_at.get(standing.id, now)
        if upstream is None or upstream.heard or not upstream.listening:
            heard_at = now
        elif now - heard_at > max(LEAST_S, TIMES * standing.next_output_s(now)):
            self._watch.silent(standing.id)
        if upstream is not None:
            upstream.heard = False
        return heard_at
