"""Each decision keeps its reasons: what there was to choose from, why, and what came true."""

import asyncio
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from router_wire import (
    LAST_CHUNK,
    VLLM_PAGES,
    answering,
    client,
    engine,
    front_door,
    get,
    post,
    reply,
    said,
    says,
    stream,
    until,
)

from router.core.blocks import Prompt
from router.core.fleet import Cached, Fleet, Load, Replica, Trust, View
from router.core.placement import Placement, kv_aware, least_requests
from router.decisions import BRANCHES, FORECAST, UNTOLD, Decisions, DecisionsConfig
from router.errors import ConnectFailed, DecisionNotFound
from router.health import Endpoint
from router.http.sse import PromptTokensDetails, Usage
from router.series import Counters

EPOCH = 1000.0
PROMPT = Prompt.of_keys(100, [], 16)
CHAT = "/v1/chat/completions"
BODY = b'{"model":"m","messages":[]}'
STREAMED = b'{"model":"m","messages":[],"stream":true}'
TEXT = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"a"},"token_ids":[5]}]}\n\n'
USAGE = (
    b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":1,'
    b'"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
)
DONE = b"data: [DONE]\n\n"
WHOLE = stream(TEXT, USAGE, DONE) + LAST_CHUNK


@pytest.fixture
def fleet():
    fleet = Fleet()
    for id in ("r0", "r1", "r2"):
        fleet.joined(Replica(id, f"http://{id}", ("m",)), now=0.0)
    return fleet


@pytest.fixture
def counters():
    return Counters(CollectorRegistry(), "decisions", "", ("policy", "branch"))


@pytest.fixture
def decisions(counters):
    return Decisions("kv_aware", DecisionsConfig(keep=4), counters)


def placed(decisions, view, policy=kv_aware, request_id=b"a", earlier=None):
    return decisions.placed(request_id, "m", view, policy(view), earlier)


def described(decisions, decision):
    """The last attempt, as JSON tells it."""
    told = json.loads(json.dumps(decisions.described(decision, EPOCH)))
    return told["attempts"][-1]


def test_candidates_are_told_as_they_were(fleet, decisions):
    fleet.trusted("r1", Trust.EXACT, "proven", 16)
    fleet.get("r2").elsewhere = Load(in_flight=2, prefill_s=0.5, decoding=1, context=10)
    first = fleet.started("r0", 0.0, PROMPT)
    view = View(fleet.view("m").replicas, now=0.0, num_tokens=100, cached={"r1": Cached(48, 16, 4)})
    forecast = fleet.get("r0").forecast(100, Cached(), 0.0)
    costs = kv_aware(view).costs
    decision = placed(decisions, view)
    fleet.finished(first, 1.0)
    fleet.trusted("r1", Trust.LOAD, "events were lost", 0)
    r0, r1, r2 = described(decisions, decision)["candidates"]
    assert (r0["replica"], r0["in_flight"], r0["trust"], r0["chosen"]) == ("r0", 1, "load", False)
    told = [r0[name] for name in FORECAST]
    assert told == pytest.approx([getattr(forecast, name) for name in FORECAST], rel=1e-5)
    assert [r0["cost_s"], r1["cost_s"], r2["cost_s"]] == pytest.approx(costs, rel=1e-3)
    assert (r1["cached_tokens"], r1["slower_tokens"], r1["trust"]) == (48, 16, "exact")
    assert r1["chosen"]
    assert (r2["in_flight"], r2["decoding"], r2["backlog_s"]) == (2, 1, 0.5)


counts = st.integers(0, 2**31 - 1)
seconds = st.floats(0, 1e6, width=32)


FIGURES = st.tuples(counts, counts, counts, counts, seconds, seconds, seconds, seconds)


