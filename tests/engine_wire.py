"""A running engine as tests see it: its HTTP API, metrics and KV events, and the shape of what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import zmq
from support import Running, Start, eventually, free_port

from workers.engine import Address, EngineSpec, make_engine

MODEL = "herd-test"

# The first start of vLLM writes its bytecode.
START_TIMEOUT_S = 240


@dataclass(frozen=True, slots=True)
class RunningEngine:
    """An engine that answers, its process and its KV events."""

    kind: str
    url: str
    process: Running

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        with self.client() as client:
            return client.get(path).raise_for_status().json()

    def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        """The reply to a JSON body; `model` is filled in."""
        with self.client() as client:
            return client.post(path, json={"model": MODEL, **body}, **options)

    def client(self) -> httpx.Client:
        """A client of this engine."""
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def metric(self, name: str, **labels: str) -> float:
        """The value of one metric, summed over the series that bear these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = httpx.get(f"{self.url}/metrics", timeout=30, trust_env=False).text.splitlines()
        found = [
            line
            for line in lines
            if line.startswith((name + "{", name + " ")) and all(w in line for w in wanted)
        ]
        assert found, f"{name} {labels} is not in /metrics"
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def events(self) -> KVEvents:
        """Its KV events from the first one on."""
        source = self.get("/kv_event_sources")["0"]
        return KVEvents(source["endpoint"], source["replay_endpoint"])


class KVEvents:
    """What a subscriber sees that came late: the replay, then what follows."""

    def __init__(self, endpoint: str, replay_endpoint: str) -> None:
        self._context = zmq.Context()
        self._live = self._context.socket(zmq.SUB)
        self._live.connect(endpoint.replace("*", "127.0.0.1"))
        self._live.subscribe(b"")
        self._replay = self._context.socket(zmq.DEALER)
        self._replay.connect(replay_endpoint.replace("*", "127.0.0.1"))
        self.batches: dict[int, list[dict[str, Any]]] = {}

    def __enter__(self) -> KVEvents:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def replay(self, start: int = 0) -> list[int]:
        """Ask for everything from `start` on; the numbers that came, in order."""
        self._replay.send_multipart((b"", start.to_bytes(8, "big")))
        numbers = []
        while True:
            assert self._replay.poll(10_000), "the replay did not end"
            _, _, number, payload = self._replay.recv_multipart()
            if number == (-1).to_bytes(8, "big", signed=True):
                return numbers
            numbers.append(self._keep(number, payload))

    def poll(self) -> list[int]:
        """Take in what has been published; the numbers that came."""
        numbers = []
        while self._live.poll(20):
            _, number, payload = self._live.recv_multipart()
            numbers.append(self._keep(number, payload))
        return numbers

    def all(self, kind: str) -> list[dict[str, Any]]:
        """Every event of a kind, in order."""
        return [e for number in sorted(self.batches) for e in self.batches[number] if e["type"] == kind]

    def _keep(self, number: bytes, payload: bytes) -> int:
        _, events, rank = msgspec.msgpack.decode(payload)
        assert rank == 0
        index = int.from_bytes(number, "big")
        self.batches[index] = events
        return index


StartSimulated = Callable[..., RunningEngine]


def answering(process: Running, url: str, kind: str, timeout: float) -> RunningEngine:
    """The engine, once /health answers."""

    def healthy() -> bool:
        assert process.process.poll() is None, process.output[-4000:]
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200

    eventually(healthy, timeout, tolerate=httpx.TransportError)
    return RunningEngine(kind, url, process)


def start_engine(start: Start, kind: str, args: dict[str, Any], port: int | None = None) -> RunningEngine:
    """An engine of the demo model, started the way a replica starts it; on any free port if none is given."""
    store = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}  # the simulated engine always keeps responses
    engine = make_engine(EngineSpec(engine=kind, name=MODEL, source="demo", engine_args=args, env=store))
    address = Address("127.0.0.1", port or free_port())
    command = engine.command(address)
    process = start(*command.argv, env=command.env)
    return answering(process, address.url, kind, START_TIMEOUT_S if kind == "vllm" else 20)


def shape(value: object) -> str:
    """The keys of a JSON value in order, without what they hold: `{id,choices:[{index,text}],usage}`."""
    if isinstance(value, dict):
        return "{" + ",".join(key + _below(inner) for key, inner in value.items()) + "}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[" + shape(value[0]) + "]"
    return ""


def _below(value: object) -> str:
    inner = shape(value)
    return f":{inner}" if inner else ""


def events_of(text: str) -> list[tuple[str, Any]]:
    """The events of a stream: name and data, which is decoded unless it is [DONE]."""
    events = []
    for block in filter(None, text.split("\n\n")):
        lines = dict(line.split(": ", 1) for line in block.strip().split("\n"))
        data = lines["data"]
        events.append((lines.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return events
