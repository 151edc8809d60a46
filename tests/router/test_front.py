import asyncio
import json
import os
import re

import pytest
from router_wire import (
    VLLM_PAGES,
    WAIT_S,
    answering,
    client,
    engine,
    front_door,
    get,
    post,
    reply,
    said,
    until,
)

from router.config import RouterConfig
from router.core.blocks import Prompt
from router.errors import ListenError
from router.front import FrontDoor
from router.health import Endpoint

CHAT = post("/v1/chat/completions", b'{"model":"m"}')
PAGES = {**VLLM_PAGES, b"/v1/chat/completions": reply(b'{"answer":1}')}


async def test_announced_replicas_serve_and_withdrawn_ones_do_not():
    async with (
        engine(answering(PAGES)) as (first, a),
        engine(answering(PAGES)) as (second, b),
        front_door() as front,
    ):
        assert (await said(front.port, CHAT))[0] == 503
        front.membership([Endpoint("a", a), Endpoint("b", b)])
        await until(lambda: len(front.fleet.view("m").replicas) == 2)
        assert front.ready
        for _ in range(2):
            assert (await said(front.port, CHAT))[2] == b'{"answer":1}'
        front.membership([Endpoint("b", b)])
        await until(lambda: [s.id for s in front.fleet] == ["b"])
        first.requests.clear()
        second.requests.clear()
        for _ in range(2):
            assert (await said(front.port, CHAT))[0] == 200
        assert (len(first.requests), len(second.requests)) == (0, 2)
        await asyncio.wait_for(first.disconnected.wait(), WAIT_S)  # nothing is kept open to who left


async def test_the_admin_port_tells_the_fleet():
    async with engine(answering(PAGES)) as (it, url), front_door() as front:
        front.membership([Endpoint("a", url, "vllm")])
        await until(lambda: front.ready)
        await said(front.port, CHAT)
        status, headers, body = await get(front.admin_port, "/fleet")
        fleet = json.loads(body)
        assert (status, headers["content-type"], fleet["policy"]) == (
            200,
            "application/json",
            "least_requests",
        )
        assert fleet["models"] == [
            {"name": "lora", "replicas": 1, "ready": 1},
            {"name": "m", "replicas": 1, "ready": 1},
        ]
        (replica,) = fleet["replicas"]
        assert (replica["id"], replica["url"], replica["engine"], replica["state"]) == (
            "a",
            url,
            "vllm",
            "ready",
        )
        assert (replica["block_size"], replica["finished"], replica["in_flight"]) == (32, 1, 0)
        assert replica["trust"] in ("exact", "approximate", "load")
        assert replica["trust_reason"]
        assert replica["takes_token_ids"] is False
        targets = json.loads((await get(front.admin_port, "/targets"))[2])
        assert targets == [
            {
                "targets": [f"127.0.0.1:{it.port}"],
                "labels": {"replica": "a", "model": "m"},
            }
        ]
        metrics = (await get(front.admin_port, "/metrics"))[2].decode()
        assert 'herd_replicas{model="m",state="ready"} 1.0' in metrics
        assert 'herd_requests_in_flight{model="m",replica="a"} 0.0' in metrics
        assert 'herd_streams_truncated_total{model="m"} 0.0' in metrics
        assert 'herd_requests_total{code="200",model="m",path="/v1/chat/completions"} 1.0' in metrics
        assert "process_cpu_seconds_total" in metrics


async def test_the_admin_port_tells_backlog_and_step_model():
    async with engine(answering(PAGES)) as (_, url), front_door() as front:
        front.membership([Endpoint("a", url, "vllm-cpu")])
        await until(lambda: front.ready)
        now = asyncio.get_running_loop().time()
        first = front.fleet.started("a", now - 60, Prompt(1000))
        front.fleet.started("a", now - 30, Prompt(10**7))  # hours of work
        front.fleet.first_token(first, now)
        standing = front.fleet.get("a")
        learnt = pytest.approx(standing.steps.prefill.value)
        (replica,) = json.loads((await get(front.admin_port, "/fleet"))[2])["replicas"]
        assert (replica["decoding"], replica["context_tokens"]) == (1, 1000)
        assert replica["backlog_s"] == pytest.approx(standing.backlog_s(now), abs=10)
        assert replica["step_model"] == {
            "prior": "vllm-cpu",
            "prefill": {"own": learnt, "observations": 1, "common": None, "value": learnt},
            "decode": {"own": 1.0, "observations": 0, "common": None, "value": 1.0},
            "step_s": pytest.approx(standing.steps.step_s(1, 1000)),
        }
        metrics = (await get(front.admin_port, "/metrics"))[2].decode()
        assert f"herd_index_blocks {float(len(front.fleet.index))}" in metrics
        assert float(re.search(r"\nherd_index_bytes (.+)", metrics)[1]) == front.fleet.index.nbytes > 0
        backlog = re.search(r'herd_replica_backlog_seconds{model="m",replica="a"} (.+)', metrics)
        assert float(backlog[1]) == pytest.approx(standing.backlog_s(now), abs=10)
        factor = re.search(r'herd_step_model_factor{model="m",phase="prefill",replica="a"} (.+)', metrics)
        assert float(factor[1]) == standing.steps.prefill.value != 1


