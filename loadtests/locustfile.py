"""Locust: users who chat over several turns and read their answers as a stream.

    locust -f loadtests/locustfile.py --host http://127.0.0.1:8000

Beside each request, which lasts until the stream ends, two more rows are reported: TTFT, until the first
content arrived, and TPOT, the mean time of each token after it. Both in milliseconds. A stream that does not
end in `[DONE]`, or tells an error, is a failure.
"""

from __future__ import annotations

import itertools
import random
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field

import gevent
import msgspec
from locust import FastHttpUser, events, task
from locust.argument_parser import LocustArgumentParser
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS, ResponseContextManager
from locust.env import Environment

from loadtests.scenarios import Chat, Shape

PATH = "/v1/chat/completions"


class Delta(msgspec.Struct):
    """What a chunk adds to the answer. A reasoning model thinks before it speaks; both are tokens."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Choice(msgspec.Struct):
    """One answer of possibly several; this user asks for one."""

    delta: Delta


class Usage(msgspec.Struct):
    """Tokens, as the engine counted them."""

    completion_tokens: int = 0


class Chunk(msgspec.Struct):
    """One event of a chat stream, as far as this user reads it."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: object = None


class BrokenStream(Exception):
    """The stream did not end as a whole answer does."""


decode = msgspec.json.Decoder(Chunk).decode


@dataclass(slots=True)
class Answer:
    """A stream as it arrived; times in seconds of `time.perf_counter`."""

    asked_at: float
    first_at: float | None = None
    last_at: float = 0.0
    tokens: int = 0
    parts: list[str] = field(default_factory=list)

    def read(self, events: Iterator[bytes]) -> None:
        """Reads to the end; raises BrokenStream if that is not `[DONE]`, or if an event tells an error."""
        done = False
        for data in events:
            done = done or data == b"[DONE]"
            if not done:
                self._take(decode(data))
        if not done:
            raise BrokenStream("the stream ended without [DONE]")

    def _take(self, chunk: Chunk) -> None:
        if chunk.error is not None:
            raise BrokenStream(f"error event: {chunk.error}")
        if chunk.usage is not None:
            self.tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            delta = choice.delta
            if delta.content or delta.reasoning_content or delta.reasoning:
                self.last_at = time.perf_counter()
                self.first_at = self.first_at or self.last_at
                self.parts.append(delta.content or "")

    @property
    def ttft_ms(self) -> float | None:
        """Time to first token; None if none came."""
        return None if self.first_at is None else (self.first_at - self.asked_at) * 1000

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per output token after the first; None for answers of less than two."""
        if self.first_at is None or self.tokens < 2:
            return None
        return (self.last_at - self.first_at) * 1000 / (self.tokens - 1)


def events_of(response: ResponseContextManager) -> Iterator[bytes]:
    """The data of each event as soon as its line is there (`iter_content` would wait to fill its chunk)."""
    while line := response.stream.readline(b"\n"):
        if line.startswith(b"data:"):
            yield line[5:].strip()


def refusal(response: ResponseContextManager) -> str:
    """Why there is no stream: what the server said, or what kept it from saying anything."""
    if response.status_code:
        return f"status {response.status_code}: {response.text}"
    return str(response.error)


@events.init_command_line_parser.add_listener
def add_arguments(parser: LocustArgumentParser) -> None:
    """Settings of this scenario; each also by environment, and in the web page."""
    shape = Shape()
    group = parser.add_argument_group("Herd's chat scenario")
    for flag, type_, default, text in (
        ("--model", str, "", "Model to ask; the first of /v1/models if not given"),
        ("--turns", int, shape.turns, "Questions per chat"),
        ("--system-tokens", int, shape.system, "Length of the system prompt that all chats share"),
        ("--prompt-tokens", int, shape.prompt, "Length of each question"),
        ("--output-tokens", int, shape.output, "Longest answer"),
        ("--think-time", float, 1.0, "Mean seconds between an answer and the next question"),
        ("--seed", str, "herd", "Decides every question of the run"),
    ):
        name = f"HERD_LOAD_{flag[2:].replace('-', '_').upper()}"
        group.add_argument(flag, type=type_, default=default, env_var=name, help=text)


def shape_of(options: Namespace) -> Shape:
    """The chats that the command line asks for; raises ValueError."""
    return Shape(options.turns, options.system_tokens, options.prompt_tokens, options.output_tokens)


@events.init.add_listener
def check_arguments(environment: Environment, **_: object) -> None:
    """Refuses a wrong setting before anything runs."""
    try:
        shape_of(environment.parsed_options)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


class ChatUser(FastHttpUser):
    """One person at a time: asks, reads, thinks, asks on; after the last turn begins a new chat."""

    # Waiting in line is what a load test measures, so no request is given up for it.
    network_timeout = 600.0
    _numbers = itertools.count()

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        options = environment.parsed_options
        self._shape = shape_of(options)
        # Locust's worker processes count their users each for itself.
        worker = getattr(environment.runner, "worker_index", 0)
        self._seed = f"{options.seed}/{worker}/{next(self._numbers)}"
        self._chats = itertools.count()
        self._chance = random.Random(self._seed)
        self._think_s = options.think_time
        self._model = options.model

    def wait_time(self) -> float:
        """Thinking: anything from half the mean to half above it, told by the seed as all else is."""
        return self._think_s * (0.5 + self._chance.random())

    def on_start(self) -> None:
        """Finds the model and begins the first chat; without a model the run is over, and failed."""
        if not self._model:
            with self.client.get("/v1/models", catch_response=True) as listing:
                models = listing.json()["data"] if listing.status_code == 200 else []
                if not models:
                    listing.failure(f"no model: {refusal(listing)}")
                    gevent.spawn(self.environment.runner.quit)
                    raise gevent.GreenletExit
                self._model = models[0]["id"]
        self._begin()

    def _begin(self) -> None:
        self._chat = Chat(self._shape, f"{self._seed}/{next(self._chats)}")

    @task
    def turn(self) -> None:
        """One question and its answer. A chat whose answer broke off is not gone on with."""
        answer = self._ask(self._chat.ask())
        if answer is not None:
            self._chat.answered("".join(answer.parts))
        if answer is None or self._chat.over:
            self._begin()

    def _ask(self, messages: list[dict[str, str]]) -> Answer | None:
        body = {
            "model": self._model,
            "messages": messages,
            "max_tokens": self._shape.output,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        answer = Answer(asked_at=time.perf_counter())
        with self.client.post(PATH, json=body, stream=True, catch_response=True) as response:
            if response.status_code != 200:
                response.failure(refusal(response))
                return None
            try:
                answer.read(events_of(response))
            except (BrokenStream, msgspec.DecodeError, *FAILURE_EXCEPTIONS) as error:
                response.failure(f"{type(error).__name__}: {error}")
                return None
            finally:
                # Locust took the time until the headers; the request lasts as long as its stream.
                response.request_meta["response_time"] = (time.perf_counter() - answer.asked_at) * 1000
        self._report("TTFT", answer.ttft_ms, answer)
        self._report("TPOT", answer.tpot_ms, answer)
        return answer

    def _report(self, row: str, milliseconds: float | None, answer: Answer) -> None:
        if milliseconds is not None:
            self.environment.events.request.fire(
                request_type=row,
                name=PATH,
                response_time=milliseconds,
                response_length=answer.tokens,
                exception=None,
                context={},
            )
