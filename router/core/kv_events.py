"""KV events as vLLM publishes them, typed: what entered and what left a replica's cache, on which tier.

The wire is msgpack: a batch is an array, an event a map whose key `type` is the name of its class
(vllm/distributed/kv_events.py, 0.32 and 0.33). Fields that the router does not read are skipped.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from enum import IntEnum
from itertools import groupby
from types import MappingProxyType
from typing import Annotated, cast

import msgspec
from xxhash import xxh3_64_intdigest

from router.core.blocks import TOKEN_BYTES, Keys, chain, root_key

BlockHash = int | bytes
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class Tier(IntEnum):
    """Where a block lies, from the fastest."""

    GPU = 0
    CPU = 1
    STORAGE = 2


# By vLLM's `medium`, which says GPU on CPUs too; its Mooncake connector writes "cpu".
TIERS: Mapping[str | None, Tier] = MappingProxyType(
    {None: Tier.GPU} | {name: tier for tier in Tier for name in (tier.name, tier.name.lower())}
)


class BlockStored(msgspec.Struct, tag="BlockStored", frozen=True, gc=False):
    """Blocks entered the cache, in the order of the prompt; the first one's parent is `parent_block_hash`.

    `extra_keys`: for each block what its hash covers beside tokens: the adapter's name, `[id, offset]` of
    images, in a prompt's first block its cache salt, digests of prompt embeddings. Events of other tiers than
    the GPU may come without `token_ids`, or (vLLM's offloading connector) without `extra_keys`.
    """

    block_hashes: list[BlockHash]
    token_ids: list[TokenId]
    block_size: int
    parent_block_hash: BlockHash | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[object] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class BlockRemoved(msgspec.Struct, tag="BlockRemoved", frozen=True, gc=False):
    """Blocks left the cache; once for each copy that had entered."""

    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag="AllBlocksCleared", frozen=True, gc=False):
    """The cache is empty."""


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KVEventBatch(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What one engine step changed. `ts`: seconds of the engine's clock."""

    ts: float
    events: list[KVEvent]
    data_parallel_rank: int | None = None


decode_batch = msgspec.msgpack.Decoder(KVEventBatch).decode


def joined(events: Iterable[KVEvent]) -> Iterator[KVEvent]:
    """The same with removals that follow each other as one: engines tell every evicted block by itself."""
    for removal, run in groupby(events, _removal):
        if removal is None:
            yield from run
        else:
            removed = cast(Iterator[BlockRemoved], run)
            yield BlockRemoved([block for event in removed for block in event.block_hashes], *removal)


def _removal(event: KVEvent) -> tuple[str | None, int | None] | None:
    """What removals must have in common to be told as one; None for other events."""
    return (event.medium, event.group_idx) if isinstance(event, BlockRemoved) else None


def stored_keys(event: BlockStored, parent: int | None) -> Keys:
    """The keys of an event's blocks; `parent`: the key of the block before them, None at a prompt's start.

    Requests for the same tokens, adapter and salt have the same keys. Blocks with images or embeddings, and
    all behind them, have keys that no text has.
    """
    token_ids = array("I", event.token_ids).tobytes()
    if not (event.extra_keys or event.lora_name):
        return chain(token_ids, event.block_size * TOKEN_BYTES, parent or 0)
    width, keys = event.block_size * TOKEN_BYTES, Keys()
    for block, start in enumerate(range(0, len(token_ids), width)):
        extra = (event.extra_keys[block] if event.extra_keys else None) or []
        content = extra[1:] if event.lora_name else extra  # the first is the adapter
        if parent is None:
            salt = next((key for key in content if isinstance(key, str)), None)
            content = [key for key in content if not isinstance(key, str)]
            parent = root_key(event.lora_name, salt)
        if content:
            parent = xxh3_64_intdigest(repr(content).encode(), parent)
        (parent,) = chain(token_ids[start : start + width], width, parent)
        keys.append(parent)
    return keys