@given(st.lists(FIGURES, min_size=1, max_size=9))
def test_what_is_packed_comes_out_again(rows):
    fleet, cached, forecasts, costs = Fleet(), {}, [], []
    for i, (in_flight, decoding, at_hand, slower, backlog, prefill, loading, cost) in enumerate(rows):
        fleet.joined(Replica(f"r{i}", f"http://r{i}", ("m",)), now=0.0)
        standing = fleet.get(f"r{i}")
        standing.in_flight, standing.decoding = in_flight, decoding
        cached[f"r{i}"] = Cached(at_hand, slower)
        forecasts.append(UNTOLD._replace(backlog_s=backlog, prefill_s=prefill, loading_s=loading))
        costs.append(cost)
    replicas = fleet.view("m").replicas
    placement = Placement(replicas[0], "so", tuple(costs), tuple(forecasts))
    decisions = Decisions("p", DecisionsConfig(), Counters(CollectorRegistry(), "d", "", ("p", "b")))
    decision = decisions.placed(b"a", "m", View(replicas, num_tokens=1, cached=cached), placement, None)
    names = ("in_flight", "decoding", "cached_tokens", "slower_tokens")
    names += ("backlog_s", "prefill_s", "loading_s", "cost_s")
    told = [tuple(c[name] for name in names) for c in described(decisions, decision)["candidates"]]
    assert [row[:4] for row in told] == [row[:4] for row in rows]
    assert [row[4:] for row in told] == [pytest.approx(row[4:], rel=1e-5) for row in rows]


def test_a_policy_that_counts_no_seconds_tells_none(fleet, decisions):
    candidates = described(decisions, placed(decisions, fleet.view("m"), least_requests))["candidates"]
    assert [(c["cost_s"], c["backlog_s"], c["prefill_s"]) for c in candidates] == [(None, None, None)] * 3


@pytest.mark.parametrize(
    ("num_tokens", "cached", "branch"),
    [
        (0, {}, "blind"),
        (100, {}, "cold"),
        (100, {"r0": Cached(16)}, "cached"),
        (100, {"r0": Cached(16), "r1": Cached(16)}, "cached"),
        (100, {"r0": Cached(16), "r1": Cached(32)}, "away"),
        (100, {"r0": Cached(16), "r1": Cached(16, 16)}, "away"),
        (100, {"r1": Cached(16)}, "away"),
    ],
)
def test_what_a_decision_comes_to(fleet, decisions, counters, num_tokens, cached, branch):
    view = View(fleet.view("m").replicas, num_tokens=num_tokens, cached=cached)
    decision = decisions.placed(b"a", "m", view, Placement(fleet.get("r0"), "so"), None)
    assert described(decisions, decision)["branch"] == branch
    assert {b: counters.labels("kv_aware", b).value for b in BRANCHES} == {
        b: float(b == branch) for b in BRANCHES
    }


def test_the_newest_are_kept_and_found(fleet, decisions):
    for number in range(6):
        placed(decisions, fleet.view("m", now=float(number)), request_id=b"%d" % (number % 5))
    assert [d.request_id for d in decisions.newest(9)] == [b"0", b"4", b"3", b"2"]
    assert [d.request_id for d in decisions.newest(2)] == [b"0", b"4"]
    assert decisions.on("0").placed_at == 5.0  # used again
    with pytest.raises(DecisionNotFound, match="'1' is kept here; this process keeps its last 4"):
        decisions.on("1")


def test_none_are_kept_where_none_are_wanted(fleet, counters):
    decisions = Decisions("kv_aware", DecisionsConfig(keep=0), counters)
    placed(decisions, fleet.view("m"))
    assert decisions.newest(9) == []


def test_a_request_that_was_placed_again_is_one(fleet, decisions):
    first = placed(decisions, fleet.view("m"))
    first.failed(ConnectFailed("no connection"))
    first.ended(0.5, 0)
    second = placed(decisions, fleet.view("m").without(frozenset({first.standing.id})), earlier=first)
    second.ended(1.0, 200)
    assert decisions.newest(9) == [second]
    attempts = decisions.described(decisions.on("a"), EPOCH)["attempts"]
    assert [attempt["outcome"] for attempt in attempts] == ["no connection; tried elsewhere", "answered 200"]
    assert [len(attempt["candidates"]) for attempt in attempts] == [3, 2]


