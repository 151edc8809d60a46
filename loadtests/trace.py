"""Request traces as Mooncake publishes them: when requests came, how long they were, what they share.

One JSON object a line, gzipped where the name ends in `.gz`: `timestamp` (ms since the start),
`input_length` and `output_length` (tokens), `hash_ids` (one id per 512 tokens of the prompt, the last block
perhaps not full; the same leading ids are the same prefix).
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Annotated

import msgspec

from router.errors import HerdError

BLOCK_TOKENS = 512
# Above these the twin numbers the blocks that outputs fill; ids travel as uint32.
MAX_ID = 2**31
# Timestamps that lie no closer than this (seconds) were rounded, not measured.
COARSE_S = 1.0

Positive = Annotated[int, msgspec.Meta(ge=1)]
Id = Annotated[int, msgspec.Meta(ge=0, lt=MAX_ID)]


class TraceError(HerdError):
    """A trace cannot be read; the message names the file and the line."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when it comes (seconds since the start), its tokens in and out, the ids of its blocks.

    `priority`: its class, of which files say nothing; lower goes first.
    """

    at: float
    input_length: int
    output_length: int
    hash_ids: Sequence[int]
    priority: int = 0


class Line(msgspec.Struct):
    """One line of the file."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Positive
    output_length: Positive
    hash_ids: list[Id]

    def __post_init__(self) -> None:
        blocks = -(-self.input_length // BLOCK_TOKENS)
        if len(self.hash_ids) != blocks:
            raise ValueError(
                f"{self.input_length} tokens are {blocks} blocks of {BLOCK_TOKENS}, "
                f"but hash_ids has {len(self.hash_ids)}"
            )


def read(path: Path) -> list[Arrival]:
    """The requests of a trace in order of their arrival. TraceError if there is none, or one is wrong."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            arrivals = list(_arrivals(path, file))
    except (OSError, EOFError) as error:
        raise TraceError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not arrivals:
        raise TraceError(f"{path}: no requests in it")
    return sorted(arrivals, key=lambda arrival: arrival.at)


def _arrivals(path: Path, lines: Iterable[bytes]) -> Iterator[Arrival]:
    decode = msgspec.json.Decoder(Line).decode
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = decode(text)
        except msgspec.DecodeError as error:
            raise TraceError(f"{path}, line {number}: {error}") from None
        yield Arrival(line.timestamp / 1e3, line.input_length, line.output_length, line.hash_ids)


def write(path: Path, arrivals: Iterable[Arrival]) -> None:
    """A file that `read` takes; times are rounded to ms, as the format has them."""
    lines = (Line(round(a.at * 1e3), a.input_length, a.output_length, list(a.hash_ids)) for a in arrivals)
    content = msgspec.json.Encoder().encode_lines(lines)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def grain(arrivals: Sequence[Arrival]) -> float:
    """To how many seconds the arrivals were rounded; 0 where they seem to be measured."""
    times = sorted({arrival.at for arrival in arrivals})
    least = min((later - earlier for earlier, later in pairwise(times)), default=0.0)
    return round(least) if least > COARSE_S / 2 else 0.0


def spread(arrivals: Sequence[Arrival], chance: Random, over: float | None = None) -> list[Arrival]:
    """Each arrival moved later by less than `over` seconds, all equally likely; None: its grain."""
    width = grain(arrivals) if over is None else over
    moved = [replace(arrival, at=arrival.at + width * chance.random()) for arrival in arrivals]
    return sorted(moved, key=lambda arrival: arrival.at)


def compress(arrivals: Iterable[Arrival], speed: float) -> list[Arrival]:
    """The same requests `speed` times as fast."""
    return [replace(arrival, at=arrival.at / speed) for arrival in arrivals]
