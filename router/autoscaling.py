"""What Serve's controller asks how many replicas there are to be: it is told what the routers decided.

    autoscaling_policy: {policy_function: router.autoscaling:as_routers_decide}

An application-level policy, since one of a deployment sees its own deployment only, and it is the routers
that see what is asked. It runs in the controller's loop, several times a second, so it looks and no more.
Serve pickles this module by value: it imports nothing of ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve._private.common import DeploymentID
    from ray.serve.config import AutoscalingContext

# What routers report for a deployment of replicas, by its name (router/deployment.py).
TARGET = "herd_target:"
# A report that is older says nothing of now (seconds): routers report every half second (router/app.py).
STALE_S = 10.0


def as_routers_decide(
    contexts: dict[DeploymentID, AutoscalingContext],
) -> tuple[dict[DeploymentID, int], dict[DeploymentID, dict[str, Any]]]:
    """For each deployment what the routers reported last; where they are silent it stays as it is."""
    reported: dict[str, int] = {}
    for context in contexts.values():
        for metric, series in context.raw_metrics.items():
            fresh = [told[-1] for told in series.values() if told]
            fresh = [last for last in fresh if last.timestamp > context.current_time - STALE_S]
            if metric.startswith(TARGET) and fresh:
                # For a moment two routers may decide, as one takes over from another: no shrinking by that.
                reported[metric.removeprefix(TARGET)] = round(max(last.value for last in fresh))
    targets = {id: reported.get(id.name, context.target_num_replicas) for id, context in contexts.items()}
    return targets, {}