def test_what_came_true_stands_beside_what_was_predicted(fleet, decisions):
    view = View(fleet.view("m").replicas, now=1.0, num_tokens=100, cached={"r0": Cached(48)})
    decision = decisions.placed(b"a", "m", view, Placement(fleet.get("r0"), "so"), None)
    decision.ttft_s = 0.25
    assert decision.first_output(1.5) == 2.0
    decision.answered(Usage(101, 7, PromptTokensDetails(32)), None)
    assert described(decisions, decision)["outcome"] == "running"
    decision.ended(3.0, 200)
    told = described(decisions, decision)
    assert told["placed_at"] == EPOCH + 1.0
    assert told["predicted"] == {"prompt_tokens": 100, "cached_tokens": 48, "ttft_s": 0.25}
    assert told["observed"] == {
        "prompt_tokens": 101, "cached_tokens": 32, "output_tokens": 7, "ttft_s": 0.5, "duration_s": 2.0,
    }  # fmt: skip
    assert told["outcome"] == "answered 200"


def test_of_an_unknown_prompt_nothing_is_predicted(fleet, decisions):
    decision = placed(decisions, fleet.view("m"))
    decision.ttft_s = 0.25
    assert decision.first_output(1.5) is None
    predicted = described(decisions, decision)["predicted"]
    assert predicted == {"prompt_tokens": None, "cached_tokens": None, "ttft_s": None}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ConnectFailed("refused"), "refused"),
        (asyncio.CancelledError(), "the client left"),
        (ZeroDivisionError(), "ZeroDivisionError"),
    ],
)
def test_an_exchange_that_failed_says_why(fleet, decisions, error, outcome):
    decision = placed(decisions, fleet.view("m"))
    decision.failed(error)
    decision.ended(1.0, 0)
    assert described(decisions, decision)["outcome"] == outcome


def test_headers_hold_ascii_only(fleet, counters):
    decisions = Decisions("p", DecisionsConfig(headers=True), counters)
    placement = Placement(fleet.get("r0"), "for Zoë\r\nx: y")
    decision = decisions.placed(b"a", "m", fleet.view("m"), placement, None)
    assert decisions.headers(decision) == [
        (b"x-route-decision", b"p; for Zo?x: y"),
        (b"x-herd-replica", b"r0"),
    ]


# -- over the wire


def pages(*parts):
    """A script that answers what the router asks of an engine, and says these parts to clients."""
    known, talk = answering(VLLM_PAGES), says(*parts)

    async def script(request, reader, writer):
        await (known if request.split(b" ")[1] in VLLM_PAGES else talk)(request, reader, writer)

    return script


async def cut(request, reader, writer):
    raise ConnectionResetError


async def asked(front, path):
    status, _, body = await get(front.admin_port, path)
    return status, json.loads(body)


async def chat(front, *headers):
    return await said(front.port, post(CHAT, BODY, *headers))


async def test_a_request_is_explained_by_its_id():
    async with engine(pages(WHOLE)) as (_, url), front_door() as front:
        front.membership([Endpoint("a", url)])
        await until(lambda: front.ready)
        began = time.time()
        streamed = post(CHAT, STREAMED, "x-request-id: a/b %41")
        status, headers, _ = await said(front.port, streamed)
        assert (status, headers["x-request-id"]) == (200, "a/b %41")
        status, told = await asked(front, "/decisions/a%2Fb%20%2541")
        assert (status, told["request_id"], told["model"], told["policy"]) == (
            200, "a/b %41", "m", "least_requests",
        )  # fmt: skip
        (attempt,) = told["attempts"]
        assert (attempt["replica"], attempt["reason"]) == ("a", "fewest requests in flight (0)")
        assert attempt["outcome"] == "answered 200"
        assert [(c["replica"], c["chosen"], c["in_flight"]) for c in attempt["candidates"]] == [
            ("a", True, 0)
        ]
        observed = attempt["observed"]
        tokens = (observed["prompt_tokens"], observed["cached_tokens"], observed["output_tokens"])
        assert tokens == (7, 4, 1)
        assert 0 <= observed["ttft_s"] <= observed["duration_s"]
        assert began - 1 < attempt["placed_at"] < time.time() + 1
        metrics = (await get(front.admin_port, "/metrics"))[2].decode()
        assert 'herd_route_decisions_total{branch="blind",policy="least_requests"} 1.0' in metrics
        assert 'herd_route_decisions_total{branch="away",policy="least_requests"} 0.0' in metrics
        assert 'herd_ttft_prediction_ratio_count{model="m"} 0.0' in metrics


