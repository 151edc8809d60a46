"""The whole path with real vLLM: `herd up` with two replicas of the demo model on this machine's CPU."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator

import httpx
import openai
import pytest
from integration.fleet import END_S, Fleet, gone, listens
from support import eventually

from router.run_directory import descendants
from workers.vllm_engine import where_can_run

pytestmark = [
    pytest.mark.ray,
    pytest.mark.vllm,
    pytest.mark.skipif(where_can_run().platform is None, reason=where_can_run().reason),
    pytest.mark.timeout(600),
]

MODEL = "herd-demo"
HELLO = [{"role": "user", "content": "Tell me about herds."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,  # vLLM holds only these to their schema
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
# Two engines that share two cores with everything else that runs there.
START_S = 300.0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), "--engine", "vllm", "--replicas", "2")
    try:
        yield fleet.wait_until_up(START_S)
    finally:
        fleet.end()


@pytest.fixture
def whole(fleet: Fleet) -> Fleet:
    """The fleet with both replicas in traffic, whatever the test before has done to it."""
    eventually(lambda: len(fleet.ready()) == 2, START_S)
    return fleet


def test_herd_up_says_what_runs_and_what_to_expect(whole: Fleet) -> None:
    assert "vLLM" in whole.output.splitlines()[0]
    assert "noise" in whole.output.splitlines()[0]


def test_a_client_gets_an_answer_with_its_usage(whole: Fleet) -> None:
    answer = whole.client().chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


def test_a_stream_says_what_the_whole_answer_says(whole: Fleet) -> None:
    client = whole.client()
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=24, temperature=0)
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=24, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == answer.choices[0].message.content


def test_many_clients_at_once_are_served_by_both_replicas(whole: Fleet) -> None:
    before = {replica_id: r["finished"] for replica_id, r in whole.ready().items()}

    async def all_of_them() -> list[openai.types.chat.ChatCompletion]:
        async with openai.AsyncOpenAI(base_url=f"{whole.url}/v1", api_key="none", max_retries=0) as client:
            # Nothing in common: what they shared would draw them to one cache.
            asked = [[{"role": "user", "content": f"{n}: what is herd {n} like? " * 40}] for n in range(8)]
            answers = (
                client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8)
                for messages in asked
            )
            return await asyncio.gather(*answers)

    assert len(asyncio.run(all_of_them())) == 8
    done = [r["finished"] - before[replica_id] for replica_id, r in whole.ready().items()]
    assert sum(done) == 8
    assert min(done) >= 1


def test_a_named_tool_is_called_with_arguments_of_its_schema(whole: Fleet) -> None:
    answer = whole.client().chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=256,
        temperature=0,  # noise that is drawn may be blanks without end
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )
    call = answer.choices[0].message.tool_calls[0].function
    assert call.name == "weather"
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")


def test_a_client_that_leaves_frees_its_engine(whole: Fleet) -> None:
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx.stream(
        "POST", f"{whole.url}/v1/completions", json=body, timeout=60, trust_env=False
    ) as stream:
        lines = stream.iter_lines()  # the stream ends with its last reader
        next(lines)
        eventually(lambda: sum(_running(whole)) == 1)
    eventually(lambda: sum(_running(whole)) == 0, 5)


def test_a_killed_engine_costs_no_later_request_and_is_replaced(whole: Fleet) -> None:
    victim, survivor = whole.ready().values()
    os.kill(whole.engine(victim).pid, signal.SIGKILL)
    for _ in range(4):
        assert whole.client().chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4).choices
    after = eventually(lambda: len(r := whole.ready()) == 2 and victim["id"] not in r and r, START_S)
    assert survivor["id"] in after


def test_a_killed_replica_takes_its_engine_along_and_is_replaced(whole: Fleet) -> None:
    before = whole.ready()
    actor = whole.processes("ray::ServeReplica:herd:Replica-")[0]
    engine = descendants(actor.pid)
    assert len(engine) >= 3  # two supervisors and vLLM
    os.kill(actor.pid, signal.SIGKILL)
    eventually(lambda: gone(engine))
    after = eventually(lambda: len(r := whole.ready()) == 2 and r.keys() != before.keys() and r, START_S)
    assert len(after.keys() & before.keys()) == 1
    assert whole.client().chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4).choices


def test_ctrl_c_ends_all_of_it(whole: Fleet) -> None:
    """The last one: it ends the module's fleet."""
    record = whole.record
    whole.signal(signal.SIGINT)
    assert whole.wait() == 0, whole.output
    eventually(lambda: gone(record.processes), END_S)
    assert not listens(whole.port)
    assert not os.path.exists(str(record.ray_folder))


def _running(fleet: Fleet) -> list[float]:
    """What each engine says it is working on."""
    told = [httpx.get(f"{r['url']}/metrics", trust_env=False).text for r in fleet.ready().values()]
    lines = [line for text in told for line in text.splitlines()]
    return [float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{")]
