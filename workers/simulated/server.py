"""The simulated engine's HTTP server: vLLM's routes over the engine in real time."""

import asyncio
import contextlib
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from workers.chat_messages import template_variables
from workers.chat_template import ChatTemplate
from workers.simulated import (
    audio,
    chat,
    completions,
    core,
    embeddings,
    errors,
    messages,
    options,
    requests,
    responses,
    scoring,
)
from workers.simulated.event_stream import Answer, EventStream, aborted_on_disconnect
from workers.simulated.events import KVEventPublisher, start_replay
from workers.simulated.faults import Fault, Faults
from workers.simulated.language import Language
from workers.simulated.live import GenerationAbortedError, LiveEngine
from workers.simulated.metrics import EngineMetrics
from workers.simulated.service import DONE, VLLM_VERSION, Service, named_event
from workers.tokenizer import Tokenizer, read_json

# vLLM's default (VLLM_HTTP_TIMEOUT_KEEP_ALIVE), seconds.
KEEP_ALIVE = 5

# What vLLM guards with --api-key.
GUARDED = ("/v1", "/v2", "/inference", "/cohere")

FAULTS_PATH = "/faults"

# What vLLM counts no requests of.
UNCOUNTED = frozenset({"/metrics", "/health", "/load", "/ping", "/version", FAULTS_PATH})


