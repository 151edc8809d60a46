"""KV events as vLLM publishes them, typed: what entered and what left a replica's cache, on which tier.

The wire is msgpack: a batch is an array, an event a map whose key `type` is the name of its class
(vllm/distributed/kv_events.py, 0.32 and 0.33). Fields that the router does not read are skipped.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

BlockHash = int | bytes


class Tier(StrEnum):
    """Where a block lies, from the fastest; as vLLM's `medium`, which says GPU on CPUs too."""

    GPU = "GPU"
    CPU = "CPU"
    DISK = "STORAGE"


class BlockStored(msgspec.Struct, tag="BlockStored", frozen=True):
    """Blocks entered the cache, in the order of the prompt; the first one's parent is `parent_block_hash`."""

    block_hashes: list[BlockHash]
    token_ids: list[int]
    block_size: int
    parent_block_hash: BlockHash | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[object] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class BlockRemoved(msgspec.Struct, tag="BlockRemoved", frozen=True):
    """Blocks left the cache; once for each copy that had entered."""

    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag="AllBlocksCleared", frozen=True):
    """The cache is empty."""


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KVEventBatch(msgspec.Struct, array_like=True, frozen=True):
    """What one engine step changed."""

    ts: float
    events: list[KVEvent]
    data_parallel_rank: int | None = None


decode_batch = msgspec.msgpack.Decoder(KVEventBatch).decode
