import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.fleet import Fleet, Replica, State, View
from router.core.placement import POLICIES, least_requests, round_robin


def fleet_of(loads):
    fleet = Fleet()
    for i, load in enumerate(loads):
        fleet.joined(Replica(id=f"r{i}", url=f"http://r{i}", models=("m",)), now=0.0)
        for _ in range(load):
            fleet.started(f"r{i}", now=0.0)
    return fleet


def view(loads, turn=0):
    return View(fleet_of(loads).view("m").replicas, turn)


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


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@given(loads=st.lists(st.integers(min_value=0, max_value=9), max_size=8), turn=st.integers(min_value=0))
def test_every_policy_chooses_one_of_the_view_with_a_reason(policy, loads, turn):
    seen = view(loads, turn)
    placement = policy(seen)
    if not loads:
        assert placement is None
    else:
        assert placement.standing in seen.replicas
        assert placement.reason


@given(count=st.integers(min_value=1, max_value=6), requests=st.integers(min_value=0, max_value=60))
def test_least_requests_spreads_requests_that_stay(count, requests):
    fleet = fleet_of([0] * count)
    for _ in range(requests):
        fleet.started(least_requests(fleet.view("m")).standing.id, now=0.0)
    loads = [s.in_flight for s in fleet]
    assert sum(loads) == requests
    assert max(loads) - min(loads) <= 1


def test_tried_replicas_are_left_out():
    assert least_requests(view([0, 5]).without(frozenset({"r0"}))).standing.id == "r1"
    assert least_requests(view([0]).without(frozenset({"r0"}))) is None


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
    fleet.finished(flight)
    assert (standing.in_flight, standing.awaiting_first_token, standing.finished) == (0, 0, 1)


def test_a_flight_that_never_gave_a_token_leaves_nothing_behind():
    fleet = fleet_of([0])
    fleet.finished(fleet.started("r0", now=1.0))
    assert (fleet.get("r0").in_flight, fleet.get("r0").awaiting_first_token) == (0, 0)


def test_a_flight_outlives_its_replica():
    fleet = fleet_of([0])
    flight = fleet.started("r0", now=1.0)
    fleet.left("r0")
    fleet.first_token(flight, now=2.0)
    fleet.finished(flight)
    assert list(fleet) == []
    assert fleet.view("m").replicas == ()


def test_joining_again_keeps_the_standing_and_takes_what_is_new():
    fleet = fleet_of([2])
    fleet.failed("r0", now=1.0)
    fleet.joined(Replica(id="r0", url="http://other", models=("m", "lora")), now=2.0)
    standing = fleet.get("r0")
    assert (standing.in_flight, standing.state) == (2, State.DOWN)
    assert fleet.models() == ("lora", "m")


def test_views_follow_the_model():
    fleet = fleet_of([0])
    fleet.joined(Replica(id="x", url="http://x", models=("other",)), now=0.0)
    assert [s.id for s in fleet.view("other").replicas] == ["x"]
    assert fleet.view("none").replicas == ()
