"""Typed KV events, and that requests and events give a block the same key."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.blocks import Prompt, block_keys, root_key
from router.core.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    decode_batch,
    joined,
    stored_keys,
)

TOKENS = list(range(100, 112))
# As vLLM 0.32 sent it for a prompt of eight tokens with a salt; fields that are left out there are here too.
STORED: dict[str, Any] = {
    "type": "BlockStored",
    "block_hashes": [2**64 - 1, 7],
    "parent_block_hash": None,
    "token_ids": TOKENS[:8],
    "block_size": 4,
    "lora_id": None,
    "medium": "GPU",
    "lora_name": None,
    "extra_keys": [["salt"], None],
    "group_idx": 0,
    "kv_cache_spec_kind": "full_attention",
}


def encoded(*events: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode([1.5, events, 0])


def stored(parent: int | None = None, **fields: Any) -> list[int]:
    """Keys of three blocks of four tokens."""
    event = BlockStored([1, 2, 3], TOKENS, 4, **fields)
    return stored_keys(event, parent)


def asked(adapter: str | None = None, salt: str | None = None) -> list[int]:
    """Keys of a request for the same tokens and one more, since the last is always computed."""
    ids = array("I", [*TOKENS, 5]).tobytes()
    return Prompt(len(ids) // 4, ids, root=root_key(adapter, salt)).keys(4)


def test_a_batch_is_read_as_vllm_writes_it() -> None:
    removed = {"type": "BlockRemoved", "block_hashes": [b"\1" * 32], "medium": "CPU", "group_idx": 1}
    batch = decode_batch(encoded(STORED, removed, {"type": "AllBlocksCleared"}))
    assert batch.ts == 1.5
    event, other, cleared = batch.events
    assert isinstance(event, BlockStored)
    assert (event.block_hashes, event.extra_keys) == ([2**64 - 1, 7], [["salt"], None])
    assert other == BlockRemoved([b"\1" * 32], "CPU", 1)
    assert cleared == AllBlocksCleared()


@pytest.mark.parametrize(
    "event",
    [
        {"type": "BlockMoved"},
        {"block_hashes": []},
        {**STORED, "token_ids": [-1]},
        {**STORED, "token_ids": [2**32]},
        {**STORED, "block_hashes": ["x"]},
        {**STORED, "block_size": None},
    ],
)
def test_what_is_no_event_is_refused(event: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_batch(encoded(event))


def test_a_block_has_one_key_in_requests_and_in_events() -> None:
    assert stored() == asked()
    assert stored(lora_name="a", extra_keys=[["a"]] * 3) == asked("a")
    assert stored(extra_keys=[["s"], None, None]) == asked(salt="s")
    assert stored(lora_name="a", extra_keys=[["a", "s"], ["a"], ["a"]]) == asked("a", "s")
    assert stored(lora_name="a", extra_keys=[["a", "a"], ["a"], ["a"]]) == asked("a", "a")
    assert stored(lora_name="a") == asked("a"), "the offloading connector sends no extra keys"
    rest = BlockStored([3], TOKENS[8:], 4)
    assert stored_keys(rest, asked()[1]) == asked()[2:]


def test_prompts_that_share_no_cache_share_no_key() -> None:
    kinds = [asked(), asked("a"), asked(salt="a"), asked("a", "a"), asked("aa"), asked("a", "b"), asked("ab")]
    kinds.append(block_keys(array("I", TOKENS).tobytes(), 2))
    assert len({key for keys in kinds for key in keys}) == sum(map(len, kinds))


@pytest.mark.parametrize("content", [["cat.png", 0], b"\1\2"])
def test_blocks_with_images_and_all_behind_them_are_not_those_of_a_text(content: object) -> None:
    keys = stored(extra_keys=[None, [content], None])
    assert keys[0] == asked()[0]
    assert not {*keys[1:]} & {*asked()}
    assert keys != stored(extra_keys=[None, [["dog.png", 0]], None])
    first = stored(extra_keys=[[content, "s"], None, None])
    assert not {*first} & {*asked(), *asked(salt="s")}


@given(st.binary(max_size=600).map(lambda data: data[: len(data) // 4 * 4]), st.integers(0, 1))
def test_chains_of_other_block_sizes_have_other_keys(data: bytes, parent: int) -> None:
    keys = [key for size in (1, 2, 16, 32) for key in block_keys(data, size, parent)]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 1 << 60 for key in keys)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_the_last_token_is_never_cached(tokens: int, blocks: int) -> None:
    ids = array("I", range(tokens)).tobytes()
    assert len(Prompt(tokens, ids).keys(4)) == blocks


def test_removals_that_follow_each_other_are_joined_and_nothing_else_is():
    cleared, stored = AllBlocksCleared(), BlockStored([1], [1] * 4, 4)
    events = [
        BlockRemoved([1]), BlockRemoved([2, 3]), BlockRemoved([4], "CPU"), BlockRemoved([5], "CPU", 1),
        stored, stored, BlockRemoved([6]), cleared,
    ]  # fmt: skip
    assert list(joined(events)) == [
        BlockRemoved([1, 2, 3]), BlockRemoved([4], "CPU"), BlockRemoved([5], "CPU", 1),
        stored, stored, BlockRemoved([6]), cleared,
    ]  # fmt: skip
