import asyncio

import httpx
import pytest
from router_wire import MODELS, VLLM_METRICS, VLLM_PAGES, answering, engine, reply, until

from router import health
from router.core.fleet import Fleet, State
from router.errors import EngineUnreachable
from router.health import Endpoint, Watch, cache_config, learn, reachable
from router.metrics import Metrics


async def learnt(pages):
    async with engine(answering(pages)) as (it, url), httpx.AsyncClient(trust_env=False) as client:
        return it, await learn(client, Endpoint("r", url, "vllm"))


async def test_an_engine_tells_all_that_is_needed():
    it, replica = await learnt(VLLM_PAGES)
    assert (replica.id, replica.engine, replica.models) == ("r", "vllm", ("m", "lora"))
    assert (replica.root, replica.adapters) == ("/models/m", {"lora"})
    assert (replica.block_size, replica.max_model_len) == (32, 4096)
    assert replica.kv_events == "tcp://127.0.0.1:5557"
    assert replica.kv_replay == "tcp://127.0.0.1:5558"
    assert replica.url.endswith(str(it.port))


async def test_an_engine_without_events_or_metrics_is_taken_too():
    _, replica = await learnt({b"/v1/models": reply(MODELS)})
    assert (replica.block_size, replica.kv_events, replica.kv_replay) == (None, None, None)


async def test_an_engine_without_prefix_cache_or_with_several_says_so():
    told = b'vllm:cache_config_info{block_size="16",enable_prefix_caching="%s",engine="%d"} 1.0\n'
    metrics = b"# TYPE vllm:cache_config_info gauge\n" + told % (b"False", 0) + told % (b"False", 1)
    _, replica = await learnt({**VLLM_PAGES, b"/metrics": reply(metrics, content_type="text/plain")})
    assert (replica.prefix_caching, replica.ranks) == (False, 2)
    _, replica = await learnt(VLLM_PAGES)
    assert (replica.prefix_caching, replica.ranks) == (True, 1)
    ranks = reply(b'{"0":{"endpoint":"tcp://*:5557"},"1":{"endpoint":"tcp://*:5558"}}')
    _, replica = await learnt({**VLLM_PAGES, b"/kv_event_sources": ranks})
    assert (replica.kv_events, replica.ranks) == ("tcp://127.0.0.1:5557", 2)


@pytest.mark.parametrize(
    "models",
    [
        reply(b"", status="503 Service Unavailable"),
        reply(b"<html>"),
        reply(b"[]"),
        reply(b'{"data":[]}'),
        reply(b'{"data":[{}]}'),
        reply(b'{"data":[{"id":5}]}'),
        reply(b"\xff"),
        reply(b'{"data":[{"id":"m","x":' + b"[" * 100_000),
    ],
)
async def test_what_is_not_vllm_is_told(models):
    with pytest.raises(EngineUnreachable, match=r"http://127.0.0.1:\d+ does not answer as vLLM"):
        await learnt({**VLLM_PAGES, b"/v1/models": models})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", None),
        (VLLM_METRICS.decode(), 32),
        ('vllm:cache_config_info{block_size="None"} 1\n', None),
        (f'vllm:cache_config_info{{block_size="{"1" * 5000}"}} 1\n', None),
    ],
)
def test_the_block_size_is_read_from_metrics(text, size):
    assert cache_config(text, "block_size") == size


@pytest.mark.parametrize(
    ("bound", "told"),
    [
        ("tcp://*:1", "tcp://host:1"),
        ("tcp://0.0.0.0:1", "tcp://host:1"),
        ("tcp://10.0.0.1:1", "tcp://10.0.0.1:1"),
        ("ipc:///x", "ipc:///x"),
        (None, None),
    ],
)
def test_reachable(bound, told):
    assert reachable(bound, "http://host:8000") == told


async def test_a_replica_is_followed_down_and_up_again():
    fleet = Fleet()
    watch = Watch(fleet, Metrics())
    await watch.start()
    async with engine(answering(VLLM_PAGES)) as (it, url):
        watch.follow(Endpoint("r", url))
        await until(lambda: bool(fleet.view("m").replicas))
        await it.stop()
        watch.suspect("r")
        await until(lambda: fleet.get("r").state is State.DOWN)
        await it.start(it.port)
        await until(lambda: bool(fleet.view("m").replicas))
        assert watch.leave("r") is fleet.get("r")
        assert fleet.get("r").state is State.LEAVING and not fleet.view("m").replicas
    await watch.stop()


async def test_a_dead_replica_is_asked_four_times_a_second_and_not_more(monkeypatch):
    monkeypatch.setattr(health, "PROBE_DOWN_S", 0.05)
    fleet = Fleet()
    watch = Watch(fleet, Metrics())
    await watch.start()
    pages = dict(VLLM_PAGES)
    async with engine(answering(pages)) as (it, url):
        watch.follow(Endpoint("r", url))
        await until(lambda: bool(fleet.view("m").replicas))
        pages[b"/health"] = reply(b"", status="503 Service Unavailable")
        watch.suspect("r")
        await until(lambda: fleet.get("r").state is State.DOWN)
        loop = asyncio.get_running_loop()
        it.requests.clear()
        began = loop.time()
        await until(lambda: len(it.requests) >= 6)
        assert loop.time() - began > 4 * 0.05
        assert fleet.get("r").failures == 1
    await watch.stop()


async def test_an_engine_that_comes_back_as_another_is_learnt_anew():
    fleet = Fleet()
    watch = Watch(fleet, Metrics())
    await watch.start()
    pages = dict(VLLM_PAGES)
    async with engine(answering(pages)) as (_, url):
        watch.follow(Endpoint("r", url))
        await until(lambda: fleet.models() == ("lora", "m"))
        pages[b"/health"] = reply(b"", status="503 Service Unavailable")
        watch.suspect("r")
        await until(lambda: fleet.get("r").state is State.DOWN)
        pages[b"/v1/models"] = reply(b'{"data":[{"id":"new"}]}')
        pages[b"/health"] = reply(b"")
        await until(lambda: bool(fleet.view("new").replicas))
    await watch.stop()


async def test_a_replica_that_is_not_there_yet_is_waited_for():
    fleet = Fleet()
    watch = Watch(fleet, Metrics())
    await watch.start()
    async with engine(answering(VLLM_PAGES)) as (it, url):
        await it.stop()
        watch.follow(Endpoint("r", url))
        watch.suspect("r")
        assert list(fleet) == []
        await it.start(it.port)
        await until(lambda: bool(fleet.view("m").replicas))
    await watch.stop()
