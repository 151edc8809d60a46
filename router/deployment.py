"""The router as a Serve deployment: Serve starts, checks and ends it; its traffic never touches Serve."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import msgspec
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from router.autoscaling import TARGET
from router.config import RouterConfig
from router.front import SETTLE_S, FrontDoor
from router.roster import PEERS, ROSTER
from router.watchdog import watch

# Streams of a leaving router end by themselves within this, else they are cut. As long as a long answer.
DRAIN_S = 600.0
# What Serve calls replicas that serve or will.
COMING_OR_HERE = ("STARTING", "UPDATING", "RECOVERING", "RUNNING")


class Router:
    """One router process: a FrontDoor on the loop that Serve gives to user code (uvloop).

    `models`: the deployment of each model's replicas, whose handles are `pools`.
    """

    async def __init__(
        self, config: dict[str, Any], models: dict[str, str], *pools: DeploymentHandle[Any]
    ) -> None:
        self._config = RouterConfig.model_validate(config)
        self._models = models
        # The node's address: the loopback one where the whole cluster stays on it.
        node = ray.util.get_node_ip_address()
        self._front = FrontDoor(self._config, promised=tuple(models), fleet=_fleet(), peer_host=node)
        self._watchdog = asyncio.create_task(watch(self._front.metrics.loop_lag))
        await self._front.start(await self._asked_for() if self._config.scaling else {})
        ROSTER.follow(self._front.membership)
        PEERS.follow(self._front.meet)
        # A handle hears of its replicas once it is in use; `options` is the public way to put it to use.
        self._handles = [handle.options() for handle in (*pools, _own_handle())]
        await ROSTER.heard(len(pools), SETTLE_S)
        await self._front.open()
        gc.freeze()  # else a full collection, now and then, holds the loop for tens of milliseconds

    async def _asked_for(self) -> dict[str, int]:
        """How many replicas of each model Serve has or starts: what was decided before this process came."""
        try:
            application = (await asyncio.to_thread(serve.status)).applications[_application()]
        except (RayError, KeyError):
            return {}
        deployed = application.deployments
        return {
            model: sum(deployed[name].replica_states.get(state, 0) for state in COMING_OR_HERE)
            for model, name in self._models.items()
            if name in deployed
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """How many replicas there are to be, for Serve's controller (router/autoscaling.py)."""
        targets = self._front.targets
        return {TARGET + self._models[model]: float(target) for model, target in targets.items()}

    def record_replica_metadata(self) -> dict[str, Any]:
        """Where the other routers reach this one, as Serve tells them when it is ready."""
        return dict(msgspec.to_builtins(self._front.contact))

    async def check_health(self) -> None:
        """On the router's own loop, so that one that hangs fails too; raises when its port is closed."""
        _, writer = await asyncio.open_connection(self._config.admin_host, self._front.admin_port)
        writer.close()

    async def __del__(self) -> None:
        """Serve awaits this before it ends the process: others take over, running streams finish."""
        await self._front.stop(DRAIN_S, _successor)
        ROSTER.unfollow()
        PEERS.unfollow()
        self._watchdog.cancel()


def _application() -> str:
    return serve.get_replica_context().app_name


def _own_handle() -> DeploymentHandle[Any]:
    """Through which this router hears of the others."""
    return serve.get_deployment_handle(serve.get_replica_context().deployment)


def _fleet() -> str:
    """Whose processes share a port: those of one deployment on one Ray cluster."""
    context = serve.get_replica_context()
    cluster = ray.get_runtime_context().gcs_address
    return f"{context.app_name} on Ray at {cluster}"


async def _successor() -> bool:
    """Whether Serve is to start a router in this one's place: the deployment is not yet what it should be.

    On a rolling update Serve ends the old process before the new one is there. A deployment that is whole
    already has its other routers elsewhere: on another port, or another machine.
    """
    context = serve.get_replica_context()
    try:
        applications = (await asyncio.to_thread(serve.status)).applications
    except RayError:
        return False  # Serve itself is going
    application = applications.get(context.app_name)
    if application is None or application.status is ApplicationStatus.DELETING:
        return False
    deployment = application.deployments.get(context.deployment)
    return deployment is not None and deployment.status != "HEALTHY"
