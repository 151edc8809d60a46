import asyncio
import subprocess
import sys
import time

from router_wire import until
from support import ROOT

from router.series import Histogram
from router.watchdog import LOOK_S, watch

STUCK = """
import asyncio, time
from router.series import Histogram
from router.watchdog import watch

async def main():
    watching = asyncio.create_task(watch(Histogram((1,)), stuck_s=2))
    await asyncio.sleep({works})
    {then}

def hold():
    {how}

asyncio.run(main())
"""


def run(works: float, then: str, how: str = "time.sleep(30)") -> subprocess.CompletedProcess[str]:
    program = STUCK.format(works=works, then=then, how=how)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60
    )


def test_a_process_whose_loop_is_stuck_ends_and_says_where():
    for how in ("time.sleep(30)", "10 ** 10 ** 9"):  # the second holds the GIL
        done = run(0.1, "hold()", how)
        assert done.returncode == 1
        assert "in hold" in done.stderr


def test_one_that_is_late_goes_on():
    """Longer than the limit in all, never at once; and nothing is armed any more when it ended by itself."""
    done = run(0, "[time.sleep(0.8) or await asyncio.sleep(0.3) for _ in range(3)]; watching.cancel()")
    assert (done.returncode, done.stderr) == (0, "")


def hold(seconds: float) -> None:
    time.sleep(seconds)


async def test_lag_is_measured():
    lag = Histogram((1, 10))
    watching = asyncio.create_task(watch(lag))
    await until(lambda: lag.counts[0] > 0)
    before = lag.counts[1]  # a busy machine may be as late
    hold(1 + 2 * LOOK_S)
    await until(lambda: lag.counts[1] > before)
    watching.cancel()
