"""The requests of a recorded trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from loadtests.arrivals import TRACE, traced
from loadtests.scenarios.session import Ask, Load, Scenario, Session, say, setting
from loadtests.trace import BLOCK_TOKENS, Arrival
from loadtests.words import words


@dataclass(frozen=True)
class Replay(Scenario):
    """The requests of a trace (Mooncake's form): as long as they were, made smaller, and with the prefixes in
    common that they had, at the moments when they came.
    """

    name = "trace"
    load = Load(arrivals=TRACE, duration=120)
    closable = False

    trace: str = setting("", "The trace: Mooncake's JSONL, or that gzipped; `herd record` writes them")
    shrink: int = setting(32, "So many times as short, to fit the model's context", 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.trace:
            raise ValueError("--trace FILE says what to replay")
        if self.shrink > BLOCK_TOKENS:
            raise ValueError(
                f"shrink must be at most {BLOCK_TOKENS}, the tokens of a block, not {self.shrink}"
            )

    def starts(self, moments: Iterable[float], seed: str) -> Iterator[tuple[float, Session]]:
        """The requests of the trace in its order; it ends with them."""
        for moment, arrival in zip(moments, traced(Path(self.trace), seed), strict=False):
            yield moment, self._request(arrival)

    def _request(self, arrival: Arrival) -> Session:
        output = max(1, arrival.output_length // self.shrink)
        yield Ask((say("user", prompt(arrival, self.shrink)),), output)


def prompt(arrival: Arrival, shrink: int) -> str:
    """A word for every `shrink` tokens: where two requests have leading ids in common, the same words."""
    texts = (_block(known, BLOCK_TOKENS // shrink) for known in arrival.hash_ids)
    length = max(1, arrival.input_length // shrink)
    return " ".join(" ".join(texts).split()[:length])


@lru_cache(maxsize=1 << 16)
def _block(known: int, count: int) -> str:
    return words(count, f"block {known}")
