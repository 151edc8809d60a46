"""The twin: the router's code and the engine's, in virtual time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random
from statistics import mean

import pytest

from loadtests.outcomes import Outcome, summarize
from loadtests.trace import BLOCK_TOKENS, Arrival
from loadtests.twin import Lined, PolicyFactory, Run, Setting, core_policy, simulate
from loadtests.virtual_engine import Report
from router.core.blocks import Prompt
from router.core.fleet import Load, View
from router.core.placement import POLICIES, Placement, kv_aware, least_requests, random, round_robin
from router.line import AdmissionConfig
from router.slo import Slo
from workers.simulated.core import EngineConfig
from workers.simulated.step_time import PRESETS, StepWork

TIME = PRESETS["8b-h100"].step_time
ENGINE = EngineConfig(TIME, num_gpu_blocks=101, block_size=BLOCK_TOKENS)
SETTING = Setting(ENGINE, replicas=3)
PATIENT = AdmissionConfig(max_wait_s=1e6, max_late_s=1e6)


def conversations(count: int, gap: float, seed: int = 1) -> list[Arrival]:
    """Requests of which many go on from an earlier one."""
    chance, arrivals, fresh = Random(seed), [], 10
    for number in range(count):
        before = chance.choice(arrivals).hash_ids[:9] if arrivals and chance.random() < 0.6 else [0]
        new = chance.randint(1, 9)
        ids = [*before, *range(fresh, fresh + new)]
        fresh += new
        length = len(ids) * BLOCK_TOKENS - chance.randrange(BLOCK_TOKENS)
        arrivals.append(Arrival(number * gap * (0.5 + chance.random()), length, chance.randint(1, 900), ids))
    return sorted(arrivals, key=lambda arrival: arrival.at)


@pytest.mark.parametrize("policy", [kv_aware, random])
def test_the_same_seed_gives_the_same_run_and_another_seed_another(policy) -> None:
    setting = replace(SETTING, routers=2)
    trace = conversations(60, 0.2)
    assert simulate(trace, setting, core_policy(policy), 7) == simulate(
        trace, setting, core_policy(policy), 7
    )
    assert simulate(trace, setting, core_policy(policy), 7) != simulate(
        trace, setting, core_policy(policy), 8
    )


def test_one_request_alone_takes_what_its_steps_take() -> None:
    (outcome,) = simulate([Arrival(2.0, 3000, 5, list(range(6)))], SETTING, core_policy(round_robin)).outcomes
    assert outcome.ttft == pytest.approx(TIME.seconds(StepWork(3000, 3000 * 1500)))
    assert outcome.ttft == pytest.approx(outcome.unloaded)
    assert outcome.tpot == pytest.approx(TIME.decode_seconds(1, 3002.5))
    assert (outcome.predicted, outcome.reported, outcome.crowding) == (0, 0, 3.0)


def test_a_long_prompt_alone_takes_several_steps() -> None:
    trace = [Arrival(0.0, 20_000, 1, list(range(40)))]
    (outcome,) = simulate(trace, SETTING, core_policy(round_robin)).outcomes
    assert outcome.ttft == pytest.approx(outcome.unloaded)


@pytest.mark.parametrize(("length", "cached"), [(3000, 2560), (3072, 2560), (3073, 3072)])
def test_the_second_of_two_finds_the_prompt_of_the_first(length: int, cached: int) -> None:
    ids = list(range(-(-length // BLOCK_TOKENS)))
    trace = [Arrival(at, length, 5, ids) for at in (0.0, 9.0)]
    one, other = simulate(trace, SETTING, core_policy(kv_aware)).outcomes
    assert one.replica == other.replica
    assert (other.predicted, other.reported) == (cached, cached)


def test_outputs_are_nobodys_prefix() -> None:
    trace = [Arrival(0.0, 600, 2000, [1, 2]), Arrival(90.0, 2500, 1, [1, 2, 3, 4, 5])]
    assert simulate(trace, SETTING, core_policy(kv_aware)).outcomes[1].reported == BLOCK_TOKENS


def test_routers_learn_late_what_engines_hold() -> None:
    trace = [Arrival(at, 3000, 5, list(range(6))) for at in (0.0, 9.0)]
    late = replace(SETTING, replicas=1, kv_event_delay=10.0)
    other = simulate(trace, late, core_policy(kv_aware)).outcomes[1]
    assert (other.predicted, other.reported) == (0, 2560)


@pytest.mark.parametrize("routers", [1, 3])
def test_at_leisure_every_router_foresees_every_hit(routers: int) -> None:
    """Requests come when nothing is under way, so only a lost event could make a prediction wrong."""
    setting = replace(SETTING, routers=routers)
    outcomes = simulate(conversations(200, 30.0), setting, core_policy(kv_aware)).outcomes
    assert [outcome.predicted for outcome in outcomes] == [outcome.reported for outcome in outcomes]
    # Some hits were foreseen, and some lost to eviction: the caches are too small for all.
    assert 0 < sum(outcome.reported for outcome in outcomes) < ideal(outcomes)


def test_at_leisure_what_is_on_the_cpu_is_foreseen_too() -> None:
    engine = replace(ENGINE, num_cpu_blocks=500)
    trace = conversations(200, 30.0)
    outcomes, without = (
        simulate(trace, replace(SETTING, engine=engine), core_policy(kv_aware)).outcomes
        for engine in (engine, ENGINE)
    )
    assert [outcome.predicted for outcome in outcomes] == [outcome.reported for outcome in outcomes]
    hits, less = (sum(outcome.reported for outcome in run) for run in (outcomes, without))
    assert less < hits <= ideal(outcomes)


def ideal(outcomes: list[Outcome]) -> int:
    """Tokens that one endless cache would have saved."""
    seen: set[int] = set()
    saved = 0
    for outcome in outcomes:
        ids = outcome.arrival.hash_ids[: (outcome.arrival.input_length - 1) // BLOCK_TOKENS]
        saved += BLOCK_TOKENS * next((n for n, id in enumerate(ids) if id not in seen), len(ids))
        seen.update(ids)
    return saved


def test_who_fits_no_engine_is_refused() -> None:
    trace = [Arrival(0.0, 51_000, output, list(range(100))) for output in (201, 202)]
    run = simulate(trace, SETTING, core_policy(round_robin))
    assert (len(run.outcomes), run.refused) == (1, 1)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_serves_every_request_under_overload(name: str) -> None:
    trace = conversations(80, 0.001)
    outcomes = simulate(trace, SETTING, core_policy(POLICIES[name])).outcomes
    assert [outcome.arrival for outcome in outcomes] == trace
    assert all(outcome.ttft > 0 for outcome in outcomes)
    assert all((outcome.tpot > 0) == (outcome.arrival.output_length > 1) for outcome in outcomes)


class Watcher:
    """Places in turn and keeps what it was shown."""

    def __init__(self, made: list[Watcher]) -> None:
        made.append(self)
        self.seen: list[tuple[float, list[Load], list[Report]]] = []

    def __call__(self, view: View, prompt: Prompt, reports: Mapping[str, Report]) -> Placement | None:
        elsewhere = [standing.elsewhere for standing in view.replicas]
        self.seen.append((view.now, elsewhere, [reports[standing.id] for standing in view.replicas]))
        return round_robin(view)


@pytest.mark.parametrize(("delay", "heard"), [(0.01, True), (100.0, False)])
def test_each_router_has_a_policy_of_its_own_and_hears_of_the_others(delay: float, heard: bool) -> None:
    made: list[Watcher] = []
    setting = replace(SETTING, replicas=1, routers=2, gossip_delay=delay)
    simulate([Arrival(n * 0.1, 600, 2000, [n, n]) for n in range(20)], setting, lambda: Watcher(made), seed=1)
    assert [len(watcher.seen) > 5 for watcher in made] == [True, True]
    times = [[now for now, *_ in watcher.seen] for watcher in made]
    for watcher, others in zip(made, reversed(times), strict=True):
        for now, (elsewhere,), _ in watcher.seen:
            assert elsewhere.in_flight == sum(time < now for time in others) * heard


def test_policies_read_what_engines_report() -> None:
    made: list[Watcher] = []
    setting = replace(SETTING, replicas=1)
    simulate([Arrival(n * 0.1, 600, 2000, [n, n]) for n in range(5)], setting, lambda: Watcher(made))
    assert [reports[0].running for *_, reports in made[0].seen] == [0, 1, 2, 3, 4]


def test_the_summary_leaves_out_the_first_tenth_and_counts_what_users_got() -> None:
    def outcome(number: int, ttft: float, tpot: float = 0.01) -> Outcome:
        arrival = Arrival(number, 1000 + number, 11, [1, 2])
        return Outcome(arrival, 0.1, "a", 512, 1.5, ttft=ttft, tpot=tpot, reported=512 if number % 2 else 0)

    early = [outcome(n, 99.0) for n in range(10)]
    good = [outcome(n, 1.9) for n in range(10, 80)]
    slow = [outcome(n, 1.0, tpot=0.06) for n in range(80, 91)]
    late = [outcome(n, 2.1) for n in range(91, 95)]
    longest = [outcome(n, 1.0) for n in range(95, 100)]
    summary = summarize([*early, *good, *slow, *late, *longest], Slo(), refused=3)
    assert (summary.requests, summary.refused, summary.balance) == (90, 3, 1.5)
    assert summary.attainment == pytest.approx(75 / 90)
    assert summary.attainment_longest == pytest.approx(5 / 9)
    assert (summary.ttft_p50, summary.tpot_p50) == (1.9, 0.01)
    assert summary.predicted_right == 0.5
    assert not summary.strict
    assert replace(summary, attainment=0.9, attainment_longest=0.85).strict


def test_long_prompts_are_given_more_time() -> None:
    outcome = Outcome(Arrival(0.0, 9, 9, [1]), 0.5, "a", 0, 1.0, ttft=2.4)
    assert outcome.attained(Slo())
    assert not replace(outcome, ttft=2.6).attained(Slo())
    assert replace(outcome, ttft=2.6).attained(Slo(ttft_s=4.0))


def test_other_block_sizes_than_the_traces_are_refused() -> None:
    with pytest.raises(ValueError, match="512 tokens, not 16"):
        Setting(EngineConfig(TIME, 101, 16))


@pytest.mark.parametrize("routers", [1, 3])
def test_who_waits_in_line_is_served_all_the_same(routers: int) -> None:
    trace = conversations(80, 0.01)
    setting = replace(SETTING, routers=routers, slo=Slo())
    outcomes = simulate(trace, setting, Lined(core_policy(kv_aware), PATIENT)).outcomes
    assert [outcome.arrival for outcome in outcomes] == trace
    assert all(outcome.ttft > 0 and outcome.replica for outcome in outcomes)


def test_a_line_is_as_determined_as_all_else() -> None:
    trace, policy = conversations(80, 0.05), Lined(core_policy(kv_aware))
    setting = replace(SETTING, routers=2, slo=Slo())
    assert simulate(trace, setting, policy, 7) == simulate(trace, setting, policy, 7)


def test_overload_is_borne() -> None:
    """Twice what the fleet can do: with the line most of that is done, without it hardly anything in time."""
    chance, slo = Random(1), Slo()
    setting = Setting(EngineConfig(TIME, num_gpu_blocks=782, block_size=BLOCK_TOKENS), replicas=3, slo=slo)
    plenty = conversations(600, 0.1)
    twice = [replace(a, at=a.at / 2, priority=-1 if chance.random() < 0.1 else 0) for a in plenty]

    def attained(trace: list[Arrival], policy: PolicyFactory) -> list[tuple[bool, bool]]:
        """Of each request, whether it was premium and within its SLO."""
        outcomes = simulate(trace, setting, policy).outcomes
        return [(o.arrival.priority < 0, o.attained(slo)) for o in outcomes]

    lined = Lined(core_policy(kv_aware))
    at_capacity, held, unheld = attained(plenty, lined), attained(twice, lined), attained(twice, lined.make)
    goodput = [sum(good for _, good in of) for of in (at_capacity, held, unheld)]
    assert goodput[0] > 0.95 * len(plenty)
    assert 2 * goodput[1] > 0.75 * goodput[0], "in half of the time"
    assert goodput[1] > 4 * goodput[2]
    premium = [good for is_premium, good in held if is_premium]
    assert mean(premium) > 1.1 * goodput[1] / len(twice)


def test_kv_awareness_pays_on_conversations() -> None:
    def hit(run: Run) -> float:
        return summarize(run.outcomes, Slo()).hit

    trace = conversations(300, 0.4)
    aware, blind = (simulate(trace, SETTING, core_policy(policy)) for policy in (kv_aware, least_requests))
    assert hit(aware) > 1.5 * hit(blind)
