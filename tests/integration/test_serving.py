"""The whole path on real Ray: a client, the router, simulated engines on Serve; and replicas that die."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator

import httpx
import openai
import pytest
import yaml
from integration.fleet import SERVE, Fleet, gone, herd, status
from support import ROOT, eventually

from router.run_directory import Process

pytestmark = pytest.mark.ray

MODEL = "herd-demo"
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
# So many at once that one replica would be half as fast as an idle one. For a few, a replica that by chance
# looks a little faster is the right place for all of them.
MANY = 128
# Serve looks after each replica once a second and gives up on an engine after three failures in a row.
REPLACED_S = 60.0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), "--engine", "simulated", "--replicas", "2")
    try:
        yield fleet.wait_until_up()
    finally:
        fleet.end()


@pytest.fixture
def whole(fleet: Fleet) -> Fleet:
    """The fleet with both replicas in traffic, whatever the test before has done to it."""
    eventually(lambda: len(fleet.ready()) == 2, REPLACED_S)
    return fleet


def test_a_client_gets_a_whole_answer(whole: Fleet) -> None:
    answer = whole.client().chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8)
    assert answer.choices[0].message.content
    assert answer.usage is not None and answer.usage.completion_tokens == 8


def test_a_stream_says_what_the_whole_answer_says(whole: Fleet) -> None:
    client = whole.client()
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=20, temperature=0)
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=20, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == answer.choices[0].message.content


def test_many_clients_at_once_spread_over_both_replicas(whole: Fleet) -> None:
    before = {replica_id: r["finished"] for replica_id, r in whole.ready().items()}

    async def one(client: openai.AsyncOpenAI) -> str | None:
        answer = await client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8)
        return answer.choices[0].message.content

    async def all_of_them() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{whole.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client) for _ in range(MANY)))

    assert all(asyncio.run(all_of_them()))
    done = {replica_id: r["finished"] - before[replica_id] for replica_id, r in whole.ready().items()}
    assert sum(done.values()) == MANY
    assert min(done.values()) >= 4


def test_a_named_tool_is_called(whole: Fleet) -> None:
    answer = whole.client().chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=64,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )
    assert answer.choices[0].message.tool_calls[0].function.name == "weather"


def test_an_unknown_model_is_named_in_the_error(whole: Fleet) -> None:
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        whole.client().chat.completions.create(model="no-such-model", messages=HELLO)


def test_a_killed_engine_costs_no_later_request_and_is_replaced(whole: Fleet) -> None:
    before = whole.ready()
    victim, survivor = before.values()
    os.kill(whole.engine(victim).pid, signal.SIGKILL)
    for _ in range(6):
        assert whole.client().chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4).choices
    assert (
        victim["id"] not in eventually(lambda: (r := whole.ready()) and len(r) == 1 and r, REPLACED_S) or True
    )
    after = eventually(lambda: len(r := whole.ready()) == 2 and victim["id"] not in r and r, REPLACED_S)
    assert survivor["id"] in after


def test_a_killed_replica_takes_its_engine_along_and_is_replaced(whole: Fleet) -> None:
    before = whole.ready()
    actor = whole.processes("ray::ServeReplica:herd:Replica-")[0]
    engines = [p for p in whole.processes("workers.simulated") if _is_below(p, actor)]
    assert engines
    os.kill(actor.pid, signal.SIGKILL)
    eventually(lambda: gone(engines))
    after = eventually(lambda: len(r := whole.ready()) == 2 and r.keys() != before.keys() and r, REPLACED_S)
    assert len(after.keys() & before.keys()) == 1
    assert whole.client().chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4).choices


def test_a_killed_router_comes_back_and_finds_the_fleet(whole: Fleet) -> None:
    before = whole.ready().keys()
    (router,) = whole.processes("ray::ServeReplica:herd:Router")
    os.kill(router.pid, signal.SIGKILL)
    eventually(lambda: not router.alive)
    eventually(lambda: whole.ready().keys() == before, REPLACED_S, tolerate=httpx.TransportError)
    # Its admin port answers before the public one: it first learns what the fleet holds.
    eventually(lambda: httpx.get(f"{whole.url}/v1/models").is_success, tolerate=httpx.TransportError)
    assert whole.client().chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4).choices


def test_status_tells_every_replica(whole: Fleet) -> None:
    told = status(whole)
    assert {r["id"] for r in told["fleet"]["replicas"]} >= whole.ready().keys()
    assert told["endpoint"] == whole.url
    text = herd("status", "--run-dir", whole.directory.path).stdout
    assert all(r["url"] in text for r in whole.ready().values())
    assert "simulated" in text


def test_the_printed_serve_command_shows_both_deployments(whole: Fleet) -> None:
    line = next(line for line in whole.output.splitlines() if line.strip().startswith("on Serve"))
    shown = _shell(line.split("on Serve", 1)[1])
    deployments = yaml.safe_load(shown)["applications"]["herd"]["deployments"]
    assert {name: d["status"] for name, d in deployments.items()} == {
        "Router": "HEALTHY",
        f"Replica-{MODEL}": "HEALTHY",
    }


def test_serve_deploy_takes_the_same_file(whole: Fleet) -> None:
    """With a third replica asked for in Serve's own way, to see that it was taken; and back."""
    config = yaml.safe_load(whole.directory.serve_config.read_text())
    config["applications"][0]["deployments"] = [{"name": f"Replica-{MODEL}", "num_replicas": 3}]
    larger = whole.directory.path / "larger.yaml"
    larger.write_text(yaml.safe_dump(config))
    deploy = f"RAY_AUTH_MODE=token {SERVE} deploy --address {whole.record.dashboard}"
    before = whole.ready().keys()
    try:
        _shell(f"{deploy} {shlex.quote(str(larger))}")
        after = eventually(lambda: len(r := whole.ready()) == 3 and r, REPLACED_S)
        assert before <= after.keys()
    finally:
        _shell(f"{deploy} {shlex.quote(str(whole.directory.serve_config))}")
    eventually(lambda: len(whole.ready()) == 2, REPLACED_S)


