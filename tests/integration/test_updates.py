"""Replicas that are rolled, added and taken away on real Ray Serve, under streams: nobody notices."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml
from integration.fleet import Fleet
from router_wire import during
from support import eventually

from router.plan import document

pytestmark = pytest.mark.ray

MODEL = "herd-demo"
REPLICAS = f"Replica-{MODEL}"
PER_SECOND = 20
# A stream takes a second, so there are always twenty under way.
ENGINE_ARGS = {"step-time": "0.025,0,0,0"}
TOKENS = 40
SETTLED_S = 120.0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("updates")
    model = {
        "name": MODEL,
        "engine": "simulated",
        "source": "demo",
        "replicas": 2,
        "engine_args": ENGINE_ARGS,
    }
    file = folder / "fleet.yaml"
    file.write_text(yaml.safe_dump(document({"models": [model], "router": {}})))
    fleet = Fleet(folder, file)
    try:
        yield fleet.wait_until_up()
    finally:
        fleet.end()


def deploy(fleet: Fleet, replicas: int, num_cpus: float) -> None:
    """Another replica deployment, in Serve's own way."""
    options = {"name": REPLICAS, "num_replicas": replicas, "ray_actor_options": {"num_cpus": num_cpus}}
    fleet.deploy(options, SETTLED_S)


async def stream(client: httpx.AsyncClient, url: str, number: int) -> str:
    """One stream: `whole`, or what became of it instead."""
    messages = [{"role": "user", "content": f"Tell {number} of the herd."}]
    body: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": TOKENS, "stream": True}
    try:
        reply = await client.post(f"{url}/v1/chat/completions", json=body | {"ignore_eos": True})
    except httpx.HTTPError as error:
        return repr(error)
    if reply.status_code != 200 or 'data: {"error"' in reply.text:
        return f"{reply.status_code} {reply.text[-200:]}"
    return "whole" if reply.text.endswith("data: [DONE]\n\n") else "cut"


async def streams(url: str, ended: asyncio.Event) -> Counter[str]:
    """So many new ones a second until the event, whatever became of those before."""
    loop, tasks = asyncio.get_running_loop(), []
    began = loop.time()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(trust_env=False, timeout=60, limits=limits) as client:
        while not ended.is_set():
            for _ in range(int((loop.time() - began) * PER_SECOND) - len(tasks)):
                tasks.append(loop.create_task(stream(client, url, len(tasks))))
            await asyncio.sleep(0.01)
        return Counter(await asyncio.gather(*tasks))


@pytest.mark.parametrize(
    ("replicas", "num_cpus"),
    [(3, 0.0), (2, 0.0), (2, 0.01)],
    ids=["one more", "one less", "all rolled"],
)
def test_no_stream_fails_when_replicas_come_and_go(fleet: Fleet, replicas: int, num_cpus: float) -> None:
    before = set(fleet.ready())
    (tally,) = asyncio.run(
        during(
            lambda: deploy(fleet, replicas, num_cpus),
            lambda ended: streams(fleet.url, ended),
        )
    )
    assert tally.keys() == {"whole"}
    eventually(lambda: len(fleet.ready()) == replicas)
    if num_cpus:
        assert not before & set(fleet.ready())
