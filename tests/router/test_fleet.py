"""What the fleet remembers of requests under way, and what it forecasts from that."""

from array import array
from math import exp

import pytest

from router.core.blocks import TEXT_BLOCK_BYTES, TEXT_BLOCK_TOKENS, Prompt
from router.core.fleet import RECENT_S, Cached, Fleet, Load, Replica, Trust
from router.core.kv_events import BlockStored
from router.core.step_model import TELLING

BLOCK = 16


@pytest.fixture
def fleet():
    fleet = Fleet()
    for id in ("r0", "r1"):
        fleet.joined(Replica(id, f"http://{id}", ("m",), block_size=BLOCK), now=0.0)
        fleet.trusted(id, Trust.EXACT, "proven", BLOCK)
    return fleet


def ids(count):
    return array("I", range(count)).tobytes()


def prompt_of(tokens):
    return Prompt(tokens, ids(tokens))


def stored(blocks):
    return BlockStored(list(range(1, blocks + 1)), list(range(blocks * BLOCK)), BLOCK)


def cached(fleet, prompt):
    return fleet.view("m", now=0.0, prompt=prompt).cached


def test_what_events_told_is_seen_in_the_view(fleet):
    fleet.apply("r1", stored(blocks=3))
    assert cached(fleet, prompt_of(100)) == {"r1": Cached(48, 0, 3)}


def test_the_last_token_is_always_computed(fleet):
    fleet.apply("r1", stored(blocks=3))
    assert cached(fleet, prompt_of(48)) == {"r1": Cached(32, 0, 2)}


def test_what_was_just_placed_counts_at_once_until_it_ends(fleet):
    prompt = prompt_of(100)
    flight = fleet.started("r0", 0.0, prompt)
    assert cached(fleet, prompt) == {"r0": Cached(96, 0, 6)}
    fleet.finished(flight, now=1.0)
    assert cached(fleet, prompt) == {}


def test_what_events_confirmed_outlives_the_request(fleet):
    prompt = prompt_of(100)
    flight = fleet.started("r0", 0.0, prompt)
    fleet.apply("r0", stored(blocks=2))
    fleet.finished(flight, now=1.0)
    assert cached(fleet, prompt) == {"r0": Cached(32, 0, 2)}


def test_nothing_is_known_of_a_replica_that_is_not_trusted(fleet):
    fleet.apply("r0", stored(blocks=3))
    fleet.trusted("r0", Trust.LOAD, "its cache is off", 0)
    assert cached(fleet, prompt_of(100)) == {}


def test_without_a_tokenizer_text_is_matched(fleet):
    fleet.trusted("r0", Trust.APPROXIMATE, "no tokenizer", 0)
    said = Prompt(300, text=b"x" * 5 * TEXT_BLOCK_BYTES)
    fleet.started("r0", 0.0, said)
    assert cached(fleet, Prompt(400, text=said.text + b"more")) == {"r0": Cached(5 * TEXT_BLOCK_TOKENS, 0, 5)}


def test_prefill_is_promised_then_done_then_decoded(fleet):
    standing = fleet.get("r0")
    first = fleet.started("r0", 0.0, prompt_of(8000))
    second = fleet.started("r0", 0.0, prompt_of(8000), Cached(4000, 0, 250))
    own = [flight.forecast.prefill_s for flight in (first, second)]
    assert own[0] > own[1] > 0
    assert second.forecast.backlog_s == pytest.approx(own[0])
    assert standing.backlog_s(0.1) == pytest.approx(sum(own) - 0.1)
    assert standing.backlog_s(100.0) == pytest.approx(own[1])  # the head may be late; no more than it is done
    fleet.first_token(first, now=0.3)
    assert standing.backlog_s(0.3) == pytest.approx(own[1])
    assert (standing.decoding, standing.context) == (1, 8000)
    fleet.finished(first, now=9.0)
    fleet.finished(second, now=9.0)
    assert (standing.decoding, standing.context, standing.backlog_s(9.0)) == (0, 0, 0.0)


def test_the_load_of_other_routers_counts(fleet):
    standing = fleet.get("r0")
    alone = standing.forecast(1000, Cached(), now=0.0)
    fleet.elsewhere("r0", Load(in_flight=20, prefill_s=0.5, decoding=19, context=50_000))
    beside = standing.forecast(1000, Cached(), now=0.0)
    assert beside.backlog_s == 0.5
    assert beside.step_s > alone.step_s
    assert beside.ttft_s > alone.ttft_s + 0.5
    assert standing.requests == 20


