"""A fleet as a Ray Serve application: `import_path: router.app:build`, with a FleetConfig as its `args`."""

from __future__ import annotations

import warnings
from math import prod
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from router import deployment
from router.config import FleetConfig, ModelConfig, parse
from router.errors import ConfigError
from router.scaling import Replicas
from workers import replica
from workers.engine import EngineSpec

# Names that Ray keeps for itself; everything else in `resources` is a custom resource.
RAY_RESOURCES = ("num_cpus", "num_gpus", "memory")

# The flags of vLLM that say over how many GPUs one engine spreads.
PARALLEL = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")

# What Serve is told of both deployments. Seen from the outside: a dead process is found within the period;
# a busy machine answers late, so the timeout is not below Serve's own default.
HEALTH_CHECKS = {"health_check_period_s": 1.0, "health_check_timeout_s": 30.0}
# Serve sleeps this long before it first looks whether a leaving replica is idle. Ours always are (no request
# passes through Serve), and drain in their own destructor.
LEAVE = {"graceful_shutdown_wait_loop_s": 0.05}
# A wrong setting fails every time, a lost race for a port once. A model that begins with no replica may be
# asked for when there is no room for one: there Serve would try no more until the next deployment. It takes
# the less of this and three for each replica (RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT, see router/cluster.py).
STARTS = {"max_constructor_retry_count": 2}
STARTS_AGAIN = {"max_constructor_retry_count": 1_000_000}
# Serve does at once what routers decide: patience and proportion are theirs (router/core/autoscale.py). What
# they report is read and sent twice a second.
FOLLOWS = {
    "upscale_delay_s": 0.0,
    "downscale_delay_s": 0.0,
    "upscaling_factor": 1.0,
    "downscaling_factor": 1.0,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2.5,
}


def build(args: dict[str, Any]) -> Application:
    """The router in front of one pool of replicas per model."""
    fleet = parse(args)
    _refuse_equal_names(fleet.models)
    return _router(fleet)


def _pool(model: ModelConfig) -> Application:
    spec = model.model_dump(include=set(EngineSpec.model_fields))
    return serve.deployment(
        replica.Replica,
        name=deployment_name(model),
        **_number(model.replicas),
        ray_actor_options=actor_options(model),
        graceful_shutdown_timeout_s=model.drain_s + 30,
        request_router_config=RequestRouterConfig(request_router_class="router.membership:Directory"),
        **HEALTH_CHECKS,
        **LEAVE,
        **(STARTS if model.replicas.first else STARTS_AGAIN),
    ).bind(spec, model.drain_s)


def _number(replicas: Replicas) -> dict[str, Any]:
    """How many replicas a deployment has, as Serve is told."""
    if replicas.fixed:
        return {"num_replicas": replicas.max}
    return _scaled(replicas.min, replicas.first, replicas.max)


def _scaled(least: int, first: int, most: int) -> dict[str, Any]:
    with warnings.catch_warnings():
        # The environment variable that is to replace `metrics_interval_s` is not read for it in Ray 2.60.
        warnings.simplefilter("ignore", DeprecationWarning)
        config = AutoscalingConfig(min_replicas=least, initial_replicas=first, max_replicas=most, **FOLLOWS)
    return {"autoscaling_config": config}


def _router(fleet: FleetConfig) -> Application:
    pools = [_pool(model) for model in fleet.models]
    models = {model.name: deployment_name(model) for model in fleet.models}
    config = fleet.router.model_copy(update=fleet.by_model)
    # Serve takes reports of those only that are scaled, if from n to n.
    same = (config.replicas,) * 3
    number = _scaled(*same) if config.scaling else {"num_replicas": config.replicas}
    return serve.deployment(
        deployment.Router,
        name="Router",
        **number,
        ray_actor_options={"num_cpus": 0},
        request_router_config=RequestRouterConfig(request_router_class="router.membership:Peers"),
        graceful_shutdown_timeout_s=deployment.DRAIN_S + 30,
        **HEALTH_CHECKS,
        **LEAVE,
        **STARTS,
    ).bind(config.model_dump(), models, *pools)


def deployment_name(model: ModelConfig) -> str:
    """A model's Serve deployment; never that of the router."""
    return f"Replica-{replica.slug(model.name)}"


def actor_options(model: ModelConfig) -> dict[str, Any]:
    """What Ray reserves for one replica.

    vLLM on a cluster with GPUs takes as many as its parallel sizes multiply to. Otherwise nothing: engines
    share a CPU as processes do, and a core for each would keep a small machine from starting two.
    """
    reserved = {"num_cpus": 0.0, **_gpus(model), **model.resources}
    options: dict[str, Any] = {k: v for k, v in reserved.items() if k in RAY_RESOURCES}
    return options | {"resources": {k: v for k, v in reserved.items() if k not in RAY_RESOURCES}}


def _gpus(model: ModelConfig) -> dict[str, float]:
    if model.engine != "vllm" or not ray.cluster_resources().get("GPU"):
        return {}
    return {"num_gpus": float(prod(int(str(model.engine_args.get(flag, 1))) for flag in PARALLEL))}


def _refuse_equal_names(models: list[ModelConfig]) -> None:
    names: dict[str, str] = {}
    for model in models:
        other = names.setdefault(deployment_name(model), model.name)
        if other != model.name:
            raise ConfigError(
                f"models: the names {other!r} and {model.name!r} differ only in signs that Serve refuses"
            )
