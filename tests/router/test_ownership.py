"""Which router owns a request: all agree, and only what must move does."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.shards import owner

bits = st.integers(min_value=0, max_value=2**64 - 1)
names = st.sets(st.text("0123456789abcdef", min_size=8, max_size=8), min_size=1, max_size=9)


def owners(routers, key, shards):
    """Those that take a request themselves, and those that others send it to."""
    take, sent = set(), set()
    for own in routers:
        others = sorted(routers - {own})
        place = owner(key, own, others, shards)
        if place is None:
            take.add(own)
        else:
            sent.add(others[place])
    return take, sent


@pytest.mark.parametrize(
    ("routers", "shards", "each"),
    [(1, 2, 1), (2, 1, 2), (2, 2, 1), (3, 2, 1), (4, 2, 2), (5, 2, 2), (4, 4, 1)],
)
def test_each_request_has_as_many_owners_as_routers_go_into_shards(routers, shards, each):
    for key in range(50):
        take, sent = owners({f"router {n}" for n in range(routers)}, key, shards)
        assert len(take) == each
        assert sent <= take


@given(routers=names, key=bits, shards=st.integers(min_value=1, max_value=5))
def test_whoever_a_request_is_sent_to_takes_it(routers, key, shards):
    take, sent = owners(routers, key, shards)
    assert sent <= take
    assert len(sent) == (1 if take != routers else 0)


@given(routers=names, key=bits, new=st.text("0123456789abcdef", min_size=8, max_size=8))
def test_a_key_moves_only_to_who_comes(routers, key, new):
    before, after = owners(routers, key, len(routers))[0], owners(routers | {new}, key, len(routers) + 1)[0]
    assert after in (before, {new})


def test_keys_are_spread_evenly():
    routers = {f"router {n}" for n in range(4)}
    held = Counter(name for key in range(2000) for name in owners(routers, key * 7919, 4)[0])
    assert min(held.values()) > 400
