"""What the twin takes for Ray Serve's scaler does what Ray Serve's own functions do."""

from __future__ import annotations

import warnings
from math import ceil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.elastic import Ray
from router.core.autoscale import Ability, Supply
from router.core.demand import Work
from router.core.step_model import StepModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Pydantic, about Ray
    from ray.serve.autoscaling_policy import _apply_delay_logic, _core_replica_queue_length_policy
    from ray.serve.config import AutoscalingConfig, AutoscalingContext

ABILITY = Ability(StepModel.of("simulated"))


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 60)), max_size=20), st.integers(1, 9))
def test_delays(course: list[tuple[int, int]], first: int) -> None:
    """So many replicas are desired for so many seconds."""
    config = AutoscalingConfig(min_replicas=1, max_replicas=9, upscale_delay_s=20.0, downscale_delay_s=50.0)
    own = Ray(1.0, 1, 9, down_s=50.0, up_s=20.0)
    state: dict[str, Any] = {}
    now, ours, rays = 0.0, first, first
    for desired, seconds in course:
        for _ in range(seconds):
            now += 1.0
            ours = own.delayed(now, desired, ours)
            rays, state = _apply_delay_logic(max(1, min(9, desired)), rays, config, state, _now=now)
            assert ours == rays


@pytest.mark.parametrize("requests", [1, 9, 10, 11, 14, 480])
def test_what_is_wished_for(requests: int) -> None:
    config = AutoscalingConfig(min_replicas=1, max_replicas=99, target_ongoing_requests=5)
    told: dict[str, Any] = dict.fromkeys(AutoscalingContext.__init__.__annotations__.keys() - {"return"})
    told |= {"current_num_replicas": 3, "total_num_requests": float(requests), "config": config}
    wish = _core_replica_queue_length_policy(AutoscalingContext(**told))[0]
    ray = Ray(5.0, 1, 99, down_s=0.0, up_s=0.0, look_back_s=1.0)
    work = Work(waiting=requests // 2, in_flight=requests - requests // 2)
    assert ray(1.0, {"router": work}, Supply(3, 3, ABILITY, 60.0)) == ceil(wish)
