"""How replicas and requests are divided: all routers agree, and only what must move does."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.shards import knowing, owner

bits = st.integers(min_value=0, max_value=2**64 - 1)
names = st.text("0123456789abcdef", min_size=8, max_size=8)
shares = st.dictionaries(names, st.integers(min_value=1, max_value=100), min_size=1, max_size=9)


@pytest.mark.parametrize(
    ("routers", "shards", "each"),
    [(1, 2, 1), (2, 1, 2), (2, 2, 1), (3, 2, 1), (4, 2, 2), (5, 2, 2), (4, 4, 1)],
)
def test_a_replica_is_known_to_one_router_of_as_many_as_there_are_shards(routers, shards, each):
    for replica in range(50):
        found = knowing(f"http://r{replica}", [f"router {n}" for n in range(routers)], shards)
        assert len(set(found)) == each


def test_replicas_are_spread_over_routers():
    known = Counter(
        n for replica in range(400) for n in knowing(f"r{replica}", ["a", "b", "c", "d"], shards=2)
    )
    assert known.total() == 800
    assert min(known.values()) > 150


@given(replica=st.text(max_size=9), routers=st.sets(names, min_size=1, max_size=9), new=names)
def test_a_replica_moves_only_to_a_router_that_comes(replica, routers, new):
    before = knowing(replica, sorted(routers), len(routers))
    after = knowing(replica, sorted(routers | {new}, reverse=True), len(routers) + 1)
    assert after in (before, [new])


@given(key=bits, shares=shares)
def test_an_owner_is_one_of_those_with_a_share_in_whatever_order_they_are_known(key, shares):
    found = owner(key, shares)
    assert found in shares
    assert owner(key, dict(reversed(shares.items()))) == found


@given(key=bits, shares=shares, new=names, more=st.integers(min_value=1, max_value=100))
def test_a_key_moves_only_to_a_router_whose_share_grows(key, shares, new, more):
    grown = {**shares, new: shares.get(new, 0) + more}
    assert owner(key, grown) in (owner(key, shares), new)


def test_who_has_three_times_the_replicas_owns_three_times_the_keys():
    owned = Counter(owner(key * 7919, {"small": 1, "large": 3}) for key in range(4000))
    assert 0.72 < owned["large"] / owned.total() < 0.78


@pytest.mark.parametrize("key", [0, 2**64 - 1])
def test_the_ends_of_the_range_have_an_owner(key):
    assert owner(key, {"one": 1}) == "one"
