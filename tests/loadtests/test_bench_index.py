import pytest

from loadtests import bench_index
from router.core.kv_events import BlockRemoved, BlockStored, decode_batch


def test_batches_change_as_many_blocks_as_they_say():
    for payload, changed in bench_index.payloads(prompts=2):
        events = decode_batch(payload).events
        assert {type(event) for event in events} <= {BlockStored, BlockRemoved}
        assert sum(len(event.block_hashes) for event in events) == changed


def test_every_change_reaches_the_index():
    fleet, held = bench_index.fleet_of(1), 0
    for payload, changed in bench_index.payloads(prompts=3):
        events = decode_batch(payload).events
        held += changed if isinstance(events[0], BlockStored) else -changed
        for event in events:
            fleet.apply("r0", event)
    assert len(fleet.index) == held > 0


@pytest.mark.parametrize("shared", [True, False])
def test_memory_is_measured(shared):
    assert 0 < bench_index.bytes_per_block(shared, blocks=64) < 2000
