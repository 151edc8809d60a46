"""When sessions begin in an open loop: at moments that nothing that is answered, or is not, can move."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from random import Random

from loadtests import trace

CONSTANT, POISSON, TRACE = KINDS = ("constant", "poisson", "trace")

# For how many seconds how many arrivals a second are expected.
Piece = tuple[float, float]


def moments(kind: str, pieces: Iterable[Piece], seed: str) -> Iterator[float]:
    """Seconds since the beginning, in order: evenly spaced or of a Poisson process, at rates above 0."""
    return paced(gaps(kind, seed), pieces)


def gaps(kind: str, seed: str) -> Iterator[float]:
    """Times between arrivals at one arrival a second."""
    if kind == CONSTANT:
        return repeat(1.0)
    chance = Random(seed)
    return (chance.expovariate(1.0) for _ in repeat(None))


def paced(gaps: Iterator[float], pieces: Iterable[Piece]) -> Iterator[float]:
    """The same gaps under rates that change: each lasts until so many arrivals were to be expected."""
    now, left = 0.0, next(gaps)
    for seconds, rate in pieces:
        end = now + seconds
        while now + left / rate < end:
            now, left = now + left / rate, next(gaps)
            yield now
        left -= (end - now) * rate
        now = end


@lru_cache(maxsize=1)
def traced(path: Path, seed: str) -> Sequence[trace.Arrival]:
    """A trace's requests; moments that it rounded are spread over what they may stand for. TraceError."""
    return trace.spread(trace.read(path), Random(seed))
