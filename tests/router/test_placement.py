import inspect
import subprocess
import sys
from collections import Counter
from itertools import permutations
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from router.core.fleet import Fleet, Load, Replica, Standing, State, View
from router.core.placement import (
    BALANCE,
    POLICIES,
    consistent_hash,
    least_requests,
    power_of_two,
    random,
    round_robin,
)

bits = st.integers(min_value=0, max_value=2**64 - 1)
names = st.sets(st.text(min_size=1, max_size=9), min_size=2, max_size=9)


def fleet_of(loads):
    fleet = Fleet()
    for i, load in enumerate(loads):
        fleet.joined(Replica(id=f"r{i}", url=f"http://r{i}", models=("m",)), now=0.0)
        for _ in range(load):
            fleet.started(f"r{i}", now=0.0)
    return fleet


def view(loads, turn=0, draw=0, key=None):
    return View(fleet_of(loads).view("m").replicas, turn, draw, key)


def homes(ids, keys):
    """Where consistent_hash puts each key on these replicas while all are idle."""
    idle = tuple(Standing(Replica(id, "", ("m",))) for id in sorted(ids))
    return {key: consistent_hash(View(idle, key=key)).standing.id for key in keys}


@pytest.mark.parametrize(
    ("loads", "turn", "chosen"),
    [
        ([0], 0, "r0"),
        ([3, 1, 2], 0, "r1"),
        ([3, 1, 2], 7, "r1"),
        ([1, 1, 2], 0, "r0"),
        ([1, 1, 2], 1, "r1"),
        ([2, 0, 0], 3, "r2"),
    ],
)
def test_least_requests(loads, turn, chosen):
    assert least_requests(view(loads, turn)).standing.id == chosen


@pytest.mark.parametrize(("turn", "chosen"), [(0, "r0"), (1, "r1"), (2, "r2"), (3, "r0")])
def test_round_robin(turn, chosen):
    assert round_robin(view([5, 0, 0], turn)).standing.id == chosen


@pytest.mark.parametrize(
    ("loads", "draw", "chosen"),
    [
        ([5], 2**64 - 1, "r0"),
        ([5, 1], 0, "r1"),
        ([5, 1], 1, "r1"),
        ([1, 1], 0, "r0"),
        ([1, 1], 1, "r1"),
        ([4, 9, 0], 0, "r0"),  # of r0 and r1
        ([4, 9, 0], 3, "r2"),  # of r0 and r2
        ([4, 9, 0], 1, "r2"),  # of r1 and r2
    ],
)
def test_power_of_two(loads, draw, chosen):
    assert power_of_two(view(loads, draw=draw)).standing.id == chosen


# (own, of other routers) at each replica: policies that go by requests see the sum.
@pytest.mark.parametrize(
    ("policy", "own", "others", "key", "chosen"),
    [
        (least_requests, [0, 1, 1], [2, 0, 1], None, "r1"),
        (least_requests, [0, 0, 0], [1, 1, 0], None, "r2"),
        (power_of_two, [0, 1], [5, 0], None, "r1"),
        (consistent_hash, [0, 0, 0], [0, 0, 0], 0, "r0"),
        (consistent_hash, [0, 0, 0], [7, 3, 2], 0, "r1"),  # its home is full of what others placed there
        (consistent_hash, [3, 3, 2], [1, 1, 2], 0, "r0"),
    ],
)
def test_what_other_routers_placed_counts(policy, own, others, key, chosen):
    fleet = fleet_of(own)
    for i, count in enumerate(others):
        fleet.elsewhere(f"r{i}", Load(in_flight=count))
    assert policy(View(fleet.view("m").replicas, key=key)).standing.id == chosen


@given(loads=st.permutations(range(6)))
def test_power_of_two_draws_every_pair_as_often_and_never_takes_the_worse(loads):
    seen = view(loads)
    won = Counter(power_of_two(View(seen.replicas, draw=draw)).standing.in_flight for draw in range(6 * 5))
    assert won == Counter(min(pair) for pair in permutations(range(6), 2))


@pytest.mark.parametrize("policy", [power_of_two, random])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_chance_is_fair_among_equals(policy, count):
    seen = view([1] * count)
    draws = range(count * max(count - 1, 1) * 3)
    won = Counter(policy(View(seen.replicas, draw=draw)).standing.id for draw in draws)
    assert len(won) == count
    assert len(set(won.values())) == 1


