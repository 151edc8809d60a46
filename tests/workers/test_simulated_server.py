"""The simulated engine's own: determinism, faults, limits, draining, flags; each on a real server process."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from engine_wire import MODEL, RunningEngine, StartSimulated, events_of, shape, start_engine
from support import ROOT, Start, eventually, free_port, get, processes, simulated_engine

from workers import demo_model
from workers.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"


def chat(text: str = "hello", max_tokens: int = 8, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, **fields}


def said(engine: RunningEngine, **fields: Any) -> Any:
    request = chat("tell me", 60, ignore_eos=True, return_token_ids=True)
    return engine.post(CHAT, request | fields).json()["choices"][0]["token_ids"]


def fault(engine: RunningEngine, **fields: Any) -> None:
    assert httpx.post(f"{engine.url}/faults", json=fields, trust_env=False).status_code == 201


def test_output_depends_on_nothing_but_the_tokens_before_it(simulated: StartSimulated) -> None:
    one = simulated(max_num_seqs=1, speed=50)
    other = simulated(block_size=8, max_num_batched_tokens=16, enable_prefix_caching=False, speed=50)
    assert said(one) == said(other) == said(one, temperature=1.5, seed=7)
    assert said(simulated(seed=1, speed=50)) != said(one)


def test_any_cut_continues_exactly(simulated: StartSimulated) -> None:
    engine = simulated(speed=100)
    tokenizer = Tokenizer(demo_model.tokenizer_dir())
    request = {"prompt": [5, 6, 7], "ignore_eos": True, "return_token_ids": True}
    whole = engine.post("/v1/completions", {**request, "max_tokens": 40}).json()["choices"][0]["token_ids"]
    text = tokenizer.decode(whole)
    assert "\ufffd" not in text.rstrip("\ufffd")
    for cut in range(1, 40):
        rest = {**request, "prompt": [5, 6, 7, *whole[:cut]], "max_tokens": 40 - cut}
        assert engine.post("/v1/completions", rest).json()["choices"][0]["token_ids"] == whole[cut:]


def test_a_stream_crosses_split_characters_whole(simulated: StartSimulated) -> None:
    engine = simulated(speed=100)
    request = chat("characters", 400, ignore_eos=True, return_token_ids=True, stream=True)
    events = [data["choices"][0] for _, data in events_of(engine.post(CHAT, request).text)[1:-1]]
    ids = [token for choice in events for token in choice["token_ids"]]
    text = "".join(choice["delta"].get("content", "") for choice in events)
    assert len(ids) == 400
    assert Tokenizer(demo_model.tokenizer_dir()).decode(ids).startswith(text)
    assert not text.isascii()
    assert any(choice["token_ids"] and choice["delta"] == {} for choice in events)  # inside a character
    assert "\ufffd" not in text


def test_outputs_end_by_themselves(simulated: StartSimulated) -> None:
    engine = simulated(speed=1000)
    choices = engine.post("/v1/completions", {"prompt": "x", "n": 8, "max_tokens": 5000}).json()["choices"]
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    assert len({choice["text"] for choice in choices}) == 8


def test_the_modelled_clock_is_kept(simulated: StartSimulated) -> None:
    engine = simulated(step_time="0.02,0,0,0")
    engine.post(CHAT, chat())
    began = time.monotonic()
    engine.post(CHAT, chat("a clock", 50, ignore_eos=True))
    assert time.monotonic() - began >= 1.0  # 50 steps of 20 ms; how much more is the machine's affair


def test_a_full_queue_refuses_and_a_free_one_accepts(simulated: StartSimulated) -> None:
    engine = simulated(max_num_queued_reqs=2)
    with (
        engine.client() as client,
        client.stream("POST", CHAT, json=chat("x", 4000, stream=True, n=2)) as reply,
    ):
        lines = reply.iter_lines()
        next(lines)
        refused = engine.post(CHAT, chat())
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "Service Unavailable")
        assert engine.metric("vllm:admission_rejections_total", reason="max_num_queued_reqs") == 1
    eventually(lambda: engine.post(CHAT, chat()).status_code == 200)


def test_sequences_wait_when_the_batch_is_full(simulated: StartSimulated) -> None:
    engine = simulated(max_num_seqs=1)
    with (
        engine.client() as client,
        client.stream("POST", CHAT, json=chat("x", 4000, stream=True, n=3)) as reply,
    ):
        lines = reply.iter_lines()
        next(lines)
        assert engine.metric("vllm:num_requests_running") == 1
        assert engine.metric("vllm:num_requests_waiting") == 2
        assert engine.metric("vllm:num_requests_waiting_by_reason", reason="capacity") == 2
        assert engine.metric("vllm:kv_cache_usage_perc") > 0


@pytest.mark.parametrize("status", [500, 429, 503])
def test_status_fault_refuses_so_many_requests(simulated: StartSimulated, status: int) -> None:
    engine = simulated(speed=50)
    fault(engine, kind="status", status=status, times=2)
    assert [engine.post(CHAT, chat()).status_code for _ in range(3)] == [status, status, 200]
    assert engine.get("/faults") == []


def test_error_event_fault_looks_like_a_dead_engine_core(simulated: StartSimulated) -> None:
    engine = simulated(speed=50)
    fault(engine, kind="error_event", after_chunks=3)
    reply = engine.post(CHAT, chat("x", 20, stream=True, ignore_eos=True))
    events = [data for _, data in events_of(reply.text)]
    assert reply.status_code == 200
    assert (len(events), events[-1]) == (5, "[DONE]")
    assert (events[-2]["error"]["type"], events[-2]["error"]["code"]) == ("InternalServerError", 500)
    eventually(lambda: engine.metric("vllm:num_requests_running") == 0)
    assert '"error"' not in engine.post(CHAT, chat("x", 20, stream=True, ignore_eos=True)).text


def test_error_event_in_anthropics_form(simulated: StartSimulated) -> None:
    engine = simulated(speed=50)
    fault(engine, kind="error_event", after_chunks=4)
    request = {"max_tokens": 20, "stream": True, "messages": [{"role": "user", "content": "x"}]}
    name, data = events_of(engine.post("/v1/messages", request).text)[-1]
    assert (name, data["error"]["type"]) == ("error", "internal_error")


def test_cut_fault_closes_the_connection_in_the_middle(simulated: StartSimulated) -> None:
    engine = simulated(speed=50)
    fault(engine, kind="cut", after_chunks=3)
    with pytest.raises(httpx.RemoteProtocolError):
        engine.post(CHAT, chat("x", 20, stream=True, ignore_eos=True))


def test_die_fault_ends_the_process_at_a_chunk(simulated: StartSimulated) -> None:
    engine = simulated(speed=50)
    fault(engine, kind="die", after_chunks=3)
    with pytest.raises(httpx.TransportError):
        engine.post(CHAT, chat("x", 20, stream=True, ignore_eos=True))
    assert engine.process.process.wait(5) == -signal.SIGKILL


def test_hang_fault_silences_everything_until_it_is_cleared(simulated: StartSimulated) -> None:
    engine = simulated(speed=50)
    with engine.client() as client, client.stream("POST", CHAT, json=chat("x", 50, stream=True)) as reply:
        lines = reply.iter_lines()
        next(lines)
        fault(engine, kind="hang")
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(f"{engine.url}/health", timeout=0.3, trust_env=False)
        assert engine.get("/faults")[0]["kind"] == "hang"
        assert httpx.delete(f"{engine.url}/faults", trust_env=False).status_code == 204
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert httpx.get(f"{engine.url}/health", trust_env=False).status_code == 200


def test_hang_fault_ends_by_itself(simulated: StartSimulated) -> None:
    engine = simulated(speed=50)
    began = time.monotonic()
    fault(engine, kind="hang", duration_s=0.5)
    assert engine.post(CHAT, chat()).status_code == 200
    assert time.monotonic() - began >= 0.5


def test_slow_fault_stretches_the_clock(simulated: StartSimulated) -> None:
    engine = simulated(step_time="0.005,0,0,0")

    def seconds() -> float:
        began = time.monotonic()
        engine.post(CHAT, chat("x", 20, ignore_eos=True))
        return time.monotonic() - began

    seconds()
    fault(engine, kind="slow", factor=8)
    assert seconds() >= 20 * 0.04


def test_lost_kv_events_leave_a_gap_that_replay_fills(simulated: StartSimulated) -> None:
    engine = simulated(speed=50)
    with engine.events() as events:
        engine.post(CHAT, chat("first " * 40, 1))
        eventually(events.poll)
        before = max(events.batches)
        fault(engine, kind="drop_kv_events", times=1)
        engine.post(CHAT, chat("second " * 40, 1))
        engine.post(CHAT, chat("third " * 40, 1))
        eventually(lambda: events.poll() and max(events.batches) > before)
        assert before + 1 not in events.batches
        assert before + 1 in events.replay(before + 1)


def test_blocks_on_the_cpu_are_told_with_their_tokens(simulated: StartSimulated) -> None:
    engine = simulated(
        speed=50, block_size=16, num_gpu_blocks_override=9, kv_offloading_size=0.01
    )  # 5 blocks

    def said(first: int) -> None:
        body = {"prompt": list(range(first, first + 65)), "max_tokens": 1, "cache_salt": "s"}
        engine.post("/v1/completions", body).raise_for_status()

    with engine.events() as events:

        def told(kind: str, medium: str) -> list[dict[str, Any]]:
            events.poll()
            return [event for event in events.all(kind) if event["medium"] == medium]

        said(0)
        eventually(lambda: len(told("BlockStored", "CPU")) == 4)
        (gpu,), cpu = told("BlockStored", "GPU"), told("BlockStored", "CPU")
        assert [hash for event in cpu for hash in event["block_hashes"]] == gpu["block_hashes"]
        assert [event["parent_block_hash"] for event in cpu] == [None, *gpu["block_hashes"][:3]]
        assert [event["token_ids"] for event in cpu] == [list(range(n, n + 16)) for n in range(0, 64, 16)]
        assert "extra_keys" in gpu
        assert not any("extra_keys" in event for event in cpu), "vLLM's connector leaves them out"
        said(100)
        eventually(lambda: len(told("BlockRemoved", "CPU")) == 3)
        removed = [event["block_hashes"] for event in told("BlockRemoved", "CPU")]
        assert removed == [[hash] for hash in gpu["block_hashes"][:0:-1]]


def rendered(engine: RunningEngine) -> list[int]:
    return engine.post("/tokenize", {"messages": chat()["messages"]}).json()["tokens"]


def test_a_chat_template_changes_prompts_by_flag_and_by_fault(
    simulated: StartSimulated, tmp_path: Path
) -> None:
    (tmp_path / "bare.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    engine = simulated(speed=50)
    usual = rendered(engine)
    bare = rendered(simulated(speed=50, chat_template=str(tmp_path / "bare.jinja")))
    plain = {"prompt": "hello", "add_special_tokens": False}
    assert bare == engine.post("/tokenize", plain).json()["tokens"]
    fault(engine, kind="template", times=2)
    assert rendered(engine)[-len(usual) :] == usual
    assert engine.post(CHAT, chat()).json()["usage"]["prompt_tokens"] > len(usual)
    assert rendered(engine) == usual


@pytest.mark.parametrize(
    "body", [{"kind": "explode"}, {"kind": "slow", "factor": 0}, {"kind": "hang", "after": 1}, {}]
)
def test_refuses_faults_that_do_not_exist(simulated: StartSimulated, body: dict[str, Any]) -> None:
    engine = simulated()
    assert httpx.post(f"{engine.url}/faults", json=body, trust_env=False).status_code == 400


def test_sigterm_lets_streams_finish_and_aborts_new_requests(simulated: StartSimulated) -> None:
    engine = simulated(step_time="0.02,0,0,0")
    with engine.client() as client, client.stream("POST", CHAT, json=chat("x", 100, stream=True)) as reply:
        lines = reply.iter_lines()
        next(lines)
        engine.process.process.terminate()
        eventually(lambda: engine.post(CHAT, chat()).json()["choices"][0]["finish_reason"] == "abort")
        assert httpx.get(f"{engine.url}/health", trust_env=False).status_code == 200
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2] or '"finish_reason":"stop"' in rest[-2]
    assert engine.process.process.wait(5) == 0


def raw(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workers.simulated", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "many"], "argument --port: invalid int value: 'many'"),
        (["--port", "0"], "--port must be between 1 and 65535, not 0"),
        (["--nope"], "unrecognized arguments: --nope"),
        (["--preset", "h100"], "argument --preset: invalid choice"),
        (["--step-time", "1,2"], "is not four to six durations"),
        (["--step-time", "0,0,0,0"], "a step must take some time"),
        (["--speed", "0"], "--speed must be above 0"),
        (["--block-size", "0"], "--block-size must be at least 1"),
        (["--kv-events-config", "{"], "argument --kv-events-config"),
        (["--kv-events-config", '{"nope": 1}'], "nope"),
        (["--max-model-len", "9000", "--num-gpu-blocks-override", "64"], "does not fit into the KV cache"),
        (["--model", "/nonexistent"], "holds no tokenizer.json"),
        (["--chat-template", "/nonexistent"], "chat template /nonexistent is no file"),
    ],
)
def test_a_bad_flag_ends_with_one_sentence(argv: list[str], message: str) -> None:
    done = raw(*argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("herd engine simulated: error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_a_model_it_serves_the_demo_model(start: Start) -> None:
    engine = simulated_engine(start)
    assert [model["id"] for model in get(f"{engine.url}/v1/models").json()["data"]] == [demo_model.NAME]


def test_a_key_guards_v1_only(start: Any) -> None:
    port = free_port()
    start(sys.executable, "-m", "workers.simulated", "--port", str(port), "--api-key", "secret")
    base = f"http://127.0.0.1:{port}"
    client = httpx.Client(base_url=base, trust_env=False)
    with client:
        eventually(lambda: client.get("/health").status_code == 200, tolerate=httpx.TransportError)
        refused = client.get("/v1/models")
        assert (refused.status_code, refused.json()) == (401, {"error": "Unauthorized"})
        allowed = client.get("/v1/models", headers={"authorization": "Bearer secret"})
        assert allowed.status_code == 200
        assert client.get("/kv_event_sources").json() == {}
        reply = client.post(
            "/v1/completions", json={"prompt": "x"}, headers={"authorization": "Bearer secret"}
        )
        # vLLM says nothing of cached tokens without --enable-prompt-tokens-details.
        assert reply.json()["usage"]["prompt_tokens_details"] is None


def test_aborted_at_sigterm_without_a_timeout(start: Any) -> None:
    port = free_port()
    process = start(sys.executable, "-m", "workers.simulated", "--port", str(port)).process
    base = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=base, trust_env=False) as client:
        eventually(lambda: client.get("/health").status_code == 200, tolerate=httpx.TransportError)
        with client.stream("POST", CHAT, json=chat("x", 4000, stream=True)) as reply:
            lines = reply.iter_lines()
            for _ in range(5):
                next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
    assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "abort"
    assert process.wait(5) == 0


def test_embeddings_are_unit_vectors_of_the_text(simulated: StartSimulated) -> None:
    engine = simulated()
    body = engine.post("/v1/embeddings", {"input": ["a", "b", "a"], "dimensions": 16}).json()
    vectors = [item["embedding"] for item in body["data"]]
    assert [len(vector) for vector in vectors] == [16, 16, 16]
    assert sum(value * value for value in vectors[0]) == pytest.approx(1)
    assert vectors[0] == vectors[2] != vectors[1]


SCORE_USAGE = (
    "usage:{prompt_tokens,total_tokens,completion_tokens,prompt_tokens_details,completion_tokens_details}"
)
# As vLLM 0.32 declares them (pooling/scoring/protocol.py, speech_to_text/transcription/protocol.py): the demo
# model of the contract tests is none that scores or hears.
SCORES = f"{{id,object,created,model,data:[{{index,object,score}}],{SCORE_USAGE}}}"
RANKING = (
    "{id,model,usage:{prompt_tokens,total_tokens},"
    "results:[{index,document:{text,multi_modal},relevance_score}]}"
)


@pytest.fixture(scope="module")
def sensible(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    """One engine that scores and hears."""
    with processes(tmp_path_factory.mktemp("sensible")) as start:
        yield start_engine(start, "simulated", {"speed": 100})


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize("sides", [("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents")])
def test_scores_say_how_alike_texts_are(sensible: RunningEngine, path: str, sides: tuple[str, str]) -> None:
    left, right = sides
    body = sensible.post(path, {left: "a cow", right: ["a cow", "a tractor"]}).json()
    assert shape(body) == SCORES
    same, other = (entry["score"] for entry in body["data"])
    assert same == pytest.approx(1)
    assert 0 <= other < 1


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_reranking_puts_the_likest_first(sensible: RunningEngine, path: str) -> None:
    documents = ["a tractor", "a cow", "a barn"]
    body = sensible.post(path, {"query": "a cow", "documents": documents}).json()
    assert shape(body) == RANKING
    scores = [result["relevance_score"] for result in body["results"]]
    assert scores == sorted(scores, reverse=True)
    assert documents[body["results"][0]["index"]] == "a cow"
    assert all(result["document"]["text"] == documents[result["index"]] for result in body["results"])
    top = sensible.post(path, {"query": "a cow", "documents": documents, "top_n": 1}).json()
    assert top["results"] == body["results"][:1]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"text_1": [], "text_2": "x"}, "At least one text element"),
        ({"text_1": "x", "text_2": []}, "At least one text_pair element"),
        ({"text_1": ["x", "y"], "text_2": ["x", "y", "z"]}, "1:1, 1:N or N:N"),
        ({"text_1": "x"}, "Field required"),
    ],
)
def test_refuses_texts_that_make_no_pairs(sensible: RunningEngine, body: dict[str, Any], told: str) -> None:
    reply = sensible.post("/score", body)
    assert reply.status_code == 400
    assert told in reply.json()["error"]["message"]


@pytest.mark.parametrize("task", ["transcription", "translation"])
def test_what_is_heard_depends_on_the_file(sensible: RunningEngine, task: str) -> None:
    sound = b"RIFF\r\n--" + bytes(range(256)) * 200

    def heard(file: bytes, **fields: str) -> httpx.Response:
        form = {"model": MODEL, **fields}
        with sensible.client() as client:
            return client.post(f"/v1/audio/{task}s", data=form, files={"file": ("a.wav", file)})

    body = heard(sound).json()
    assert shape(body) == "{text,usage:{type,seconds}}"
    assert body["usage"] == {"type": "duration", "seconds": 2}
    assert body["text"]
    assert heard(sound).json() == body
    assert heard(sound + b"!").json()["text"] != body["text"]

    events = events_of(heard(sound, stream="true").text)
    assert events.pop() == ("", "[DONE]")
    chunks = [data for _, data in events]
    assert {chunk["object"] for chunk in chunks} == {f"{task}.chunk"}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == body["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")

    assert heard(sound, model="nope").status_code == 404
    assert heard(sound, response_format="srt").status_code == 400


def test_hears_only_forms(sensible: RunningEngine) -> None:
    reply = sensible.post("/v1/audio/transcriptions", {"file": "x"})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "body.file"


def test_responses_follow_on_each_other(simulated: StartSimulated) -> None:
    engine = simulated(speed=50)
    first = engine.post("/v1/responses", {"input": "one", "max_output_tokens": 4}).json()
    second = {"input": "two", "max_output_tokens": 4, "previous_response_id": first["id"]}
    alone = engine.post("/v1/responses", {"input": "two", "max_output_tokens": 4}).json()
    assert (
        engine.post("/v1/responses", second).json()["usage"]["input_tokens"] > alone["usage"]["input_tokens"]
    )
    assert engine.get(f"/v1/responses/{first['id']}") == first


def test_response_format_is_obeyed(simulated: StartSimulated) -> None:
    engine = simulated(speed=50)
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "count": {"type": "integer", "minimum": 3, "maximum": 4},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2},
        },
        "required": ["name", "count", "tags"],
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    choice = engine.post(CHAT, chat("x", 200, response_format=form)).json()["choices"][0]
    value = json.loads(choice["message"]["content"])
    assert (choice["finish_reason"], value["count"] in (3, 4)) == ("stop", True)
    assert len(value["name"]) <= 5
    assert set(value["tags"]) <= {"a", "b"}
    assert len(value["tags"]) >= 2


def test_the_async_openai_client_reads_many_streams_at_once(simulated: StartSimulated) -> None:
    engine = simulated(speed=10)

    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"stream {number}"}],
            max_tokens=30,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def many() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, number % 8) for number in range(32)))

    texts = asyncio.run(many())
    assert len(set(texts)) == 8
    assert texts[:8] == texts[8:16]