async def test_the_admin_port_tells_every_process_of_the_port():
    async with front_door() as front, front_door(port=front.port) as second, client(front.port):
        await until(lambda: sum(map(connected, (front, second))) == 1)
        fleet = json.loads((await get(front.admin_port, "/fleet"))[2])
        assert fleet["process"] == {"pid": os.getpid(), "connections": connected(front), "in_flight": 0}
        assert fleet["processes"] == [
            {"rank": 0, "pid": os.getpid(), "admin_port": front.admin_port},
            {"rank": 1, "pid": os.getpid(), "admin_port": second.admin_port},
        ]
        host = "GET /routers HTTP/1.1\r\nhost: [::1]:9\r\n\r\n"
        assert json.loads((await said(second.admin_port, host.encode()))[2]) == [
            {"targets": [f"[::1]:{front.admin_port}", f"[::1]:{second.admin_port}"], "labels": {}}
        ]
        await front.retire()
        with pytest.raises(ConnectionRefusedError):
            await get(front.admin_port, "/fleet")
        processes = json.loads((await get(second.admin_port, "/fleet"))[2])["processes"]
        assert [process["rank"] for process in processes] == [1, None]


def connected(front):
    return front.metrics.registry.get_sample_value("herd_client_connections")


async def test_a_process_takes_connections_when_it_knows_the_replicas():
    release = asyncio.Event()

    async def slow(request, reader, writer):
        await release.wait()
        await answering(PAGES)(request, reader, writer)

    config = RouterConfig(host="127.0.0.1", port=0, admin_port=0)
    async with engine(slow) as (_, url):
        front = FrontDoor(config)
        await front.start()
        front.membership([Endpoint("a", url)])
        opening = asyncio.create_task(front.open())
        assert (await get(front.admin_port, "/health"))[0] == 200
        with pytest.raises(ConnectionRefusedError):
            await said(front.port, CHAT)
        release.set()
        await opening
        assert (await said(front.port, CHAT))[0] == 200
        await front.stop(0)


async def test_a_replica_that_does_not_answer_keeps_nobody_waiting(monkeypatch):
    monkeypatch.setattr("router.front.SETTLE_S", 0.1)
    async with engine(lambda *_: asyncio.Event().wait()) as (_, mute), engine(answering(PAGES)) as (_, url):
        front = FrontDoor(RouterConfig(host="127.0.0.1", port=0, admin_port=0))
        await front.start()
        front.membership([Endpoint("a", url), Endpoint("b", "http://127.0.0.1:1"), Endpoint("c", mute)])
        await front.open()
        assert (await said(front.port, CHAT))[0] == 200
        await front.stop(0)


async def test_a_fleet_that_lost_its_replicas_says_so():
    async with engine(answering(PAGES)) as (_, url), front_door() as front:
        front.membership([Endpoint("a", url)])
        await until(lambda: front.ready)
        await get(front.admin_port, "/metrics")
        front.membership([])
        await until(lambda: not list(front.fleet))
        metrics = (await get(front.admin_port, "/metrics"))[2].decode()
        assert 'herd_replicas{model="m",state="ready"} 0.0' in metrics
        assert 'replica="a"' not in metrics
        assert not front.ready


async def test_a_browser_gets_the_fleet_as_a_page():
    async with front_door() as front:
        status, headers, body = await get(front.admin_port, "/fleet", "accept: text/html,*/*")
        assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert b"<title>Herd fleet</title>" in body


@pytest.mark.parametrize(("path", "status"), [("/health", 200), ("/nothing", 404)])
async def test_other_admin_paths(path, status):
    async with front_door() as front:
        assert (await get(front.admin_port, path))[0] == status
        told, headers, _ = await said(front.admin_port, post("/fleet", b""))
        assert (told, headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/metrics", "/fleet", "/targets"])
async def test_the_front_port_tells_nothing_of_the_fleet(path):
    async with front_door() as front:
        assert (await get(front.port, path))[0] == 404


@pytest.mark.parametrize(
    ("setting", "told"),
    [("port", "port {} is taken: another fleet has it"), ("admin_port", ":{}: Address already in use")],
)
async def test_a_port_in_use_is_told(setting, told):
    async with front_door() as front:
        taken = front.port
        config = RouterConfig(**{"host": "127.0.0.1", "port": 0, "admin_port": 0, setting: taken})
        with pytest.raises(ListenError, match=told.format(taken)):
            await FrontDoor(config, fleet="another").start()