def test_what_other_routers_are_told_is_what_this_one_has_there_now(fleet):
    assert fleet.loads(0.0) == {}
    first = fleet.started("r0", 0.0, prompt_of(8000))
    second = fleet.started("r0", 0.0, prompt_of(8000))
    own = [flight.forecast.prefill_s for flight in (first, second)]
    fleet.elsewhere("r0", Load(5, 5.0, 5, 5))
    recent = pytest.approx(sum(own), rel=0.02)
    assert fleet.loads(0.1) == {"r0": Load(2, pytest.approx(sum(own) - 0.1), 0, 0, recent)}
    fleet.first_token(first, now=0.3)
    assert fleet.loads(0.3) == {"r0": Load(2, pytest.approx(own[1]), 1, 8000, recent)}
    fleet.finished(first, now=9.0)
    fleet.finished(second, now=9.0)
    assert fleet.loads(9.0) == {"r0": Load(recent_s=pytest.approx(sum(own) * exp(-9 / RECENT_S)))}
    assert fleet.loads(90.0) == {}


def test_a_slower_tier_costs_loading_not_computing(fleet):
    """And nobody but the request waits for it."""
    standing = fleet.get("r0")
    cold, loaded, warm = (
        standing.forecast(10_000, cached, 0.0)
        for cached in (Cached(), Cached(0, 8000, 500), Cached(8000, 0, 500))
    )
    assert warm.prefill_s == loaded.prefill_s < cold.prefill_s
    assert (warm.loading_s, loaded.loading_s, cold.loading_s) == (0, standing.steps.loading_s(8000), 0)
    assert warm.ttft_s < loaded.ttft_s < cold.ttft_s
    fleet.started("r0", 0.0, prompt_of(10_000), Cached(0, 8000, 500))
    assert standing.backlog_s(0.0) == pytest.approx(loaded.prefill_s)


def test_what_is_being_loaded_is_promised_as_at_hand(fleet):
    prompt = prompt_of(100)
    keys = prompt.keys(16)
    names = list(range(1, 7))
    for tier, blocks in (("CPU", 6), ("GPU", 2)):
        tokens = list(range(16 * blocks))
        fleet.apply("r0", BlockStored(names[:blocks], tokens, 16, medium=tier))
    had = cached(fleet, prompt)["r0"]
    assert had == Cached(32, 64, 6)
    flight = fleet.started("r0", 0.0, prompt, had)
    assert flight.expected == keys[2:]
    assert flight.confirmed
    assert cached(fleet, prompt)["r0"] == Cached(96, 0, 6)
    fleet.finished(flight, 1.0)
    assert cached(fleet, prompt)["r0"] == had


def test_the_step_model_learns_from_what_came_true(fleet):
    flight = fleet.started("r0", 0.0, prompt_of(8000))
    fleet.first_token(flight, now=2 * flight.forecast.ttft_s)
    steps = fleet.get("r0").steps
    assert steps.prefill.value == pytest.approx(2.0)
    step = fleet.get("r0").step_s()
    fleet.finished(flight, now=2 * flight.forecast.ttft_s + 3 * step * 100, output_tokens=101)
    assert steps.decode.value == pytest.approx(3.0)
    assert fleet.get("r1").steps.prefill.value == 1


def test_what_was_prefilled_for_others_is_no_fault_of_decoding(fleet):
    first = fleet.started("r0", 0.0, prompt_of(16))
    fleet.first_token(first, now=0.01)
    step = fleet.get("r0").step_s()
    other = fleet.started("r0", 0.01, prompt_of(8000))
    fleet.first_token(other, now=0.01 + other.forecast.ttft_s)
    fleet.finished(other, now=1.0)
    prefilled = fleet.get("r0").prefilled_s - first.prefilled_s
    fleet.finished(first, now=0.01 + 100 * step + prefilled, output_tokens=101)
    assert fleet.get("r0").steps.decode.value == pytest.approx(1.0)


