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
# A report says nothing of now that is so much older than another's (seconds): routers report twice a second
# (router/app.py). Clocks of two machines may differ, so none is compared with the controller's.
STALE_S = 10.0


def as_routers_decide(
    contexts: dict[DeploymentID, AutoscalingContext],
) -> tuple[dict[DeploymentID, int], dict[DeploymentID, dict[str, Any]]]:
    """For each deployment what the routers reported last; where they are silent it stays as it is."""
    reported: dict[str, int] = {}
    for context in contexts.values():
        for metric, series in context.raw_metrics.items():
            last = [told[-1] for told in series.values() if told]
            if metric.startswith(TARGET) and last:
                newest = max(each.timestamp for each in last)
                # For a moment two routers may decide, as one takes over from another: no shrinking by that.
                fresh = [each.value for each in last if each.timestamp > newest - STALE_S]
                reported[metric.removeprefix(TARGET)] = round(max(fresh))
    targets = {id: reported.get(id.name, context.target_num_replicas) for id, context in contexts.items()}
    return targets, {}
