"""Mock engines for measuring routers: vLLM's wire and nothing behind it.

What `vllm serve` 0.32 writes, byte for byte (vllm/entrypoints/openai/chat_completion and uvicorn's chunks),
encoded once at the start, so that a router is busy long before its engines are. Every engine has one clock:
all its streams get their next event in the same step, as in continuous batching. Requests are searched for
the few fields that change the reply, not parsed. For an engine that behaves, see workers/simulated.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import click
import uvloop

MODEL = "mock"
PROMPT_IDS = tuple(range(1000, 1032))
WORDS = (" alpha", " beta", " gamma", " delta", " epsilon", " zeta", " eta", " theta")
STEP_S = 0.010

_ID = "chatcmpl-0123456789abcdef0123456789abcdef"
_CREATED = 1760000000
_FINGERPRINT = "vllm-0.32.0-0123abcd"
_HEAD = b"HTTP/1.1 %b\r\ndate: Thu, 09 Oct 2025 08:53:20 GMT\r\nserver: uvicorn\r\n"
_EVENTS_HEAD = (
    _HEAD % b"200 OK"
    + b"content-type: text/event-stream; charset=utf-8\r\n"
    + b"transfer-encoding: chunked\r\n\r\n"
)
_MODELS = (
    f'{{"object":"list","data":[{{"id":"{MODEL}","object":"model","created":{_CREATED},"owned_by":"vllm",'
    f'"root":"{MODEL}","parent":null,"max_model_len":32768,"permission":[]}}]}}'
)
_METRICS = """\
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="32",num_gpu_blocks="8192",engine="0"} 1.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="mock"} 0.0
"""


def text(chunks: int) -> str:
    """What every stream of so many chunks says."""
    return "".join(WORDS[n % len(WORDS)] for n in range(chunks))


def events(chunks: int, ids: bool, usage: bool) -> list[bytes]:
    """The body of one stream before it is chunked: a role, `chunks` tokens, usage if asked for, [DONE]."""
    out = [_role(ids), *(_token(n, ids) for n in range(chunks - 1)), _last_token(chunks - 1, ids, usage)]
    if usage:
        out.append(_event(f'"choices":[],"usage":{_usage(chunks)},"system_fingerprint":"{_FINGERPRINT}"'))
    return [*out, b"data: [DONE]\n\n"]


def completion() -> bytes:
    """The body of a reply that is not streamed: one token."""
    return (
        f'{{"id":"{_ID}","object":"chat.completion","created":{_CREATED},"model":"{MODEL}","choices":[{{"index":0,'
        f'"message":{{"role":"assistant","content":"{WORDS[0]}","refusal":null,"annotations":null,"audio":null,'
        '"function_call":null,"reasoning":null},"logprobs":null,"finish_reason":"length","stop_reason":null,'
        '"token_ids":null,"routed_experts":null}],"service_tier":null,'
        f'"system_fingerprint":"{_FINGERPRINT}","usage":{{"prompt_tokens":{len(PROMPT_IDS)},'
        f'"total_tokens":{len(PROMPT_IDS) + 1},"completion_tokens":1,'
        '"prompt_tokens_details":{"cached_tokens":0,"created_cache_tokens":null,"multimodal_tokens":null},"completion_tokens_details":null},'
        '"prompt_logprobs":null,"prompt_token_ids":null,"prompt_text":null,"kv_transfer_params":null,'
        '"ec_transfer_params":null,"metrics":null}'
    ).encode()


def _event(members: str) -> bytes:
    head = f'"id":"{_ID}","object":"chat.completion.chunk","created":{_CREATED},"model":"{MODEL}"'
    return f"data: {{{head},{members}}}\n\n".encode()


def _role(ids: bool) -> bytes:
    prompt = _array(PROMPT_IDS) if ids else "null"
    return _event(
        '"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],'
        f'"prompt_token_ids":{prompt},"prompt_text":null'
    )


def _token(n: int, ids: bool) -> bytes:
    return _event(f'"choices":[{{{_delta(n)},"finish_reason":null,{_token_ids(n, ids)}}}]')


def _last_token(n: int, ids: bool, usage: bool) -> bytes:
    finish = f'"finish_reason":"length","stop_reason":null,{_token_ids(n, ids)}'
    fingerprint = "" if usage else f',"system_fingerprint":"{_FINGERPRINT}"'
    return _event(f'"choices":[{{{_delta(n)},{finish}}}]{fingerprint}')


def _delta(n: int) -> str:
    return f'"index":0,"delta":{{"content":"{WORDS[n % len(WORDS)]}"}},"logprobs":null'


def _token_ids(n: int, ids: bool) -> str:
    return f'"token_ids":{_array((10000 + n,)) if ids else "null"}'


def _array(ids: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, ids))}]"


def _usage(completion_tokens: int) -> str:
    prompt_tokens = len(PROMPT_IDS)
    return (
        f'{{"prompt_tokens":{prompt_tokens},"total_tokens":{prompt_tokens + completion_tokens},'
        f'"completion_tokens":{completion_tokens},"prompt_tokens_details":{{"cached_tokens":0}}}}'
    )


@dataclass(frozen=True, slots=True)
class Replies:
    """Everything that an engine can answer, as bytes for the socket."""

    streams: dict[tuple[bool, bool], list[bytes]]  # by (token ids wanted, usage wanted): one write each
    whole: bytes
    gets: dict[bytes, bytes]
    unknown: bytes

    @classmethod
    def of(cls, chunks: int) -> Replies:
        """The replies of an engine whose streams have so many tokens."""
        return cls(
            streams={(i, u): _writes(events(chunks, i, u)) for i in (False, True) for u in (False, True)},
            whole=_plain(b"200 OK", b"application/json", completion()),
            gets={
                b"/v1/models": _plain(b"200 OK", b"application/json", _MODELS.encode()),
                b"/health": _plain(b"200 OK", None, b""),
                b"/metrics": _plain(b"200 OK", b"text/plain; version=0.0.4", _METRICS.encode()),
            },
            unknown=_plain(b"404 Not Found", b"application/json", b'{"detail":"Not Found"}'),
        )


def _writes(body: list[bytes]) -> list[bytes]:
    """Role and first token at once, then a token a step; the end follows the last token at once."""
    chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in body] + [b"0\r\n\r\n"]
    last = next(n for n, event in enumerate(body) if b'"finish_reason":"length"' in event)
    if last == 1:
        return [b"".join(chunks)]
    return [b"".join(chunks[:2]), *chunks[2:last], b"".join(chunks[last:])]


def _plain(status: bytes, content_type: bytes | None, body: bytes) -> bytes:
    kind = b"content-type: %b\r\n" % content_type if content_type else b""
    return _HEAD % status + b"content-length: %d\r\n" % len(body) + kind + b"\r\n" + body


class Engine:
    """One engine: a port, and a clock that steps while there are streams."""

    def __init__(self, replies: Replies) -> None:
        self.replies = replies
        self._loop = asyncio.get_running_loop()
        self._streams: set[Connection] = set()
        self._next_step = 0.0

    def add(self, stream: Connection) -> None:
        """A stream to be stepped from now on."""
        if not self._streams:
            self._next_step = self._loop.time() + STEP_S
            self._loop.call_at(self._next_step, self._step)
        self._streams.add(stream)

    def remove(self, stream: Connection) -> None:
        """A stream that has ended or was left by its client."""
        self._streams.discard(stream)

    def _step(self) -> None:
        for stream in tuple(self._streams):
            stream.step()
        if self._streams:
            # An engine that falls behind does not catch up: it steps later.
            self._next_step = max(self._next_step + STEP_S, self._loop.time())
            self._loop.call_at(self._next_step, self._step)


class Connection(asyncio.Protocol):
    """One connection to an engine: a request at a time, with `content-length`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._received = b""
        self._writes: list[bytes] = []
        self._at = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._engine.remove(self)

    def data_received(self, data: bytes) -> None:
        received = self._received + data if self._received else data
        end = received.find(b"\r\n\r\n")
        head, body = received[:end], received[end + 4 :]
        if end < 0 or len(body) < _content_length(head):
            self._received = received
            return
        self._received = b""
        self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        replies = self._engine.replies
        method, target, _ = head.split(b" ", 2)
        if method == b"GET":
            self._transport.write(replies.gets.get(target, replies.unknown))
        elif target != b"/v1/chat/completions":
            self._transport.write(replies.unknown)
        elif not _true(body, b'"stream"'):
            self._transport.write(replies.whole)
        else:
            self._stream(replies.streams[_true(body, b'"return_token_ids"'), _true(body, b'"include_usage"')])

    def _stream(self, writes: list[bytes]) -> None:
        # Starlette sends the head before the engine has a token: a packet of its own.
        self._transport.write(_EVENTS_HEAD)
        self._writes, self._at = writes, 0
        asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        if not self._transport.is_closing():
            self._engine.add(self)
            self.step()

    def step(self) -> None:
        """The next token goes out."""
        self._transport.write(self._writes[self._at])
        self._at += 1
        if self._at == len(self._writes):
            self._engine.remove(self)