@pytest.mark.parametrize(("draw", "chosen"), [(0, "r0"), (1, "r1"), (2, "r2"), (3, "r0"), (2**64 - 1, "r0")])
def test_random(draw, chosen):
    assert random(view([5, 0, 0], draw=draw)).standing.id == chosen


# That key 0 is at home on r0, then on r1, and so on, is the hash itself: routers of different versions must
# agree while a fleet is updated.
@pytest.mark.parametrize(
    ("loads", "key", "chosen", "reason"),
    [
        ([0, 0, 0], 0, "r0", "home of the key"),
        ([0, 0, 0], 1, "r2", "home of the key"),
        ([0, 0, 0], 2**64 - 1, "r0", "home of the key"),
        ([0], 1, "r0", "home of the key"),
        ([4, 4, 4], 0, "r0", "home of the key"),  # 13 requests, so 7 on each at most
        ([5, 4, 3], 0, "r0", "home of the key"),
        ([7, 3, 2], 0, "r1", "next for the key; its home r0 has 7 of at most 7 requests"),
        ([9, 0, 0, 9], 0, "r1", "next for the key; its home r0 has 9 of at most 8 requests"),
        ([9, 9, 0, 0], 0, "r3", "next for the key; its home r0 has 9 of at most 8 requests"),
        ([3, 1, 2], None, "r1", "no key; fewest requests in flight (1)"),
    ],
)
def test_consistent_hash(loads, key, chosen, reason):
    placement = consistent_hash(view(loads, key=key))
    assert (placement.standing.id, placement.reason) == (chosen, reason)


@given(ids=names, keys=st.sets(bits, max_size=9), data=st.data())
def test_keys_move_only_with_their_replica(ids, keys, data):
    """One way a replica leaves and only its keys move; the other way it comes and only they come to it."""
    one = data.draw(st.sampled_from(sorted(ids)))
    with_it, without_it = homes(ids, keys), homes(ids - {one}, keys)
    assert {key for key in keys if with_it[key] != without_it[key]} == {
        key for key in keys if with_it[key] == one
    }


@given(loads=st.lists(st.integers(min_value=0, max_value=9), min_size=2, max_size=8), key=bits)
def test_the_next_for_a_key_is_the_same_whether_its_home_is_full_or_failed(loads, key):
    idle = view([0] * len(loads), key=key)
    order, tried = [], frozenset()
    while placement := consistent_hash(idle.without(tried)):
        order.append(placement.standing.id)
        tried |= {placement.standing.id}
    most = ceil(BALANCE * (sum(loads) + 1) / len(loads))
    room = [id for id in order if loads[int(id[1:])] < most]
    assert consistent_hash(view(loads, key=key)).standing.id == room[0]


@given(count=st.integers(min_value=1, max_value=9), keys=st.lists(st.sampled_from([1, 2, 3]), max_size=60))
def test_popular_keys_never_fill_a_replica_beyond_its_bound(count, keys):
    fleet = fleet_of([0] * count)
    for placed, key in enumerate(keys, 1):
        fleet.started(consistent_hash(fleet.view("m", key=key)).standing.id, now=0.0)
        assert max(s.in_flight for s in fleet) <= ceil(BALANCE * placed / count)


@pytest.mark.parametrize("name", ["http://10.0.0.{}:8000", "engine-{}", "{}"])
@pytest.mark.parametrize("count", [2, 5, 64])
def test_keys_spread_evenly(name, count):
    ids = [name.format(i) for i in range(count)]
    held = Counter(homes(ids, range(400 * count)).values())
    # Five standard deviations of a fair draw, 20 each.
    assert all(300 <= held[id] <= 500 for id in ids)


def test_a_new_replica_takes_its_share_of_the_keys():
    keys = range(4000)
    before, after = homes("abcdefg", keys), homes("abcdefgh", keys)
    moved = sum(before[key] != after[key] for key in keys)
    assert 400 <= moved <= 600  # 500 is an eighth