async def test_of_an_id_used_again_the_newest_is_told_and_the_last_are_listed():
    async with engine(pages(reply(b"{}"))) as (_, url), front_door() as front:
        front.membership([Endpoint("a", url)])
        await until(lambda: front.ready)
        for request_id in ("one", "two", "one"):
            await chat(front, f"x-request-id: {request_id}")
        _, listed = await asked(front, "/decisions")
        assert [told["request_id"] for told in listed] == ["one", "two", "one"]
        assert (await asked(front, "/decisions?last=1"))[1] == listed[:1]
        assert (await asked(front, "/decisions/one"))[1] == listed[0]


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/decisions/none", 404, "'none' is kept here; this process keeps its last 10000"),
        ("/decisions?last=0", 400, "last: a number from 1 to 1000"),
        ("/decisions?last=many", 400, "last: a number is expected, not 'many'"),
        ("/decisions?last=1001", 400, "last: a number from 1 to 1000"),
        ("/arrivals?after=-1", 400, "after: a number is expected, not '-1'"),
    ],
)
async def test_what_cannot_be_told(path, status, says):
    async with front_door() as front:
        told, body = await asked(front, path)
        assert told == status
        assert says in body["error"]["message"]
        assert (await get(front.port, path))[0] == 404  # clients are told nothing


async def test_a_replica_that_did_not_answer_is_an_attempt():
    async with (
        engine(pages(reply(b"{}"))) as (_, url),
        engine(pages()) as (bad, other),
        front_door() as front,
    ):
        front.membership([Endpoint("a", other), Endpoint("b", url)])
        await until(lambda: len(front.fleet.view("m").replicas) == 2)
        bad._script = cut
        assert (await chat(front, "x-request-id: x"))[0] == 200
        _, told = await asked(front, "/decisions/x")
        first, second = told["attempts"]
        assert (first["replica"], second["replica"]) == ("a", "b")
        assert first["outcome"].endswith("; tried elsewhere")
        assert second["outcome"] == "answered 200"
        assert [c["replica"] for c in second["candidates"]] == ["b"]


async def test_a_client_that_left_and_a_stream_that_broke():
    error = b'data: {"error": {"message": "out of memory"}}\n\n'
    async with engine(pages(stream(TEXT))) as (it, url), front_door() as front:
        front.membership([Endpoint("a", url)])
        await until(lambda: front.ready)
        async with client(front.port) as c:
            await c.send(post(CHAT, STREAMED, "x-request-id: left"))
            await c.head()
        await until(lambda: front.fleet.get("a").in_flight == 0)
        it._script = pages(stream(TEXT, error, DONE) + LAST_CHUNK)
        await said(front.port, post(CHAT, STREAMED, "x-request-id: broke"))
        outcomes = {
            name: (await asked(front, f"/decisions/{name}"))[1]["attempts"][-1]["outcome"]
            for name in ("left", "broke")
        }
        assert outcomes["left"] == "the client left"
        assert "out of memory" in outcomes["broke"]


@pytest.mark.parametrize(
    ("body", "answer"), [(BODY, reply(b"{}")), (STREAMED, WHOLE)], ids=["whole", "stream"]
)
async def test_replies_tell_their_decision_where_that_is_allowed(body, answer):
    async with (
        engine(pages(answer)) as (_, url),
        front_door() as quiet,
        front_door(decisions={"headers": True}) as telling,
    ):
        for front in (quiet, telling):
            front.membership([Endpoint("a", url)])
            await until(lambda front=front: front.ready)
        told = (await said(telling.port, post(CHAT, body)))[1]
        assert told["x-route-decision"] == "least_requests; fewest requests in flight (0)"
        assert told["x-herd-replica"] == "a"
        untold = (await said(quiet.port, post(CHAT, body)))[1]
        assert not {"x-route-decision", "x-herd-replica"} & untold.keys()
