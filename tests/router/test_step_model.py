from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.step_model import LEAST_MOVE, LEAST_TOKENS, Factor, StepModel

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


def test_streams_teach_decoding_unless_they_are_short():
    steps = StepModel.of()
    steps.observe_stream(LEAST_TOKENS - 1, step=0.01, decoding_s=9.0)
    assert steps.decode.observations == 0
    steps.observe_stream(100, step=0.01, decoding_s=100 * 0.01 * COMMON)
    assert steps.decode.value == pytest.approx(COMMON)
    assert steps.prefill.value == 1
    assert steps.step_s(10, 1000) == pytest.approx(COMMON * (6e-3 + 10 * 45e-6 + 1000 * 5.6e-8))