def _content_length(head: bytes) -> int:
    name = b"\r\ncontent-length:"
    at = head.lower().find(name)
    return int(head[at + len(name) :].split(b"\r\n", 1)[0]) if at >= 0 else 0


def _true(body: bytes, key: bytes) -> bool:
    """Whether the JSON text has this key with `true` behind it, somewhere."""
    at = body.find(key)
    return at >= 0 and body[at + len(key) :].lstrip(b" :\n\t").startswith(b"true")


async def serve(engines: int, chunks: int, port: int) -> None:
    """Runs engines, tells their URLs on standard output, one a line, and stays."""
    loop = asyncio.get_running_loop()
    replies = Replies.of(chunks)
    for n in range(engines):
        engine = Engine(replies)
        own = port + n if port else 0
        server = await loop.create_server(lambda engine=engine: Connection(engine), "127.0.0.1", own)
        print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.Event().wait()


@click.command()
@click.option("--engines", default=4, show_default=True, help="How many, each on a port of its own.")
@click.option("--chunks", default=200, show_default=True, help="Tokens per stream, one a step of 10 ms.")
@click.option("--port", default=0, show_default=True, help="Of the first engine; 0: any free ones.")
def main(engines: int, chunks: int, port: int) -> None:
    """Serve mock vLLM engines on loopback until ended."""
    uvloop.run(serve(engines, chunks, port))


if __name__ == "__main__":
    main()