def test_nor_what_other_routers_had_prefilled_there(fleet):
    """Else each router would think replicas slow that the others use, and keep away from their caches."""
    flight = fleet.started("r0", 0.0, prompt_of(16))
    fleet.first_token(flight, now=0.01)
    step = fleet.get("r0").step_s()
    fleet.elsewhere("r0", Load(recent_s=RECENT_S / 2))  # half of its time
    fleet.finished(flight, now=0.01 + 2 * 100 * step, output_tokens=101)
    assert fleet.get("r0").steps.decode.value == pytest.approx(1.0)


def test_a_router_with_a_share_knows_and_offers_only_that(fleet):
    for replica in ("r0", "r1"):
        fleet.apply(replica, stored(blocks=3))
    fleet.divided(frozenset({"r1"}))
    fleet.apply("r0", stored(blocks=3))
    assert cached(fleet, prompt_of(100)) == {"r1": Cached(48, 0, 3)}
    assert [s.id for s in fleet.view("m").replicas] == ["r1"]
    assert (fleet.knows("r0"), fleet.knows("r1")) == (False, True)
    assert (fleet.get("r0").trust, fleet.get("r1").trust) == (Trust.LOAD, Trust.EXACT)


def test_a_share_of_which_nothing_is_ready_keeps_no_request_waiting(fleet):
    fleet.divided(frozenset({"r1"}))
    fleet.failed("r1", now=1.0)
    assert [s.id for s in fleet.view("m").replicas] == ["r0"]
    fleet.recovered("r1", now=2.0)
    assert [s.id for s in fleet.view("m").replicas] == ["r1"]
    fleet.divided(frozenset({"elsewhere"}))
    assert [s.id for s in fleet.view("m").replicas] == ["r0", "r1"]


@pytest.mark.parametrize(
    ("own", "elsewhere", "offered"),
    [
        (0, 0, ["r1"]),
        (3, 0, ["r1"]),
        (4, 0, ["r0", "r1"]),
        (15, 4, ["r1"]),
        (16, 4, ["r0", "r1"]),
    ],
)
def test_a_share_that_has_far_more_to_do_than_the_fleet_is_left(fleet, own, elsewhere, offered):
    fleet.divided(frozenset({"r1"}))
    fleet.elsewhere("r0", Load(elsewhere))
    for _ in range(own):
        fleet.started("r1", now=0.0)
    assert [s.id for s in fleet.view("m").replicas] == offered


def test_a_replica_that_prefilled_much_lately_is_busy(fleet):
    standing = fleet.get("r0")
    assert standing.busy(0.0) == 0
    for n in range(30):
        fleet.first_token(fleet.started("r0", float(n), prompt_of(8000)), now=n + 0.5)
    assert 0.1 < standing.busy(30.0) < 0.4
    assert standing.busy(300.0) < 0.01
    quiet, busy = (fleet.get(id).forecast(100, Cached(), 30.0) for id in ("r1", "r0"))
    assert busy.pace_s > busy.step_s
    assert quiet.pace_s == quiet.step_s


def test_who_says_nothing_before_the_end_counts_as_prefilled_in_time(fleet):
    """Nothing is learnt of it: when its first token came is not known."""
    standing = fleet.get("r0")
    flight = fleet.started("r0", 0.0, prompt_of(8000), silent=True)
    fleet.view("m", now=flight.forecast.ttft_s / 2)
    assert standing.decoding == 0
    fleet.view("m", now=flight.forecast.ttft_s)
    assert (standing.decoding, standing.backlog_s(1.0)) == (1, 0.0)
    fleet.first_token(flight, now=9.0)
    fleet.finished(flight, now=9.0, output_tokens=100)
    assert (standing.in_flight, standing.decoding, standing.awaiting_first_token) == (0, 0, 0)
    assert standing.steps.prefill.observations == standing.steps.decode.observations == 0


def test_a_replica_that_looked_slow_is_tried_again(fleet):
    fleet.joined(Replica("other", "http://other", ("n",)), now=0.0)
    factors = {id: fleet.get(id).steps.decode for id in ("r0", "r1", "other")}
    for id, truth in {"r0": 2.0, "r1": 1.1, "other": 1.7}.items():
        for _ in range(TELLING):
            factors[id].observe(factors[id].value, truth)
    fleet.view("m", now=2.0)
    assert factors["r0"].value == pytest.approx(2.0, rel=0.1)
    fleet.view("m", now=9000.0)
    assert factors["r0"].value == factors["r1"].value == pytest.approx(1.1, rel=0.1)
    assert factors["other"].value == pytest.approx(1.7, rel=0.1)