def test_a_second_fleet_is_refused_in_one_sentence(whole: Fleet) -> None:
    here = herd("up", "--engine", "simulated", "--run-dir", whole.directory.path, "--port", "0")
    assert (here.returncode, here.stderr.splitlines()[-1][:35]) == (1, "Error: A fleet is already up here: ")
    port = herd(
        "up", "--engine", "simulated", "--run-dir", whole.directory.path / "other", "--port", str(whole.port)
    )
    assert (port.returncode, port.stderr.splitlines()[-1]) == (
        1,
        f"Error: Port {whole.port} is taken: something already listens on it.",
    )


def test_a_fleet_on_an_existing_cluster_leaves_the_others_alone(
    whole: Fleet, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("guest")
    config = yaml.safe_load(whole.directory.serve_config.read_text())
    config["applications"][0]["name"] = "guest"
    config["applications"][0]["args"]["models"][0]["replicas"] = 1
    (folder / "guest.yaml").write_text(yaml.safe_dump(config))
    before = whole.ready().keys()
    guest = Fleet(folder, folder / "guest.yaml", "--address", str(whole.record.ray_address))
    try:
        guest.wait_until_up()
        assert guest.client().chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4).choices
        guest.signal(signal.SIGINT)
        assert guest.wait() == 0, guest.output
    finally:
        guest.end()
    assert guest.directory.read() is None
    shown = yaml.safe_load(_shell(f"RAY_AUTH_MODE=token {SERVE} status --address {whole.record.dashboard}"))
    assert set(shown["applications"]) == {"herd"}
    assert whole.ready().keys() == before


def _shell(command: str) -> str:
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _is_below(process: Process, ancestor: Process) -> bool:
    from router.run_directory import descendants

    return process in descendants(ancestor.pid)
