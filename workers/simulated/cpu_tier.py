"""Copies of KV blocks in host memory, as vLLM's OffloadingConnector keeps them."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice, takewhile

from workers.simulated.kv_cache import BlockKey, Blocks, CacheEvent, Removed, Stored, Tier


class CpuTier:
    """A pool of blocks, of which the least recently used are given up for new ones.

    Blocks are copied when they are computed, so those that the GPU gives up later are here already. Those
    that are being loaded stay.
    """

    def __init__(self, num_blocks: int) -> None:
        self.capacity = num_blocks
        self.events: list[CacheEvent] = []
        self._blocks: OrderedDict[BlockKey, None] = OrderedDict()  # the least recently used first
        self._loading: set[BlockKey] = set()

    def __len__(self) -> int:
        return len(self._blocks)

    def prefix(self, keys: Iterable[BlockKey]) -> list[BlockKey]:
        """Those of the keys whose blocks are here, up to the first miss."""
        return list(takewhile(self._blocks.__contains__, keys))

    def is_loading(self, keys: Iterable[BlockKey]) -> bool:
        """Whether some of these blocks are on their way to the GPU."""
        return not self._loading.isdisjoint(keys)

    def store(self, owner: Blocks, first: int, end: int) -> None:
        """Copy blocks `first` to `end - 1` of a sequence that are not here; none if they do not all fit."""
        keys = [owner.key(block) for block in range(first, end)]
        missing = [number for number, key in enumerate(keys) if key not in self._blocks]
        if not self._make_room(len(missing), set(keys)):
            return
        for number in missing:
            self._blocks[keys[number]] = None
            self.events.append(Stored(owner, first + number, 1, Tier.CPU))

    def touch(self, owner: Blocks, first: int, end: int) -> None:
        """A sequence that used these blocks is over; a prefix' tail will be given up before its head."""
        for key in map(owner.key, reversed(range(first, end))):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def begin_load(self, keys: Iterable[BlockKey]) -> None:
        """Keep these blocks until they are loaded."""
        self._loading.update(keys)

    def end_load(self, keys: Iterable[BlockKey]) -> None:
        """They are, or nobody wants them any more."""
        self._loading.difference_update(keys)

    def reset(self) -> None:
        """Forget every block; as in vLLM no event tells."""
        self._blocks.clear()

    def take_events(self) -> list[CacheEvent]:
        """What entered and left since the last call, in order."""
        events, self.events = self.events, []
        return events

    def _make_room(self, count: int, spared: set[BlockKey]) -> bool:
        excess = len(self._blocks) + count - self.capacity
        if excess <= 0:
            return True
        going = list(islice(self._idle(spared), excess))
        if len(going) < excess:
            return False
        for key in going:
            del self._blocks[key]
            self.events.append(Removed(key, Tier.CPU))
        return True

    def _idle(self, spared: set[BlockKey]) -> Iterator[BlockKey]:
        return (key for key in self._blocks if key not in spared and key not in self._loading)
