"""Inputs that are nearly right: seeded mutations of examples, so that a failure can be had again."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

# What parsers trip over: ends and halves of ends, separators, numbers beyond all limits, bytes of no text.
SPICE = (
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b",", b";", b'"', b"\\", b"{", b"}", b"[",
    b"]", b"0", b"-1", b"9" * 20, b"f" * 17, b"\xff", b"\xc3\xa4", b"\xed\xa0\x80", b"HTTP/1.1", b"data: ",
    b"[DONE]", b"null", b"1e999", b"content-length: 5\r\n", b"transfer-encoding: chunked\r\n",
    b'"token_ids":[1]',
)  # fmt: skip


def mutations(examples: Sequence[bytes], seed: int, count: int) -> Iterator[bytes]:
    """So many inputs, each an example that was changed in up to five places."""
    chance = random.Random(seed)
    for _ in range(count):
        data = chance.choice(examples)
        for _ in range(chance.randrange(6)):
            data = mutated(data, examples, chance)
        yield data


def mutated(data: bytes, examples: Sequence[bytes], chance: random.Random) -> bytes:
    """One change: something put in, left out, altered, repeated, or the end of another example."""
    at = chance.randrange(len(data) + 1)
    to = min(len(data), at + chance.choice((1, 1, 1, 4, 30)))
    kind = chance.randrange(6)
    if kind == 0:
        return data[:at] + chance.choice(SPICE) + data[at:]
    if kind == 1:
        return data[:at] + data[to:]
    if kind == 2:
        return data[:at] + bytes([chance.randrange(256)]) + data[to:]
    if kind == 3:
        return data[:at] + data[at:to] * chance.choice((2, 2, 2, 300)) + data[to:]
    if kind == 4:
        return data[:at]
    other = chance.choice(examples)
    return data[:at] + other[chance.randrange(len(other) + 1) :]


def split(data: bytes, seed: int) -> list[bytes]:
    """The same bytes in up to four packets."""
    chance = random.Random(seed)
    cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randrange(4)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