def test_another_process_finds_the_same_homes():
    program = (
        "from router.core.fleet import *; from router.core.placement import consistent_hash as choose\n"
        "idle = tuple(Standing(Replica(id, '', ('m',))) for id in 'abcdefg')\n"
        "print(*(choose(View(idle, key=key)).standing.id for key in range(100)))"
    )
    said = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True)
    assert said.split() == list(homes("abcdefg", range(100)).values())


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@given(
    loads=st.lists(st.integers(min_value=0, max_value=9), max_size=8),
    turn=st.integers(min_value=0),
    draw=bits,
    key=st.none() | bits,
)
def test_every_policy_chooses_one_of_the_view_with_a_reason(policy, loads, turn, draw, key):
    seen = view(loads, turn, draw, key)
    placement = policy(seen)
    if not loads:
        assert placement is None
    else:
        assert placement.standing in seen.replicas
        assert placement.reason
        assert policy(seen) == placement


@given(count=st.integers(min_value=1, max_value=6), requests=st.integers(min_value=0, max_value=60))
def test_least_requests_spreads_requests_that_stay(count, requests):
    fleet = fleet_of([0] * count)
    for _ in range(requests):
        fleet.started(least_requests(fleet.view("m")).standing.id, now=0.0)
    loads = [s.in_flight for s in fleet]
    assert sum(loads) == requests
    assert max(loads) - min(loads) <= 1


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@given(turn=st.integers(min_value=0), draw=bits, key=st.none() | bits)
def test_tried_replicas_are_left_out(policy, turn, draw, key):
    seen = view([0, 5], turn, draw, key)
    assert seen.without(frozenset()) == seen
    assert policy(seen.without(frozenset({"r0"}))).standing.id == "r1"
    assert policy(seen.without(frozenset({"r0", "r1"}))) is None


def test_a_replica_that_is_down_is_not_in_the_view():
    fleet = fleet_of([0, 0])
    assert fleet.failed("r0", now=1.0)
    assert not fleet.failed("r0", now=2.0)
    assert [s.id for s in fleet.view("m").replicas] == ["r1"]
    assert fleet.get("r0").since == 1.0
    assert fleet.recovered("r0", now=3.0)
    assert not fleet.recovered("r0", now=4.0)
    assert [s.id for s in fleet.view("m").replicas] == ["r0", "r1"]


def test_a_flight_is_counted_until_it_ends():
    fleet = fleet_of([0])
    flight = fleet.started("r0", now=1.0)
    standing = fleet.get("r0")
    assert (standing.in_flight, standing.awaiting_first_token) == (1, 1)
    fleet.first_token(flight, now=2.0)
    fleet.first_token(flight, now=3.0)
    assert (standing.in_flight, standing.awaiting_first_token, flight.first_token_at) == (1, 0, 2.0)
    fleet.finished(flight, now=4.0)
    assert (standing.in_flight, standing.awaiting_first_token, standing.finished) == (0, 0, 1)


def test_a_flight_that_never_gave_a_token_leaves_nothing_behind():
    fleet = fleet_of([0])
    fleet.finished(fleet.started("r0", now=1.0), now=2.0)
    assert (fleet.get("r0").in_flight, fleet.get("r0").awaiting_first_token) == (0, 0)


def test_a_flight_outlives_its_replica():
    fleet = fleet_of([0])
    flight = fleet.started("r0", now=1.0)
    fleet.left("r0")
    fleet.first_token(flight, now=2.0)
    fleet.finished(flight, now=4.0)
    assert list(fleet) == []
    assert fleet.view("m").replicas == ()


def test_joining_again_keeps_the_standing_and_takes_what_is_new():
    fleet = fleet_of([2])
    fleet.failed("r0", now=1.0)
    fleet.joined(Replica(id="r0", url="http://other", models=("m", "lora")), now=2.0)
    standing = fleet.get("r0")
    assert (standing.in_flight, standing.state) == (2, State.DOWN)
    assert fleet.models() == ("lora", "m")


def test_views_follow_the_model_and_carry_what_the_request_brings():
    fleet = fleet_of([0])
    seen = fleet.view("m", draw=7, key=8)
    assert (seen.turn, seen.draw, seen.key) == (0, 7, 8)
    assert (seen.without(frozenset({"r0"})).draw, seen.without(frozenset({"r0"})).key) == (7, 8)
    fleet.joined(Replica(id="x", url="http://x", models=("other",)), now=0.0)
    assert [s.id for s in fleet.view("other").replicas] == ["x"]
    assert fleet.view("none").replicas == ()


def test_the_page_on_policies_shows_the_code_as_it_is():
    assert inspect.getsource(power_of_two) in (ROOT / "docs" / "add-a-policy.md").read_text()
