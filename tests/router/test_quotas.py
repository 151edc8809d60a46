"""Limits of tenants: tables, and what holds for every order of events."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.quotas import Allowance, Bucket, Elsewhere, Limit, Quota, Refusal, Use

INSTANT = st.floats(0, 600)
AMOUNT = st.integers(0, 500)


def test_without_limits_everything_is_taken():
    quota = Quota(Allowance())
    for _ in range(1000):
        quota.enter(0.0)
    quota.charge(10**9, 0.0)
    assert quota.refusal(0.0) is None
    assert not quota.limited
    assert quota.left(0.0) == []


def test_requests_at_once_end_and_make_room():
    quota = Quota(Allowance(concurrent=2))
    quota.enter(0.0)
    assert quota.refusal(0.0) is None
    quota.enter(0.0)
    assert quota.refusal(0.0) == Refusal(Limit.CONCURRENT, 2, 1.0)
    quota.leave()
    assert quota.refusal(0.0) is None


def test_a_minutes_requests_may_come_at_once_and_come_back_evenly():
    quota = Quota(Allowance(requests_per_minute=60))
    for _ in range(60):
        assert quota.refusal(0.0) is None
        quota.enter(0.0)
    assert quota.refusal(0.0) == Refusal(Limit.REQUESTS, 60, 1.0)
    assert quota.refusal(0.75) == Refusal(Limit.REQUESTS, 60, pytest.approx(0.25))
    assert quota.refusal(1.0) is None


def test_tokens_are_charged_afterwards_and_a_debt_is_paid_back():
    quota = Quota(Allowance(tokens_per_minute=600))
    quota.enter(0.0)
    quota.charge(1200, 0.0)
    limit, allowed, wait_s = quota.refusal(0.0)
    assert (limit, allowed, wait_s) == (Limit.TOKENS, 600, pytest.approx(60.1))
    assert quota.refusal(60.0) is not None
    assert quota.refusal(60.2) is None


def test_what_is_left_is_told():
    quota = Quota(Allowance(concurrent=9, requests_per_minute=60, tokens_per_minute=600))
    quota.enter(0.0)
    quota.charge(900, 0.0)
    assert quota.left(0.0) == [
        (Limit.REQUESTS, 60, 59, pytest.approx(1.0)),
        (Limit.TOKENS, 600, 0, pytest.approx(90.0)),
    ]


@pytest.mark.parametrize(
    ("before", "after", "left"),
    [
        (Allowance(requests_per_minute=60), Allowance(requests_per_minute=30), 20),  # ten are used
        (Allowance(requests_per_minute=60), Allowance(requests_per_minute=5), 0),
        (Allowance(requests_per_minute=60), Allowance(requests_per_minute=600), 590),
        (Allowance(), Allowance(requests_per_minute=60), 60),
    ],
)
def test_another_allowance_forgives_nothing(before, after, left):
    quota = Quota(before)
    for _ in range(10):
        quota.enter(100.0)
    quota.allow(after, 100.0)
    assert quota.left(100.0)[0].left == left
    assert quota.in_flight == 10


@given(st.integers(1, 10_000), st.lists(st.tuples(INSTANT, AMOUNT), max_size=30))
def test_no_bucket_gives_more_than_a_minutes_worth_and_what_comes_back(per_minute, takes):
    bucket = Bucket(per_minute)
    taken = 0
    for now, amount in takes:  # in any order
        bucket.level(now)
        if bucket.wait_s(amount, now) == 0:
            bucket.take(amount, now)
            taken += amount
    latest = max((now for now, _ in takes), default=0.0)
    assert taken <= per_minute * (1 + latest / 60) + 1e-6
    assert bucket.level(latest) <= per_minute


@given(st.integers(1, 10_000), st.integers(0, 100_000), INSTANT)
def test_whoever_waits_as_told_is_taken_and_not_much_sooner(per_minute, tokens, now):
    quota = Quota(Allowance(tokens_per_minute=per_minute))
    quota.charge(tokens, now)
    refusal = quota.refusal(now)
    if refusal is not None:
        assert quota.refusal(now + refusal.wait_s * 0.9 - 0.001) is not None
        assert quota.refusal(now + refusal.wait_s + 0.001) is None


# -- several routers

LIMITED = Allowance(concurrent=4, requests_per_minute=60, tokens_per_minute=600)


def test_what_is_used_at_another_router_counts_here():
    quotas = {"a": Quota(LIMITED)}
    elsewhere = Elsewhere()
    elsewhere.heard("r", {"a": Use()}, quotas, 0.0)
    elsewhere.heard("r", {"a": Use(3, 10, 100)}, quotas, 0.0)
    assert [left.left for left in quotas["a"].left(0.0)] == [50, 500]
    quotas["a"].enter(0.0)
    assert quotas["a"].refusal(0.0).limit is Limit.CONCURRENT
    elsewhere.only(frozenset(), quotas)  # the router is gone
    assert quotas["a"].refusal(0.0) is None


def test_what_a_router_used_before_it_was_met_is_not_charged():
    quotas = {"a": Quota(LIMITED)}
    Elsewhere().heard("r", {"a": Use(1, 10_000, 10**6)}, quotas, 0.0)
    assert [left.left for left in quotas["a"].left(0.0)] == [60, 600]
    assert quotas["a"].elsewhere == 1


def test_tenants_that_are_not_known_here_are_nobodys():
    Elsewhere().heard("r", {"b": Use(1, 1, 1)}, {"a": Quota(LIMITED)}, 0.0)


@given(st.data(), st.lists(st.tuples(st.sampled_from("pq"), st.integers(1, 50)), max_size=40))
def test_routers_that_hear_each_other_agree_whatever_is_lost(data, charges):
    """Two routers, reports lost at random; after the last report both have counted every token once."""
    quotas = {name: {"t": Quota(Allowance(tokens_per_minute=100_000))} for name in "pq"}
    heard = {name: Elsewhere() for name in "pq"}
    other = {"p": "q", "q": "p"}

    def tell(name):
        heard[other[name]].heard(name, {"t": quotas[name]["t"].use}, quotas[other[name]], 0.0)

    tell("p")
    tell("q")
    for name, tokens in charges:
        quotas[name]["t"].charge(tokens, 0.0)
        if data.draw(st.booleans()):
            tell(name)
    tell("p")
    tell("q")
    total = 100_000 - sum(tokens for _, tokens in charges)
    assert [quotas[name]["t"].left(0.0)[0].left for name in "pq"] == [total, total]
