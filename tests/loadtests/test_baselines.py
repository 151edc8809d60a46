"""Other routers' rules, pinned: what each chooses, and where it switches from one way to another."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.baselines import (
    PAPERS,
    SHIPPED,
    Conductor,
    Dynamo,
    Llmd,
    LlmdPrecise,
    LMetric,
    PromptTree,
    RayPrefix,
    Smg,
    SmgEvents,
)
from loadtests.trace import BLOCK_TOKENS
from loadtests.virtual_engine import Report
from router.core.blocks import Prompt
from router.core.fleet import Cached, Fleet, Replica

EVERY = {**SHIPPED, **PAPERS}
IDLE = Report(waiting=0, running=0, kv_usage=0.0)


def prompt(*keys):
    """A prompt of so many full blocks."""
    return Prompt.of_keys(BLOCK_TOKENS * len(keys), list(keys), BLOCK_TOKENS)


TEN = prompt(*range(10))


def fleet(loads, waiting=None, decoding=None):
    """Replicas r0, r1, ... with so many requests of no tokens each; then with prompts of so many blocks
    that wait for their first token, and that decode."""
    fleet = Fleet()
    for i, load in enumerate(loads):
        fleet.joined(Replica(id=f"r{i}", url="", models=("m",)), now=0.0)
        for _ in range(load):
            fleet.first_token(fleet.started(f"r{i}", now=0.0), now=0.0)
        for blocks in (decoding or {}).get(i, ()):
            flight = fleet.started(f"r{i}", 0.0, Prompt(BLOCK_TOKENS * blocks))
            fleet.first_token(flight, now=0.0)
        for blocks in (waiting or {}).get(i, ()):
            fleet.started(f"r{i}", 0.0, Prompt(BLOCK_TOKENS * blocks))
    return fleet


def view(loads, cached=None, asked=TEN, draw=0, **work):
    """`cached`: blocks of the prompt by replica."""
    seen = fleet(loads, **work).view("m", draw)
    held = {f"r{i}": Cached(BLOCK_TOKENS * blocks) for i, blocks in (cached or {}).items()}
    return replace(seen, num_tokens=asked.num_tokens, cached=held)


def choice(policy, seen, asked=TEN, reports=None):
    idle = {standing.id: IDLE for standing in seen.replicas}
    return policy(seen, asked, {**idle, **(reports or {})}).standing.id


def taught(policy, sent):
    """The policy after it sent each prompt to a replica, since there was no other."""
    for number, asked in sent:
        alone = [s for s in view([0] * 4).replicas if s.id == f"r{number}"]
        choice(policy, replace(view([0] * 4), replicas=tuple(alone), num_tokens=asked.num_tokens), asked)
    return policy


# -- all of them


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_nothing_is_chosen_where_nothing_is(make):
    assert make()(view([]), TEN, {}) is None


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
@given(
    loads=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    cached=st.dictionaries(st.integers(0, 4), st.integers(1, 10)),
    draw=st.integers(0, 2**64 - 1),
)
def test_one_of_the_view_is_chosen_and_again_the_same(make, loads, cached, draw):
    seen = view(loads, {i: blocks for i, blocks in cached.items() if i < len(loads)}, draw=draw)
    reports = {s.id: Report(waiting=i, running=0, kv_usage=i / 9) for i, s in enumerate(seen.replicas)}
    placement = make()(seen, TEN, reports)
    assert placement.standing in seen.replicas
    assert placement.reason
    again = make()(seen, TEN, reports)
    assert again.standing is placement.standing


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_each_router_learns_for_itself(make):
    first, second = make(), make()
    taught(first, [(1, TEN)])
    assert choice(second, view([0, 0], draw=0)) == choice(make(), view([0, 0], draw=0))


# -- what was sent where


def test_a_tree_knows_how_much_of_a_prompt_each_replica_was_sent():
    tree = PromptTree()
    tree.insert([1, 2, 3], "a")
    tree.insert([1, 2, 4], "b")
    assert tree.match([1, 2, 3, 9]) == {"a": 3, "b": 2}
    assert tree.match([9, 1]) == {}
    assert (tree.size("a"), tree.size("c")) == (3, 0)


def test_a_bounded_tree_drops_the_oldest_leaves():
    tree = PromptTree(capacity=4)
    tree.insert([1, 2, 3], "a")
    tree.insert([1, 4, 5], "a")
    assert tree.size("a") == 4
    assert tree.match([1, 2, 3]) == {"a": 2}
    assert tree.match([1, 4, 5]) == {"a": 3}


@given(
    prompts=st.lists(
        st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.sampled_from("ab")), max_size=30
    ),
    capacity=st.integers(4, 12),
)
def test_a_tree_is_bounded_and_holds_the_last_prompt(prompts, capacity):
    tree = PromptTree(capacity)
    for path, replica in prompts:
        keys = [hash(tuple(path[: i + 1])) for i in range(len(path))]
        tree.insert(keys, replica)
        assert tree.size(replica) <= capacity
        assert tree.match(keys)[replica] == len(keys)


# -- SMG


@pytest.mark.parametrize(
    ("loads", "sent", "chosen"),
    [
        ([2, 1], 10, "r0"),
        ([2, 1], 4, "r0"),
        ([2, 1], 3, "r1"),  # three tenths are not more than 0.3
        ([64, 0], 10, "r0"),  # not more than 64 apart
        ([65, 0], 10, "r1"),
        ([195, 130], 10, "r0"),  # 65 apart, but not more than 1.5 times as many
        ([196, 130], 10, "r1"),
    ],
)
def test_smg(loads, sent, chosen):
    policy = taught(Smg(), [(0, prompt(*range(sent)))])
    assert choice(policy, view(loads)) == chosen


def test_smg_learns_from_what_it_balances_and_not_from_events():
    policy = Smg()
    assert choice(policy, view([1, 0, 5], cached={2: 10})) == "r1"
    assert choice(policy, view([0, 5, 0], cached={2: 10})) == "r1"


@pytest.mark.parametrize(
    ("loads", "cached", "chosen"),
    [
        ([5, 1, 0], {0: 4, 1: 3}, "r0"),
        ([5, 1, 0], {0: 3, 1: 3}, "r1"),
        ([5, 1, 0], {0: 1}, "r0"),  # no cache threshold
        ([5, 1, 0], {}, "r2"),
        ([64, 1, 0], {0: 4}, "r0"),
        ([65, 1, 0], {0: 4}, "r2"),
    ],
)
def test_smg_by_events(loads, cached, chosen):
    assert choice(SmgEvents(), view(loads, cached)) == chosen


# -- Ray


@pytest.mark.parametrize(
    ("loads", "sent", "chosen"),
    [
        ([900, 0], [(0, prompt(0))], "r0"),  # a tenth, and loads do not matter
        ([900, 0], [(0, prompt(99))], "r1"),  # nothing of it: who was sent least
        ([0, 900], [(0, prompt(99)), (1, prompt(98, 97))], "r0"),
        ([3, 2], [(0, TEN), (1, TEN)], "r1"),  # both were sent as much
        ([3, 2], [], "r1"),
    ],
)
def test_ray(loads, sent, chosen):
    assert choice(taught(RayPrefix(), sent), view(loads)) == chosen


def test_ray_needs_a_tenth_of_the_text():
    eleven = prompt(*range(11))
    policy = taught(RayPrefix(), [(0, prompt(0))])
    assert choice(policy, view([0, 0], asked=eleven), eleven) == "r1"


def test_ray_with_a_threshold_takes_the_better_of_two_when_loads_differ_by_more():
    policy = taught(RayPrefix(imbalanced_threshold=5), [(0, TEN)])
    assert choice(policy, view([5, 0])) == "r0"
    assert choice(policy, view([6, 0])) == "r1"


# -- Dynamo, LMetric, Mooncake


@pytest.mark.parametrize(
    ("work", "cached", "default", "tuned"),
    [
        ({}, {0: 4}, "r0", "r0"),
        ({"waiting": {0: [3]}}, {0: 4}, "r1", "r0"),  # 3 + 6 to prefill and 3 in use, against 10 and 0
        ({"waiting": {0: [1]}}, {0: 4}, "r0", "r0"),
        ({"decoding": {0: [3]}}, {0: 4}, "r0", "r0"),
        ({"decoding": {0: [5]}}, {0: 4}, "r1", "r0"),
        ({"decoding": {0: [17]}}, {0: 4}, "r1", "r1"),
    ],
)
def test_dynamo(work, cached, default, tuned):
    assert choice(Dynamo(), view([0, 0], cached, **work)) == default
    assert choice(Dynamo(prefill_scale=4), view([0, 0], cached, **work)) == tuned
    assert EVERY["dynamo"]() == Dynamo()
    assert EVERY["dynamo_tuned"]() == Dynamo(prefill_scale=4)


@pytest.mark.parametrize(
    ("loads", "waiting", "cached", "chosen"),
    [
        ([1, 1], {}, {0: 1}, "r0"),
        ([3, 1], {}, {0: 4}, "r1"),  # 6 x 4 against 10 x 2
        ([3, 1], {}, {0: 6}, "r0"),  # 4 x 4
        ([0, 0], {0: [1]}, {0: 6}, "r1"),  # 5 x 2 against 10 x 1: by chance, so see the next
        ([0, 0], {0: [1]}, {0: 7}, "r0"),
    ],
)
def test_lmetric(loads, waiting, cached, chosen):
    draw = 1 if chosen == "r1" else 0
    assert choice(LMetric(), view(loads, cached, waiting=waiting, draw=draw)) == chosen


@pytest.mark.parametrize(
    ("work", "cached", "chosen"),
    [
        ({}, {0: 1}, "r0"),
        ({"waiting": {0: [2]}}, {0: 1}, "r1"),
        ({"waiting": {0: [2]}}, {0: 4}, "r0"),
        ({"waiting": {0: [2], 1: [9]}}, {0: 1}, "r0"),
        ({"decoding": {0: [50] * 9}}, {0: 5, 1: 5}, "r1"),  # longer steps there
        ({"decoding": {0: [50] * 9}}, {0: 5}, "r0"),  # but not as long as five blocks take
    ],
)
def test_conductor(work, cached, chosen):
    assert choice(Conductor(), view([0, 0], cached, **work)) == chosen


def test_conductor_goes_by_the_kind_of_engine_and_not_by_what_was_learnt_of_it():
    seen = view([0, 0], {0: 1})
    seen.replicas[0].steps.prefill.value = 2.0
    assert choice(Conductor(), seen) == "r0"


# -- llm-d


def report(waiting=0, usage=0.0):
    return Report(waiting=waiting, running=0, kv_usage=usage)


@pytest.mark.parametrize(
    ("cached", "reports", "chosen"),
    [
        ({1: 4}, {}, "r1"),
        ({1: 4, 2: 5}, {}, "r2"),
        ({0: 4}, {"r0": report(usage=0.7)}, "r0"),  # twice 0.4 against 0.7 of usage
        ({0: 4}, {"r0": report(usage=0.9), "r2": report(usage=0.1)}, "r1"),
        ({0: 10}, {"r0": report(1, usage=0.9)}, "r0"),  # 2 against 0.9, and 1 for the shorter queue
        ({0: 9}, {"r0": report(1, usage=0.9), "r2": report(usage=0.1)}, "r1"),
        ({0: 4, 1: 4}, {"r1": report(1)}, "r0"),
        ({}, {"r0": report(1), "r1": report(2)}, "r2"),
        ({}, {"r0": report(usage=0.1), "r1": report(usage=0.2), "r2": report(usage=0.3)}, "r0"),
    ],
)
def test_llmd_precise(cached, reports, chosen):
    seen = view([0, 0, 0], cached, draw=1)
    assert choice(LlmdPrecise(), seen, reports=reports) == chosen


def test_llmd_sees_nothing_of_what_was_just_sent():
    assert choice(LlmdPrecise(), view([9, 0], cached={0: 1})) == "r0"


@pytest.mark.parametrize(
    ("sent", "reports", "chosen"),
    [
        (8, {}, "r0"),
        (8, {"r0": report(usage=1.0)}, "r0"),  # 3 against 2
        (8, {"r0": report(1, usage=0.4)}, "r0"),  # 3 against 2.8
        (8, {"r0": report(1, usage=0.6)}, "r1"),
        (4, {"r0": report(usage=0.7)}, "r0"),  # 1.5 against 1.4
        (4, {"r0": report(usage=0.8)}, "r1"),
    ],
)
def test_llmd(sent, reports, chosen):
    policy = taught(Llmd(), [(0, prompt(*range(sent)))])
    assert choice(policy, view([0, 0]), reports=reports) == chosen


def test_llmd_looks_at_the_first_4096_tokens_and_remembers_500000_for_each_replica():
    long = prompt(*range(9))
    policy = taught(Llmd(), [(0, long)])
    assert policy.tree.size("r0") == 8
    taught(policy, [(0, prompt(*range(first, first + 8))) for first in range(100, 1100, 8)])
    assert policy.tree.size("r0") == 500_000 // BLOCK_TOKENS
    assert policy.tree.match([0]) == {}
