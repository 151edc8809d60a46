"""What recent prompts have in common and how hot it is, with the tokens to compute it again elsewhere.

A replica that has just started has an empty cache, and one that leaves takes with it what only it had. Either
loss is made good by replaying prefixes: requests for one token, whose prompts the engine computes and keeps.

    hot = HotPrefixes()
    hot.saw(prompt.keys(size), prompt.token_ids, size, now, origin)         # each request, when it is placed
    for prefix in hot.hottest(now, budget_tokens, wanted): ...             # rarely; tens of milliseconds

`origin` is what else a replay needs: the model's name, a cache salt; it comes back with the prefix. `wanted`
says of a block's key whether it is to be computed. For a newcomer: what it does not hold. For one that
leaves: what it holds and no other does.

To see a request costs little, whatever it holds: it is kept as it is. What prompts share is found when
somebody asks. A prompt that goes on from an earlier one takes the earlier one's place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import exp
from typing import NamedTuple

from router.core.blocks import TOKEN_BYTES, Keys

DEFAULT_BYTES = 64 << 20
# Prefixes end every so many tokens, or with every block where those are larger.
CHUNK_TOKENS = 256
# A use counts for less the longer ago it was (seconds). In the traces half of all prompts that are gone on
# with are so within 114 and 59 s, nine of ten within 519 and 282 s.
FADE_S = 300.0
# What is kept of a prompt beside its tokens: for each chunk a key, and a record.
KEY_BYTES, RECORD_BYTES = 40, 700


class Prefix(NamedTuple):
    """Something to replay: all its tokens (little-endian uint32), and of whom they are.

    `new_tokens`: how many of them were wanted and are in no prefix before it. `uses`: what its coldest chunk
    counts.
    """

    origin: object
    token_ids: bytes
    new_tokens: int
    uses: float


@dataclass(slots=True, eq=False)
class Record:
    """A prompt, by the key of each chunk's last block; `chunk` in bytes. `uses`: by how many chunks a prompt
    had that ended there, how many such came and when they were counted."""

    keys: Keys
    token_ids: bytes
    chunk: int
    origin: object
    uses: dict[int, tuple[float, float]]

    @property
    def nbytes(self) -> int:
        """What it takes, no less."""
        return len(self.token_ids) + KEY_BYTES * len(self.keys) + RECORD_BYTES

    def weights(self, now: float) -> list[float]:
        """How often each of its chunks was used through it, in order."""
        ends = [0.0] * len(self.keys)
        for count, (uses, at) in self.uses.items():
            ends[count - 1] += uses * exp((at - now) / FADE_S)
        total, weights = 0.0, []
        for end in reversed(ends):
            total += end
            weights.append(total)
        return weights[::-1]


class HotPrefixes:
    """Recent prompts of a model and its adapters, in at most `max_bytes`; those not used for longest go."""

    def __init__(self, max_bytes: int = DEFAULT_BYTES, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self.nbytes = 0
        self._max_bytes = max_bytes
        self._chunk_tokens = chunk_tokens
        self._records: OrderedDict[int, Record] = OrderedDict()  # by their last keys

    def __len__(self) -> int:
        """Prompts of which none goes on from another."""
        return len(self._records)

    def saw(
        self, keys: Keys, token_ids: bytes | None, block_size: int, now: float, origin: object = None
    ) -> None:
        """A prompt was placed. `keys`: of its blocks of `block_size` tokens; of text (0) none are kept."""
        if token_ids is None or not block_size:
            return
        blocks = max(1, self._chunk_tokens // block_size)
        ends = keys[blocks - 1 :: blocks]
        if not ends:
            return
        chunk = blocks * block_size * TOKEN_BYTES
        record = Record(ends, token_ids, chunk, origin, self._earlier(ends))
        uses, at = record.uses.get(len(ends), (0.0, now))
        record.uses[len(ends)] = 1 + uses * exp((at - now) / FADE_S), now
        self._records[ends[-1]] = record
        self.nbytes += record.nbytes
        while self.nbytes > self._max_bytes:
            self.nbytes -= self._records.popitem(last=False)[1].nbytes

    def _earlier(self, ends: Keys) -> dict[int, tuple[float, float]]:
        """The uses of the prompt that this one goes on from; it is kept by itself no more."""
        records = self._records
        if records.keys().isdisjoint(ends):
            return {}
        earlier = records.pop(next(key for key in reversed(ends) if key in records))
        self.nbytes -= earlier.nbytes
        return dict(earlier.uses)  # who is asked for the hottest may be reading those

    def hottest(
        self, now: float, budget_tokens: float, wanted: Callable[[int], bool], least: float = 0.0
    ) -> list[Prefix]:
        """What to replay, the hottest first: as much as so many tokens of prefill bring.

        Each chunk is worth its uses, and costs nothing where it is not wanted or in a prefix before. A chunk
        is used no more often than the one before it, so the chunks of most uses are prefixes by themselves.
        `least`: colder chunks are left out. May run in another thread than `saw` if `wanted` may.
        """
        records = list(self._records.values())
        uses, through = self._uses(records, now)
        chosen = dict.fromkeys(self._chosen(uses, through, budget_tokens, wanted, least), False)
        found = []
        for key in chosen:
            if not chosen[key]:
                found.append(self._prefix(through[key], uses, chosen))
        return found

    @staticmethod
    def _uses(records: list[Record], now: float) -> tuple[dict[int, float], dict[int, Record]]:
        """By chunks, those nearer to the root first: how often each was used, and the last prompt with it."""
        uses: dict[int, float] = {}
        through: dict[int, Record] = {}
        for record in records:
            for key, weight in zip(record.keys, record.weights(now), strict=True):
                uses[key] = uses.get(key, 0.0) + weight
            through.update(dict.fromkeys(record.keys, record))
        return uses, through

    @staticmethod
    def _chosen(
        uses: dict[int, float],
        through: dict[int, Record],
        budget_tokens: float,
        wanted: Callable[[int], bool],
        least: float,
    ) -> Keys:
        """The chunks of most uses that the budget buys; of equals those nearer to the root first."""
        left, chosen = budget_tokens, []
        for key in sorted(uses, key=uses.__getitem__, reverse=True):
            cost = through[key].chunk // TOKEN_BYTES
            if left < cost or uses[key] < least:
                break
            if wanted(key):
                left -= cost
                chosen.append(key)
        return chosen

    @staticmethod
    def _prefix(record: Record, uses: dict[int, float], chosen: dict[int, bool]) -> Prefix:
        """The record as far as chunks of it are chosen; these need not be chosen again."""
        fresh = [place for place, key in enumerate(record.keys) if chosen.get(key) is False]
        chosen.update((record.keys[place], True) for place in fresh)
        last = fresh[-1]
        tokens = len(fresh) * record.chunk // TOKEN_BYTES
        return Prefix(
            record.origin, record.token_ids[: (last + 1) * record.chunk], tokens, uses[record.keys[last]]
        )
