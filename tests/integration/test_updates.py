"""Replicas that are rolled, added, taken away and scaled on real Ray Serve, under streams: nobody notices.

One fleet for all of it, since a fleet takes half a minute: while one model is rolled the other, of which
nobody asks anything any more, goes back to nothing.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest
import yaml
from integration.fleet import Fleet, status
from router_wire import during
from support import eventually

from router.config import AUTOSCALING_POLICY
from router.plan import document

pytestmark = pytest.mark.ray

MODEL, SCALED = "herd-demo", "herd-scaled"
REPLICAS = f"Replica-{MODEL}"
# A stream takes a second, so with twenty a second there are always twenty under way.
STREAM: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Tell of the herd."}]}
# A prompt of a thousand tokens takes half a second, so four a second take two replicas and some to spare.
LONG: dict[str, Any] = {"model": SCALED, "messages": [{"role": "user", "content": "herd " * 700}]}
SETTLED_S = 120.0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("updates")
    model = {"name": MODEL, "engine": "simulated", "source": "demo", "replicas": 2}
    scaled = {
        "name": SCALED,
        "replicas": {"min": 0, "max": 3, "settle_s": 4, "idle_s": 20, "startup_s": 4},
        "engine_args": {"step-time": "0.01,5e-4,1e-4,0"},
    }
    models = [{**model, "engine_args": {"step-time": "0.025,0,0,0"}}, {**model, **scaled}]
    config = document({"models": models, "router": {"replicas": 2}})
    config["applications"][0]["autoscaling_policy"] = {"policy_function": AUTOSCALING_POLICY}
    file = folder / "fleet.yaml"
    file.write_text(yaml.safe_dump(config))
    fleet = Fleet(folder, file)
    try:
        yield fleet.wait_until_up()
    finally:
        fleet.end()


def ready(fleet: Fleet, model: str = MODEL) -> set[str]:
    return {id for id, replica in fleet.ready().items() if model in replica["models"]}


def scaling(fleet: Fleet) -> dict[str, Any]:
    """What is told of the scaled model, with the decisions on it, the newest first."""
    return dict(httpx.get(f"http://127.0.0.1:{fleet.admin_port}/scaling", trust_env=False).json()[SCALED])


def deploy(fleet: Fleet, replicas: int, num_cpus: float) -> None:
    """Another replica deployment, in Serve's own way."""
    options = {"name": REPLICAS, "num_replicas": replicas, "ray_actor_options": {"num_cpus": num_cpus}}
    fleet.deploy(options, SETTLED_S)


async def stream(client: httpx.AsyncClient, url: str, body: dict[str, Any], number: int) -> str:
    """One stream: `whole`, or what became of it instead."""
    (message,) = body["messages"]
    asked = [{**message, "content": f"{number}: {message['content']}"}]
    body = {**body, "messages": asked, "max_tokens": 40, "stream": True, "ignore_eos": True}
    try:
        reply = await client.post(f"{url}/v1/chat/completions", json=body)
    except httpx.HTTPError as error:
        return repr(error)
    if reply.status_code != 200 or 'data: {"error"' in reply.text:
        return f"{reply.status_code} {reply.text[-200:]}"
    return "whole" if reply.text.endswith("data: [DONE]\n\n") else "cut"


def streams(
    url: str, body: dict[str, Any], per_second: float
) -> Callable[[asyncio.Event], Awaitable[Counter[str]]]:
    """So many new ones a second until the event, whatever became of those before."""

    async def run(ended: asyncio.Event) -> Counter[str]:
        loop, tasks = asyncio.get_running_loop(), []
        began = loop.time()
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(trust_env=False, timeout=60, limits=limits) as client:
            while not ended.is_set():
                for _ in range(int((loop.time() - began) * per_second) - len(tasks)):
                    tasks.append(loop.create_task(stream(client, url, body, len(tasks))))
                await asyncio.sleep(0.01)
            return Counter(await asyncio.gather(*tasks))

    return run


def test_from_no_replica_to_three_for_those_who_ask(fleet: Fleet) -> None:
    assert ready(fleet, SCALED) == set()
    assert SCALED in {model.id for model in fleet.client().models.list()}
    (tally,) = asyncio.run(
        during(
            lambda: eventually(lambda: len(ready(fleet, SCALED)) == 3, SETTLED_S),
            streams(fleet.url, LONG, per_second=4),
        )
    )
    assert tally.keys() == {"whole"}
    assert scaling(fleet)["changes"][-1]["target"] == 1
    assert 0 < scaling(fleet)["startup_s"] < SETTLED_S


@pytest.mark.parametrize(
    ("replicas", "num_cpus"),
    [(3, 0.0), (2, 0.0), (2, 0.01)],
    ids=["one more", "one less", "all rolled"],
)
def test_no_stream_fails_when_replicas_come_and_go(fleet: Fleet, replicas: int, num_cpus: float) -> None:
    before = ready(fleet)
    (tally,) = asyncio.run(
        during(
            lambda: deploy(fleet, replicas, num_cpus),
            streams(fleet.url, STREAM, per_second=20),
        )
    )
    assert tally.keys() == {"whole"}
    eventually(lambda: len(ready(fleet)) == replicas)
    if num_cpus:
        assert not before & ready(fleet)


def test_back_to_no_replica_when_nobody_asks(fleet: Fleet) -> None:
    eventually(lambda: ready(fleet, SCALED) == set(), SETTLED_S)
    changes = scaling(fleet)["changes"][::-1]
    targets = [changes[0]["before"], *(change["target"] for change in changes)]
    assert targets[:2] == [0, 1] and 3 in targets and targets[-2:] == [1, 0]
    assert all(change["reason"] for change in changes)
    assert httpx.get(f"{fleet.url}/ready", trust_env=False).status_code == 200


def test_the_next_request_waits_for_the_next_replica(fleet: Fleet) -> None:
    reply = fleet.client().chat.completions.create(**LONG, max_tokens=4)
    assert reply.usage is not None and reply.usage.completion_tokens == 4
    assert len(ready(fleet, SCALED)) == 1


def test_operators_see_how_many_there_are_to_be_and_why(fleet: Fleet) -> None:
    told = status(fleet)["fleet"]["scaling"][SCALED]
    assert (told["min"], told["max"]) == (0, 3) and told["last"]["reason"]
    metrics = httpx.get(f"http://127.0.0.1:{fleet.admin_port}/metrics", trust_env=False).text
    assert f'herd_replicas_target{{model="{SCALED}"}}' in metrics
