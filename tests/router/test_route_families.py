"""All families through `herd route`: real processes, the openai client, streams that break on sockets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from engine_wire import events_of
from support import Server, Start, get, processes, router, simulated_engine, states

LLAMA, WHISPER = "llama-8b", "whisper-large"
ALIASES = ("--model-alias", f"gpt-4o={LLAMA}", "--model-alias", f"whisper-1={WHISPER}")
SOUND = ("a.wav", b"RIFF" + bytes(60_000))
HELLO: Any = [{"role": "user", "content": "hello"}]


@dataclass(frozen=True)
class Fleet:
    """Two engines of one model and one of another behind `herd route`."""

    router: Server
    llamas: tuple[Server, Server]
    whisper: Server

    @classmethod
    def up(cls, start: Start) -> Fleet:
        def serving(model: str) -> Server:
            return simulated_engine(start, "--served-model-name", model, "--speed", "20")

        llamas, whisper = (serving(LLAMA), serving(LLAMA)), serving(WHISPER)
        return cls(router(start, *llamas, whisper, flags=ALIASES), llamas, whisper)

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.router.url}/v1", api_key="none", max_retries=0)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.router.url}{path}", json={"model": "gpt-4o", **body}, trust_env=False)

    def metric(self, name: str, **labels: str) -> float:
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = get(f"{self.router.admin}/metrics").text.splitlines()
        found = [line for line in lines if line.startswith(f"{name}{{") and all(w in line for w in wanted)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with processes(tmp_path_factory.mktemp("fleet")) as start:
        yield Fleet.up(start)


@pytest.fixture(params=["cut", "error_event"])
def broken(fleet: Fleet, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """The fleet whose engines break off their next stream: the connection, or as vLLM does when it dies."""
    engines = (*fleet.llamas, fleet.whisper)
    for engine in engines:
        fault = {"kind": request.param, "after_chunks": 4}
        assert httpx.post(f"{engine.url}/faults", json=fault, trust_env=False).status_code == 201
    yield fleet
    for engine in engines:
        httpx.delete(f"{engine.url}/faults", trust_env=False)


def test_the_openai_client_gets_what_it_asks_of_every_model(fleet: Fleet) -> None:
    with fleet.openai() as client:
        listed = {model.id: model.to_dict().get("root") for model in client.models.list()}
        assert listed == {"gpt-4o": LLAMA, LLAMA: None, "whisper-1": WHISPER, WHISPER: None}
        for model in ("gpt-4o", LLAMA):
            chat = client.chat.completions.create(model=model, messages=HELLO, max_tokens=4)
            assert chat.model == LLAMA
        assert client.completions.create(model="gpt-4o", prompt="hello", max_tokens=4).usage
        assert len(client.embeddings.create(model="gpt-4o", input=["a", "b"]).data) == 2
        heard = client.audio.transcriptions.create(model="whisper-1", file=SOUND)
        assert heard.text == client.audio.transcriptions.create(model=WHISPER, file=SOUND).text
        pieces = client.audio.transcriptions.create(model="whisper-1", file=SOUND, stream=True)
        texts = [piece.to_dict()["choices"][0]["delta"]["content"] for piece in pieces]
        assert "".join(texts) == heard.text
        with pytest.raises(openai.NotFoundError, match=f"this fleet serves gpt-4o, {LLAMA}, whisper-1"):
            client.chat.completions.create(model="gpt-5", messages=HELLO)
    counted = {"model": WHISPER, "path": "/v1/audio/transcriptions", "code": "200"}
    assert fleet.metric("herd_requests_total", **counted) == 3


@pytest.mark.parametrize(
    ("path", "body", "has"),
    [
        ("/rerank", {"query": "a", "documents": ["a", "b"]}, "results"),
        ("/v2/rerank", {"query": "a", "documents": ["a", "b"]}, "results"),
        ("/score", {"text_1": "a", "text_2": "b"}, "data"),
        ("/tokenize", {"prompt": "a b"}, "tokens"),
        ("/detokenize", {"tokens": [5, 6]}, "prompt"),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 4}, "content"),
        ("/v1/messages/count_tokens", {"messages": HELLO}, "input_tokens"),
    ],
)
def test_the_other_families_are_relayed(fleet: Fleet, path: str, body: dict[str, Any], has: str) -> None:
    reply = fleet.post(path, **body)
    assert reply.status_code == 200
    assert reply.json()[has]


def test_what_an_engine_does_not_know_it_says_itself(fleet: Fleet) -> None:
    reply = fleet.post("/v1/images/generations", prompt="a cow")
    assert (reply.status_code, reply.json()) == (404, {"detail": "Not Found"})


def test_a_conversation_stays_with_the_replica_that_keeps_it(fleet: Fleet) -> None:
    with fleet.openai() as client:

        def say(text: str, **more: Any) -> Any:
            return client.responses.create(model="gpt-4o", input=text, max_output_tokens=4, **more)

        heads = [say("one") for _ in range(6)]
        assert len({head.id.split("_")[2] for head in heads}) == 2  # both replicas were given some
        for head in heads:
            following = say("two", previous_response_id=head.id)
            assert following.previous_response_id == head.id
            assert following.usage.input_tokens > head.usage.input_tokens
            assert client.responses.retrieve(following.id).id == following.id
        last = list(say("three", previous_response_id=heads[0].id, stream=True))[-1]
        assert last.type == "response.completed"
        assert client.responses.retrieve(last.response.id).id == last.response.id
        assert say("mine", extra_body={"request_id": "my-own"}).id == "my-own"
        for _ in range(3):
            say("and mine", previous_response_id="my-own")
        with pytest.raises(openai.NotFoundError, match="No replica is known to keep"):
            client.responses.retrieve("nobodys")


def test_a_broken_response_is_a_failed_response(broken: Fleet) -> None:
    """The simulated engine breaks it as vLLM does, whichever way: it closes the connection."""
    with broken.openai() as client:
        events = list(client.responses.create(model="gpt-4o", input="x", max_output_tokens=40, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    begun, failed = events[0], events[-1]
    assert (begun.type, failed.type) == ("response.created", "response.failed")
    assert (failed.response.id, failed.response.status) == (begun.response.id, "failed")
    assert (failed.response.error.code, failed.response.model) == ("server_error", LLAMA)


def test_a_broken_message_ends_in_an_error(broken: Fleet) -> None:
    before = broken.metric("herd_streams_truncated_total", model=LLAMA)
    events = events_of(broken.post("/v1/messages", messages=HELLO, max_tokens=40, stream=True).text)
    names = [name for name, _ in events]
    assert (names[0], names[-1]) == ("message_start", "error")
    assert "message_stop" not in names
    said = events[-1][1]
    assert said["type"] == "error"
    assert said["error"]["message"]
    assert broken.metric("herd_streams_truncated_total", model=LLAMA) == before + 1


def test_a_broken_transcription_raises(broken: Fleet) -> None:
    with broken.openai() as client, pytest.raises(openai.APIError, match=r"broke off|EngineCore"):
        list(client.audio.transcriptions.create(model="whisper-1", file=SOUND, stream=True))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"messages": HELLO, "max_tokens": 5}),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 5}),
    ],
)
def test_tokens_are_counted(fleet: Fleet, path: str, body: dict[str, Any], stream: bool) -> None:
    def counts() -> list[float]:
        return [fleet.metric(f"herd_{kind}_tokens_total", model=LLAMA) for kind in ("prompt", "output")]

    before = counts()
    assert fleet.post(path, **body, stream=stream).status_code == 200
    prompt, output = (now - then for now, then in zip(counts(), before, strict=True))
    assert (prompt > 5, output) == (True, 5)


def test_a_kept_response_is_waited_for_while_its_replica_is_down(start: Start) -> None:
    fleet = Fleet.up(start)
    with fleet.openai() as client:
        heads = [client.responses.create(model=LLAMA, input="one", max_output_tokens=4) for _ in range(4)]
    dead, alive = fleet.llamas
    dead.running.kill()
    followed = [
        fleet.post("/v1/responses", input="two", previous_response_id=head.id, max_output_tokens=4)
        for head in heads
    ]
    assert sorted(reply.status_code for reply in followed) == [200, 200, 503, 503]
    refused = [reply for reply in followed if reply.status_code == 503]
    assert all(reply.headers["retry-after"] == "1" for reply in refused)
    assert all("keeps the response" in reply.json()["error"]["message"] for reply in refused)
    assert states(fleet.router) == {dead.url: "down", alive.url: "ready", fleet.whisper.url: "ready"}
