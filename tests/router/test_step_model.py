from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.step_model import FADE_S, LEAST_MOVE, LEAST_TOKENS, Factor, StepModel, fade

COMMON = 2.0


@pytest.mark.parametrize("truth", [0.05, 0.5, 1.0, 1.4, 23.0])
def test_a_factor_finds_the_truth_whatever_the_prior_was(truth):
    factor = Factor()
    for _ in range(100):
        factor.observe(factor.value, truth)
    assert factor.value == pytest.approx(truth, rel=LEAST_MOVE)


@pytest.mark.parametrize("outlier", [0.001, 1000.0])
def test_outliers_hardly_move_it(outlier):
    chance, factor = Random(1), Factor()
    for _ in range(1000):
        factor.observe(factor.value, outlier if chance.random() < 0.1 else 3.0)
    assert factor.value == pytest.approx(3.0, rel=0.1)


def test_it_follows_a_replica_that_slows_down():
    factor = Factor()
    for truth in [1.0] * 200 + [2.0] * 200:
        factor.observe(factor.value, truth)
    assert factor.value == pytest.approx(2.0, rel=LEAST_MOVE)


@given(st.lists(st.tuples(st.floats(0, 1e9), st.floats(0, 1e9))))
def test_no_observation_breaks_it(pairs):
    factor = Factor()
    for predicted, observed in pairs:
        factor.observe(predicted, observed)
    assert 0 < factor.value < float("inf")


def test_prefill_costs_more_behind_more():
    steps = StepModel.of()
    assert steps.prefill_s(1000) == pytest.approx(1000 * 33e-6 + 1.3e-9 * 1000 * 500)
    assert steps.prefill_s(1000, before=9000) - steps.prefill_s(1000) == pytest.approx(1.3e-9 * 1000 * 9000)
    assert steps.prefill_s(0, before=9000) == 0


def test_a_long_line_decodes_between_its_steps():
    """Three full steps of prefill, and the one that gives the token."""
    steps = StepModel.of()
    line = 3 * steps.prefill_s(8192)
    assert steps.first_token_s(line, 0.02) == pytest.approx(line + 4 * 0.02)
    assert steps.first_token_s(0.0, 0.02) == 0.02


def test_first_tokens_teach_prefill_where_that_is_most_of_them():
    steps = StepModel.of()
    steps.observe_first_token(predicted=1.0, prefill=0.4, observed=9.0)
    assert steps.prefill.observations == 0
    steps.observe_first_token(predicted=1.0, prefill=0.9, observed=COMMON)
    assert steps.prefill.value == pytest.approx(COMMON)
    assert steps.decode.value == 1


@pytest.mark.parametrize(("loading", "value"), [(0.4, 1.0), (0.6, COMMON)])
def test_first_tokens_teach_loading_where_that_is_most_of_them(loading, value):
    steps = StepModel.of()
    steps.observe_first_token(predicted=1.0, prefill=0.1, observed=COMMON, loading=loading)
    assert steps.loading.value == pytest.approx(value)
    assert steps.loading_s(1000) == pytest.approx(value * 1000 * 2.6e-6)
    assert steps.prefill.observations == 0


def test_streams_teach_decoding_unless_they_are_short():
    steps = StepModel.of()
    steps.observe_stream(LEAST_TOKENS - 1, step=0.01, decoding_s=9.0)
    assert steps.decode.observations == 0
    steps.observe_stream(100, step=0.01, decoding_s=100 * 0.01 * COMMON)
    assert steps.decode.value == pytest.approx(COMMON)
    assert steps.prefill.value == 1
    assert steps.step_s(10, 1000) == pytest.approx(COMMON * (6e-3 + 10 * 45e-6 + 1000 * 5.6e-8))


def models(*factors: tuple[float, int]) -> list[StepModel]:
    """With such factors for decoding, learnt from so many observations."""
    return [StepModel(StepModel.of().prior, decode=Factor(own, count, value=own)) for own, count in factors]


def test_what_one_seems_to_be_fades_into_what_its_kin_are():
    kin = models((1.0, 50), (1.0, 50), (3.0, 50))
    fade(kin, FADE_S)
    assert [steps.decode.value for steps in kin[:2]] == [1.0, 1.0]
    assert kin[2].decode.value == pytest.approx(3.0 ** (1 / 2.71828), rel=1e-4)
    for _ in range(20):
        fade(kin, FADE_S)
    assert kin[2].decode.value == pytest.approx(1.0)


def test_small_differences_are_chance():
    kin = models((1.0, 50), (1.1, 50), (1.2, 50), (2.0, 50))
    fade(kin, 0.001)
    assert [round(steps.decode.value, 3) for steps in kin] == [1.1, 1.1, 1.1, 2.0]
    for _ in range(50):  # it goes on to be observed as it is, and is found out when that is another
        kin[0].decode.observe(kin[0].decode.value, 0.5)
    assert kin[0].decode.value == pytest.approx(0.5, rel=0.05)


def test_a_new_one_is_taken_for_what_its_kin_are():
    kin = models((5.0, 50), (1.0, 0))
    fade(kin, 0.001)
    assert kin[1].decode.value == pytest.approx(5.0)
    assert kin[0].decode.value == 5.0


def test_one_alone_and_ones_that_saw_nothing_stay_as_they_are():
    alone, unseen = models((5.0, 50)), models((1.0, 0), (1.0, 0))
    for kin in (alone, unseen):
        before = [steps.decode.value for steps in kin]
        fade(kin, 10 * FADE_S)
        assert [steps.decode.value for steps in kin] == before


def test_one_that_is_slower_and_observed_stays_slower():
    kin = models((1.0, 50), (1.0, 50), (2.0, 50))
    for _ in range(300):
        fade(kin, 1.0)
        kin[2].decode.observe(kin[2].decode.value, 2.0)
    assert kin[2].decode.value == pytest.approx(2.0, rel=0.05)