class Server:
    """One engine and its routes."""

    def __init__(self, chosen: options.Options) -> None:
        self._options = chosen
        name, root = _model(chosen.model)
        tokenizer = Tokenizer(root)
        template = ChatTemplate(root, str(chosen.chat_template) if chosen.chat_template else None)
        max_model_len = chosen.context(read_json(root / "config.json").get("max_position_embeddings"))
        names = chosen.served_model_name or (name,)
        engine = core.Engine(chosen.engine_config())
        self.faults = Faults()
        self.metrics = EngineMetrics(names[0], engine, max_model_len)
        self.metrics.cache_config(_cache_config(chosen))
        events = chosen.kv_events_config
        self.publisher = KVEventPublisher(events, chosen.block_size) if events.publishes else None
        self.live = LiveEngine(
            engine,
            Language(tokenizer, chosen.seed),
            self.metrics,
            self.faults,
            self.publisher,
            max_num_queued_reqs=chosen.max_num_queued_reqs,
        )
        self.service = Service(
            self.live,
            tokenizer,
            template,
            self.faults,
            served_names=names,
            model_root=str(root),
            max_model_len=max_model_len,
            prompt_tokens_details=chosen.enable_prompt_tokens_details,
        )
        self.store = responses.ResponseStore()

    def app(self) -> ASGIApp:
        """The ASGI application."""
        handlers = {
            errors.ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            GenerationAbortedError: _gone,
        }
        routes = list(self._routes())
        app = Starlette(routes=routes, exception_handlers=handlers)
        counted = _Counted(app, self.metrics, frozenset(route.path for route in routes))
        return _Gate(counted, self.faults, self._options.api_key)

    def _routes(self) -> Iterator[Route]:
        for path, post in (
            ("/v1/chat/completions", self._chat),
            ("/v1/completions", self._completions),
            ("/v1/responses", self._responses),
            ("/v1/messages", self._messages),
            ("/v1/messages/count_tokens", self._count_tokens),
            ("/v1/embeddings", self._embeddings),
            ("/score", self._score),
            ("/v1/score", self._score),
            ("/rerank", self._rerank),
            ("/v1/rerank", self._rerank),
            ("/v2/rerank", self._rerank),
            ("/v1/audio/transcriptions", self._transcriptions),
            ("/v1/audio/translations", self._translations),
            ("/tokenize", self._tokenize),
            ("/detokenize", self._detokenize),
            ("/reset_prefix_cache", self._reset_prefix_cache),
        ):
            yield Route(path, post, methods=["POST"])
        for path, get in (
            ("/v1/models", self._models),
            ("/v1/responses/{id}", self._stored_response),
            ("/health", self._health),
            ("/ping", self._health),
            ("/version", self._version),
            ("/load", self._load),
            ("/metrics", self._metrics),
            ("/kv_event_sources", self._kv_event_sources),
        ):
            yield Route(path, get, methods=["GET"])
        yield Route(FAULTS_PATH, self._list_faults, methods=["GET"])
        yield Route(FAULTS_PATH, self._set_fault, methods=["POST"])
        yield Route(FAULTS_PATH, self._clear_faults, methods=["DELETE"])

    async def _chat(self, request: Request) -> Response:
        body = await _parsed(requests.ChatRequest, request)
        self._refuse_by_fault()
        answer = await chat.start(self.service, body, request.headers.get("x-request-id"))
        return await self._answered(request, answer, body.stream, _openai_break)

    async def _completions(self, request: Request) -> Response:
        body = await _parsed(requests.CompletionRequest, request)
        self._refuse_by_fault()
        answer = await completions.start(self.service, body, request.headers.get("x-request-id"))
        return await self._answered(request, answer, body.stream, _openai_break)

    async def _responses(self, request: Request) -> Response:
        body = await _parsed(requests.ResponsesRequest, request)
        self._refuse_by_fault()
        answer = await responses.start(self.service, self.store, body)
        return await self._answered(request, answer, body.stream, None)

    async def _messages(self, request: Request) -> Response:
        body = await _parsed(requests.MessagesRequest, request)
        try:
            self._refuse_by_fault()
            answer = await messages.start(self.service, body, request.headers.get("x-request-id"))
            return await self._answered(request, answer, body.stream, _anthropic_break)
        except errors.ApiError as error:
            return _json(error.anthropic_body, error.status)

    async def _count_tokens(self, request: Request) -> Response:
        body = await _parsed(requests.CountTokensRequest, request)
        try:
            return _json(await messages.count_tokens(self.service, body))
        except errors.ApiError as error:
            return _json(error.anthropic_body, error.status)

    async def _embeddings(self, request: Request) -> Response:
        body = await _parsed(requests.EmbeddingsRequest, request)
        self._refuse_by_fault()
        return _json(await embeddings.answer(self.service, body))

    async def _score(self, request: Request) -> Response:
        body = await _parsed(requests.ScoreRequest, request)
        self._refuse_by_fault()
        return _json(await scoring.score(self.service, body, request.headers.get("x-request-id")))

    async def _rerank(self, request: Request) -> Response:
        body = await _parsed(requests.RerankRequest, request)
        self._refuse_by_fault()
        return _json(await scoring.rerank(self.service, body, request.headers.get("x-request-id")))

    async def _transcriptions(self, request: Request) -> Response:
        return await self._heard(request, "transcription")

    async def _translations(self, request: Request) -> Response:
        return await self._heard(request, "translation")

    async def _heard(self, request: Request, task: str) -> Response:
        fields = audio.form(request.headers.get("content-type", ""), await request.body())
        body = requests.validated(requests.TranscriptionRequest, fields)
        self._refuse_by_fault()
        answer = await audio.start(self.service, body, task, request.headers.get("x-request-id"))
        return await self._answered(request, answer, body.stream, _openai_break)

    async def _answered(
        self,
        request: Request,
        answer: Answer,
        stream: bool | None,
        broken: Callable[[errors.ApiError], bytes] | None,
    ) -> Response:
        if stream:
            return EventStream(answer, self.faults, broken)
        async with aborted_on_disconnect(request.receive, answer.generation):
            return _json(await answer.whole())

    def _refuse_by_fault(self) -> None:
        fault = self.faults.take("status")
        if fault is not None:
            status = HTTPStatus(fault.status)
            raise errors.ApiError("fault injected", status=status, type=status.phrase)

    async def _tokenize(self, request: Request) -> Response:
        body = await _parsed(requests.TokenizeRequest, request)
        self.service.check_model(body.model)
        ids = await self._tokens(body)
        tokenizer = self.service.tokenizer
        return _json(
            {
                "count": len(ids),
                "max_model_len": self.service.max_model_len,
                "tokens": ids,
                "token_strs": tokenizer.pieces(ids) if body.return_token_strs else None,
            }
        )

    async def _tokens(self, body: requests.TokenizeRequest) -> list[int]:
        if body.messages is None and body.prompt is None:
            raise errors.malformed(
                [{"type": "missing", "loc": ("prompt",), "msg": "Field required", "input": body.model_dump()}]
            )
        if body.messages is None:
            special = True if body.add_special_tokens is None else body.add_special_tokens
            return self.service.tokenizer.encode(body.prompt or "", add_special_tokens=special)
        return await self.service.chat_prompt(
            body.messages,
            requests.given(body.tools),
            add_special_tokens=bool(body.add_special_tokens),
            template=body.chat_template,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            variables=template_variables(body.chat_template_kwargs or {}),
        )

    async def _detokenize(self, request: Request) -> Response:
        body = await _parsed(requests.DetokenizeRequest, request)
        self.service.check_model(body.model)
        requests.check_vocabulary(body.tokens, self.service.tokenizer.vocab_size)
        return _json({"prompt": self.service.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    async def _reset_prefix_cache(self, request: Request) -> Response:
        external = request.query_params.get("reset_external") == "true"
        return _json({"success": self.live.core.reset_prefix_cache(external)})

    async def _models(self, _: Request) -> Response:
        return _json({"object": "list", "data": [self._model_card(n) for n in self.service.served_names]})

    def _model_card(self, name: str) -> dict[str, Any]:
        created = self.service.started
        permission = {
            "id": f"modelperm-{secrets.token_hex(8)}",
            "object": "model_permission",
            "created": created,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "vllm",
            "root": self.service.model_root,
            "parent": None,
            "max_model_len": self.service.max_model_len,
            "permission": [permission],
        }

    async def _stored_response(self, request: Request) -> Response:
        return _json(self.store.get(request.path_params["id"]).body)

    async def _health(self, _: Request) -> Response:
        return Response()

    async def _version(self, _: Request) -> Response:
        return _json({"version": VLLM_VERSION})

    async def _load(self, _: Request) -> Response:
        return _json({"server_load": self.live.core.num_running + self.live.core.num_waiting})

    async def _metrics(self, _: Request) -> Response:
        return Response(self.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _kv_event_sources(self, _: Request) -> Response:
        sources = {} if self.publisher is None else {"0": msgspec.structs.asdict(self.publisher.config)}
        return _json(sources)

    async def _list_faults(self, _: Request) -> Response:
        return _json(self.faults.list())

    async def _set_fault(self, request: Request) -> Response:
        try:
            fault = msgspec.json.decode(await request.body(), type=Fault)
        except msgspec.DecodeError as error:
            raise errors.ApiError(str(error)) from error
        self.faults.set(fault)
        return _json(fault, HTTPStatus.CREATED)

    async def _clear_faults(self, _: Request) -> Response:
        self.faults.clear()
        return Response(status_code=HTTPStatus.NO_CONTENT)


class _Gate:
    """What stands before every route: a hanging engine answers nothing, and /v1 may want a key."""

    def __init__(self, app: ASGIApp, faults: Faults, api_keys: Sequence[str]) -> None:
        self._app = app
        self._faults = faults
        self._keys = api_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != FAULTS_PATH:
            await self._faults.while_hanging()
            if self._keys and scope["path"].startswith(GUARDED) and not self._authorized(scope):
                refusal = _json({"error": "Unauthorized"}, HTTPStatus.UNAUTHORIZED)
                return await refusal(scope, receive, send)
        return await self._app(scope, receive, send)

    def _authorized(self, scope: Scope) -> bool:
        header = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        scheme, _, token = header.partition(" ")
        good = [secrets.compare_digest(token.encode(), key.encode()) for key in self._keys]
        return scheme.lower() == "bearer" and any(good)


class _Counted:
    """Counts requests as vLLM's instrumentator does: by path, where there is one, method and status."""

    def __init__(self, app: ASGIApp, metrics: EngineMetrics, paths: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNCOUNTED:
            return await self._app(scope, receive, send)
        status = int(HTTPStatus.INTERNAL_SERVER_ERROR)  # of a request that is cut before it has one

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            return await self._app(scope, receive, watched)
        finally:
            handler = scope["path"] if scope["path"] in self._paths else "none"
            self._metrics.http_requests.labels(handler, scope["method"], f"{status // 100}xx").inc()


async def _parsed(kind: type[requests.Parsed], request: Request) -> requests.Parsed:
    return requests.parse(kind, request.headers.get("content-type", ""), await request.body())


def _json(body: object, status: int = HTTPStatus.OK) -> Response:
    return Response(msgspec.json.encode(body), int(status), media_type="application/json")


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, errors.ApiError)
    return _json(error.body, error.status)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _json({"detail": error.detail}, error.status_code)
    response.headers.update(error.headers or {})
    return response


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def _openai_break(error: errors.ApiError) -> bytes:
    return error.event + DONE


def _anthropic_break(error: errors.ApiError) -> bytes:
    return named_event({"type": "error", "error": {"type": "internal_error", "message": error.message}})


def _cache_config(chosen: options.Options) -> dict[str, object]:
    """The labels of vllm:cache_config_info that mean something here."""
    blocks = chosen.num_gpu_blocks
    return {
        "block_size": chosen.block_size,
        "cache_dtype": "auto",
        "enable_prefix_caching": chosen.enable_prefix_caching,
        "gpu_memory_utilization": "0.92",
        "kv_cache_size_tokens": blocks * chosen.block_size,
        "num_cpu_blocks": None,
        "num_gpu_blocks": blocks,
        "num_gpu_blocks_override": chosen.num_gpu_blocks_override,
        "prefix_caching_hash_algo": "sha256",
        "sliding_window": None,
    }


def _model(given: Path | None) -> tuple[str, Path]:
    """What the model is called unless a flag says otherwise, as vLLM does it, and its directory."""
    if given is not None:
        return str(given), given
    # Here, not above: making the demo model needs numpy, which a server does without.
    from workers import demo_model

    return demo_model.NAME, demo_model.tokenizer_dir()


class _Http(uvicorn.Server):
    """Uvicorn, with its signals left to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no handlers."""
        yield


async def serve(chosen: options.Options) -> None:
    """Run one engine until SIGTERM or SIGINT, then drain it."""
    server = Server(chosen)
    http = _Http(
        uvicorn.Config(
            server.app(),
            host=chosen.host,
            port=chosen.port,
            http="httptools",
            loop="none",
            lifespan="off",
            access_log=False,
            proxy_headers=False,
            log_level="warning",
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=2,
        )
    )
    background = [asyncio.create_task(server.live.run(), name="engine")]
    if server.publisher is not None and server.publisher.config.replay_endpoint is not None:
        background.append(start_replay(server.publisher))

    async def stop() -> None:
        await server.live.drain(chosen.shutdown_timeout)
        http.should_exit = True

    stopping: list[asyncio.Task[None]] = []
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: stopping.append(asyncio.create_task(stop())))
    try:
        await _first_failure(http.serve(), background)
    finally:
        for task in background:
            task.cancel()
        if server.publisher is not None:
            server.publisher.close()


async def _first_failure(serving: Awaitable[None], background: Sequence[asyncio.Task[None]]) -> None:
    """Wait for the server to end; an engine task that fails ends it with its error."""
    main = asyncio.ensure_future(serving)
    await asyncio.wait([main, *background], return_when=asyncio.FIRST_COMPLETED)
    for task in background:
        if task.done():
            main.cancel()
            await task
    await main


def main(argv: Sequence[str]) -> None:
    """Run a simulated engine with these command-line arguments."""
    chosen = options.parse(argv)
    try:
        with asyncio.Runner(loop_factory=_new_loop) as runner:
            runner.run(serve(chosen))
    except ValueError as error:  # a model directory without a tokenizer, or options that do not fit the model
        print(f"{options.PROGRAM}: error: {error}", file=sys.stderr)
        sys.exit(2)


def _new_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()
