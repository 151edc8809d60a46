"""Faults are not multiplied: tries beyond the first are a share of the traffic."""

from hypothesis import given
from hypothesis import strategies as st

from router.core.retry_budget import BURSTS, LEAST, SHARE, WINDOW_S, RetryBudget


def taken(budget, now, wanted=10_000):
    return sum(budget.take(now) for _ in range(wanted))


def test_without_traffic_there_are_a_few():
    assert taken(RetryBudget(), 0.0) == LEAST


def test_a_share_of_the_traffic_and_what_a_dying_replica_had_twice():
    budget = RetryBudget()
    for _ in range(100):
        budget.placed(in_flight=30, now=5.0)
    assert taken(budget, 5.5) == LEAST + SHARE * 100 + BURSTS * 30


def test_old_streams_of_a_replica_that_dies_may_all_go_on():
    budget = RetryBudget()
    for _ in range(200):
        budget.placed(in_flight=200, now=0.0)
    for left in range(200, 0, -1):
        budget.lost(left, now=30.0)
        assert budget.take(30.0)


def test_what_is_long_ago_does_not_count():
    budget = RetryBudget()
    budget.placed(in_flight=30, now=0.0)
    assert taken(budget, 0.0) > LEAST
    assert not budget.left(WINDOW_S - 1)
    assert taken(budget, WINDOW_S) == LEAST


def test_asking_spends_nothing():
    budget = RetryBudget()
    assert all(budget.left(0.0) for _ in range(100))
    assert taken(budget, 0.0) == LEAST


@given(st.lists(st.tuples(st.floats(0, 0.5), st.booleans(), st.integers(1, 50)), max_size=300))
def test_in_no_window_more_is_spent_than_is_allowed(steps):
    budget, now, spent, placed = RetryBudget(), 0.0, [], []
    for passed, is_retry, in_flight in steps:
        now += passed
        if not is_retry:
            budget.placed(in_flight, now)
            placed.append((now, in_flight))
        elif budget.take(now):
            spent.append(now)
            lately = [(at, held) for at, held in placed if at > now - WINDOW_S - 1]
            most = LEAST + SHARE * len(lately) + BURSTS * max((held for _, held in lately), default=0)
            assert sum(at > now - WINDOW_S + 1 for at in spent) <= most
