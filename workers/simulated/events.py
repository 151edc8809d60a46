"""KV cache events over ZMQ, on vLLM's wire: a PUB socket, and a ROUTER socket that replays."""

import asyncio
import os
import socket
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from workers.simulated.kv_cache import CacheEvent, Cleared, Removed, Stored, Tier
from workers.simulated.language import TokenSequence

END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)

# One attention group: what vLLM says of a plain model.
GROUP = {"group_idx": 0, "kv_cache_spec_kind": "full_attention"}


class KVEventsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The value of --kv-events-config; names and defaults as vLLM's."""

    enable_kv_cache_events: bool = False
    publisher: str | None = None
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""

    def __post_init__(self) -> None:
        if self.publisher not in (None, "null", "zmq"):
            raise ValueError(f'publisher must be "zmq" or "null", not "{self.publisher}"')
        if self.buffer_steps < 1 or self.hwm < 0:
            raise ValueError("buffer_steps must be at least 1 and hwm at least 0")

    @property
    def publishes(self) -> bool:
        """Whether events leave the process."""
        return self.enable_kv_cache_events and self.publisher != "null"


class KVEventPublisher:
    """Sends one batch of events per engine step and keeps the last `buffer_steps` for replay."""

    def __init__(self, config: KVEventsConfig, block_size: int) -> None:
        self._block_size = block_size
        self._sequence = 0
        self._topic = config.topic.encode()
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=config.buffer_steps)
        self._context = zmq.asyncio.Context()
        # Not an asyncio socket: a PUB never blocks, so there is nothing to await.
        self._pub = zmq.Context(self._context).socket(zmq.PUB)
        self._pub.set_hwm(config.hwm)
        endpoint = _open(self._pub, config.endpoint)
        replay_endpoint = None
        self._router: zmq.asyncio.Socket | None = None
        if config.replay_endpoint is not None:
            self._router = self._context.socket(zmq.ROUTER)
            self._router.setsockopt(zmq.SNDHWM, 0)  # a whole buffer may go out at once
            replay_endpoint = _open(self._router, config.replay_endpoint)
        self.config = msgspec.structs.replace(
            config, publisher="zmq", endpoint=endpoint, replay_endpoint=replay_endpoint
        )

    def publish(self, events: Iterable[CacheEvent], *, lose: bool = False) -> None:
        """Announce what a step changed; a lost batch takes its number and can be replayed."""
        wire = [self._wire(event) for event in events]
        if not wire:
            return
        payload = msgspec.msgpack.encode([time.time(), wire, 0])
        number, self._sequence = self._sequence, self._sequence + 1
        self._buffer.append((number, payload))
        if not lose:
            self._pub.send_multipart((self._topic, number.to_bytes(8, "big"), payload))

    async def serve_replay(self) -> None:
        """Answer replay requests until cancelled; there is a replay endpoint."""
        router = self._router
        assert router is not None
        while True:
            frames = await router.recv_multipart()
            if len(frames) != 3:
                continue
            client, _, start = frames
            for number, payload in list(self._buffer):
                if number >= int.from_bytes(start, "big"):
                    await router.send_multipart(
                        (client, b"", self._topic, number.to_bytes(8, "big"), payload)
                    )
            await router.send_multipart((client, b"", b"", END_OF_REPLAY, b""))

    def close(self) -> None:
        """Send what is queued, for a second at most, and free the ports."""
        for endpoint in (self._pub, self._router):
            if endpoint is not None:
                endpoint.close(linger=1000)
        self._context.term()

    def _wire(self, event: CacheEvent) -> dict[str, Any]:
        """One event as vLLM's msgspec classes encode it: defaults are omitted where vLLM omits them."""
        match event:
            case Stored(owner=TokenSequence() as owner, first=first, count=count, tier=tier):
                # vLLM's offloading connector knows no extra keys.
                extra = owner.extra_keys(first, count) if tier is Tier.GPU else None
                return {
                    "type": "BlockStored",
                    "block_hashes": [wire_hash(owner.key(block)) for block in range(first, first + count)],
                    "parent_block_hash": wire_hash(owner.key(first - 1)) if first else None,
                    "token_ids": owner.block_tokens(first, count),
                    "block_size": self._block_size,
                    "lora_id": None,
                    "medium": tier,
                    "lora_name": None,
                    **({"extra_keys": extra} if extra else {}),
                    **GROUP,
                }
            case Removed(key=bytes() as key, tier=tier):
                return {
                    "type": "BlockRemoved",
                    "block_hashes": [wire_hash(key)],
                    "medium": tier,
                    "group_idx": 0,
                }
            case Cleared():
                return {"type": "AllBlocksCleared"}
        raise TypeError(f"{event} is not about token ids")


def wire_hash(key: bytes) -> int:
    """The low 64 bits of a block key: vLLM's form unless VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES is 0."""
    return int.from_bytes(key[-8:], "big")


def _open(endpoint: "zmq.Socket[Any]", address: str) -> str:
    """Bind wildcards and ipc, connect to the rest, as vLLM does; returns the address that resulted."""
    if not ("*" in address or "::" in address or address.startswith(("ipc://", "inproc://"))):
        endpoint.connect(address)
        return address
    if address != "tcp://*:0":
        endpoint.bind(address)
        return address
    endpoint.bind(f"tcp://{_node_ip()}:0")
    return endpoint.getsockopt_string(zmq.LAST_ENDPOINT)


def _node_ip() -> str:
    """The address others reach this machine by; no packet is sent to find it."""
    if ip := os.environ.get("VLLM_HOST_IP"):
        return ip
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 80))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def start_replay(publisher: KVEventPublisher) -> asyncio.Task[None]:
    """Serve replay requests in the background."""
    return asyncio.create_task(publisher.serve_replay(), name="kv event replay")
