"""What Serve makes of what routers report, with contexts as Serve gives them."""

from __future__ import annotations

import warnings

import pytest

from router.autoscaling import STALE_S, TARGET, as_routers_decide

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own, as it is imported
    from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
    from ray.serve.config import AutoscalingContext

NOW = 1000.0


def context(name: str, target: int, **metrics: dict[str, list[tuple[float, float]]]) -> AutoscalingContext:
    """As Serve gives it to a policy; of each metric what each replica reported."""
    id = DeploymentID(name, "herd")
    series = {
        metric: {
            ReplicaID(replica, id): [TimeStampedValue(at, value) for at, value in values]
            for replica, values in told.items()
        }
        for metric, told in metrics.items()
    }
    unknown = dict.fromkeys(("last_scale_up_time", "last_scale_down_time", "config", "aggregated_metrics"))
    return AutoscalingContext(
        id, name, "herd", 0, target, [], 0, 0, raw_metrics=series, current_time=NOW,
        capacity_adjusted_min_replicas=0, capacity_adjusted_max_replicas=9, policy_state={}, **unknown,
    )  # fmt: skip


FRESH, OLD = NOW - 1, NOW - STALE_S - 1


@pytest.mark.parametrize(
    ("reported", "target"),
    [
        ({"one": [(FRESH, 4.0)]}, 4),
        ({"one": [(FRESH - 1, 4.0), (FRESH, 0.0)]}, 0),
        ({"one": [(FRESH, 3.0)], "two": [(FRESH, 5.0)]}, 5),
        ({"one": [(OLD, 5.0)], "two": [(FRESH, 3.0)]}, 3),
        ({"one": [(OLD, 5.0)]}, 5),  # nobody contradicts
        ({"one": []}, 2),
        ({}, 2),
    ],
)
def test_serve_does_what_routers_reported_last_and_nothing_where_they_are_silent(reported, target):
    contexts = [
        context("Router", 1, **{f"{TARGET}Replica-m": reported}),
        context("Replica-m", 2),
        context("Replica-n", 7),
    ]
    targets, states = as_routers_decide({c.deployment_id: c for c in contexts})
    assert {id.name: number for id, number in targets.items()} == {
        "Router": 1,
        "Replica-m": target,
        "Replica-n": 7,
    }
    assert states == {}
