"""What the KV index costs: block changes a second from the wire in, a match in a full fleet, bytes per block.

CPU time of one process with nothing else of the router; the best of some runs. Run through
`scripts/bench index`.
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from array import array
from collections.abc import Iterator
from itertools import count

import msgspec

from loadtests.report import table
from router.core.blocks import Prompt
from router.core.fleet import Fleet, Replica, Trust
from router.core.kv_events import decode_batch, joined
from router.core.placement import kv_aware

BLOCK = 16
REPLICAS = 64
PROMPT_TOKENS = 100_000
ROUNDS = 5
# Prompts of 64 blocks that come and go, and beside each as many blocks one at a time: decoding streams.
CHAIN = 64


def main() -> None:
    """Prints the three tables."""
    mixed = changes_per_s()
    print(table(["block changes a second, from msgpack", "thousands"], [["mixed", f"{mixed / 1e3:.0f}"]]))
    print()
    rows = [
        [name, f"{match_ms(held):.2f}"]
        for name, held in (("all", REPLICAS), ("half of them", 32), ("none", 0))
    ]
    print(
        table([f"{PROMPT_TOKENS} tokens held by", f"view and kv_aware among {REPLICAS}, ms"], rows),
        end="\n\n",
    )
    shared = [
        ["the same on all replicas", bytes_per_block(True)],
        ["its own on each", bytes_per_block(False)],
    ]
    print(
        table(["blocks", "bytes per block and replica"], [[name, f"{value:.0f}"] for name, value in shared])
    )


def fleet_of(replicas: int) -> Fleet:
    """Replicas r0, r1, ... whose events are followed."""
    fleet = Fleet()
    for n in range(replicas):
        fleet.joined(Replica(f"r{n}", f"http://r{n}", ("m",), block_size=BLOCK), 0.0)
        fleet.trusted(f"r{n}", Trust.EXACT, "", BLOCK)
    return fleet


def stored(hashes: list[int], token_ids: list[int], parent: int | None) -> dict[str, object]:
    """A BlockStored as vLLM writes it."""
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": token_ids,
        "block_size": BLOCK,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }


def payloads(prompts: int) -> Iterator[tuple[bytes, int]]:
    """Batches on the wire with how many blocks each changes: long stores, single ones, single removals."""
    names = count(2**63)
    for prompt in range(prompts):
        chain = [next(names) for _ in range(CHAIN)]
        ids = [(prompt * 7919 + n) % 100_000 for n in range(CHAIN * BLOCK)]
        yield msgspec.msgpack.encode([0.0, [stored(chain, ids, None)], 0]), CHAIN
        last = chain[-1]
        for n in range(CHAIN // 2):
            name = next(names)
            yield msgspec.msgpack.encode([0.0, [stored([name], [n + prompt] * BLOCK, last)], 0]), 1
            last = name
        removed = [
            {"type": "BlockRemoved", "block_hashes": [h], "medium": "GPU"} for h in chain[: CHAIN // 2]
        ]
        yield msgspec.msgpack.encode([0.0, removed, 0]), len(removed)


def changes_per_s() -> float:
    """Decoded, keyed and taken in by one process."""
    batches = list(payloads(1500))
    changes = sum(changed for _, changed in batches)
    return max(changes / took for took in (taken_in_s(batches) for _ in range(ROUNDS)))


def taken_in_s(batches: list[tuple[bytes, int]]) -> float:
    fleet = fleet_of(1)
    began = time.process_time()
    for payload, _ in batches:
        for event in joined(decode_batch(payload).events):
            fleet.apply("r0", event)
    return time.process_time() - began


def match_ms(held: int) -> float:
    """A view and kv_aware's choice for a long prompt whose keys are there, which so many replicas hold."""
    fleet, ids = fleet_of(REPLICAS), [n % 50_000 for n in range(PROMPT_TOKENS)]
    hashes = list(range(2**63, 2**63 + PROMPT_TOKENS // BLOCK))
    event = decode_batch(msgspec.msgpack.encode([0.0, [stored(hashes, ids, None)], 0])).events[0]
    for n in range(held):
        fleet.apply(f"r{n}", event)
    prompt = Prompt(PROMPT_TOKENS, array("I", ids).tobytes())
    prompt.keys(BLOCK)
    return 1e3 * min(_timed(fleet, prompt) for _ in range(4 * ROUNDS))


def _timed(fleet: Fleet, prompt: Prompt) -> float:
    began = time.process_time()
    kv_aware(fleet.view("m", prompt=prompt))
    return time.process_time() - began


def bytes_per_block(shared: bool, blocks: int = 2048) -> float:
    """Memory that `blocks` on each of the replicas take, divided by all of them."""
    fleet = fleet_of(REPLICAS)
    gc.collect()
    tracemalloc.start()
    for n in range(REPLICAS):
        offset = 0 if shared else n * blocks
        hashes = [(offset + i) * 0x9E3779B97F4A7C15 % 2**64 for i in range(1, blocks + 1)]
        ids = [offset % 1_000_003] * (blocks * BLOCK)
        batch = decode_batch(msgspec.msgpack.encode([0.0, [stored(hashes, ids, None)], 0]))
        for event in batch.events:
            fleet.apply(f"r{n}", event)
        del batch, hashes, ids
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return taken / (blocks * REPLICAS)


if __name__ == "__main__":
    main()
