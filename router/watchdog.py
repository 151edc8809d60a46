"""The event loop watched: how late it is, and the end of a process whose loop is stuck.

Whoever started the process (Serve, or the parent of `herd route`) starts it again at once, and other router
processes go on meanwhile; a process that is stuck would keep its clients waiting and its share of new
connections queued.
"""

from __future__ import annotations

import asyncio
import faulthandler

from router.series import Histogram

# Often enough to see what a burst of requests does to the loop. A look costs about 0.1 ms of CPU.
LOOK_S = 0.25
# A hundred times what the largest body holds the loop (0.1 s), so that no machine is too busy for it; a third
# of what Serve waits for a health check to answer, of which it then wants three.
STUCK_S = 10.0


async def watch(lag: Histogram, stuck_s: float = STUCK_S) -> None:
    """Measures the running loop until cancelled; ends the process (exit status 1) where it is stuck.

    The timer is a thread in C that needs neither the loop nor the GIL. It says on standard error where every
    thread was.
    """
    loop = asyncio.get_running_loop()
    try:
        while True:
            faulthandler.dump_traceback_later(stuck_s, exit=True, file=2)
            due = loop.time() + LOOK_S
            await asyncio.sleep(LOOK_S)
            lag.observe(max(0.0, loop.time() - due))
    finally:
        faulthandler.cancel_dump_traceback_later()
