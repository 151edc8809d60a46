"""Locust: one class of users per scenario of docs/loadtests.md.

    locust -f loadtests/locustfile.py --host http://127.0.0.1:8000                    chats, with a web page
    locust -f loadtests/locustfile.py --host http://127.0.0.1:8000 AgentUser RagUser
    locust -f loadtests/locustfile.py --host http://127.0.0.1:8000 RagUser --rate 5   an open loop

Beside each request, which lasts until the stream ends, two more rows are reported: TTFT, until the first
content arrived, and TPOT, the mean time of each token after it. Both in milliseconds. A stream that does not
end in `[DONE]`, or tells an error, is a failure. In an open loop LATE tells how much later than due sessions
began: all other times count from when they were due.
"""

from __future__ import annotations

import itertools
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import Field
from math import inf
from pathlib import Path
from typing import Any, ClassVar

import gevent
import msgspec
from gevent.event import Event
from gevent.pool import Group
from locust import FastHttpUser, events, task
from locust.argument_parser import LocustArgumentParser
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS, ResponseContextManager
from locust.env import Environment

from loadtests import arrivals
from loadtests.answer import Answer, BrokenStream
from loadtests.scenarios import SCENARIOS
from loadtests.scenarios.agent import Agent
from loadtests.scenarios.batch import Batch
from loadtests.scenarios.chat import Chat
from loadtests.scenarios.flash_crowd import FlashCrowd
from loadtests.scenarios.rag import Rag
from loadtests.scenarios.replay import Replay
from loadtests.scenarios.session import Ask, Fork, Scenario, Session
from loadtests.scenarios.tenants import Tenants
from router.errors import HerdError

PATH = "/v1/chat/completions"


class Unanswered(Exception):
    """The run was over, and the answer had not come."""


def row_of(ask: Ask) -> str:
    """The name of the rows that an answer is counted in."""
    return f"{PATH} {ask.tenant}" if ask.tenant else PATH


class BrokenSession(Exception):
    """An answer broke off, or there is no time for more; the session is not gone on with."""


class Refused(Exception):
    """There is no answer: what the server said, or what kept it from saying anything."""


def read(response: ResponseContextManager, answer: Answer, stream: bool) -> None:
    """Takes the answer in as it comes. Raises Refused, BrokenStream and what broken connections raise."""
    if response.status_code != 200:
        raise Refused(
            f"status {response.status_code}: {response.text}" if response.status_code else response.error
        )
    if stream:
        answer.read(events_of(response))
    else:
        answer.read_whole(response.content)


def events_of(response: ResponseContextManager) -> Iterator[bytes]:
    """The data of each event as soon as its line is there (`iter_content` would wait to fill its chunk)."""
    while line := response.stream.readline(b"\n"):
        if line.startswith(b"data:"):
            yield line[5:].strip()


@events.init_command_line_parser.add_listener
def add_arguments(parser: LocustArgumentParser) -> None:
    """Settings of all scenarios; each also by environment, and in the web page."""
    group = parser.add_argument_group("Herd's scenarios")

    def add(name: str, type_: type, default: object, text: str, **more: Any) -> None:
        flag, variable = f"--{name.replace('_', '-')}", f"HERD_LOAD_{name.upper()}"
        to = parser if more.get("is_secret") else group  # of groups Locust knows no secrets
        to.add_argument(flag, type=type_, default=default, env_var=variable, help=text, **more)

    add("model", str, "", "Model to ask; the first of /v1/models if not given")
    add("seed", str, "herd", "Decides every prompt and every moment of the run")
    add("api_key", str, "", "Sent with every request", is_secret=True)
    add("rate", float, None, "Sessions a second that each user begins, in an open loop; 0: in a closed one")
    add("arrivals", str, None, "How they begin in an open loop", choices=arrivals.KINDS)
    add("speed", float, 1.0, "With a trace's arrivals: so many times as fast")
    for name, meant in settings().items():
        texts = dict.fromkeys(f"{setting.metadata['help']} [{setting.default}]" for setting in meant)
        secret = {"is_secret": True} if name == "keys" else {}
        add(name, type(meant[0].default), None, "; ".join(texts), **secret)


def settings() -> dict[str, list[Field[Any]]]:
    """The settings of all scenarios by name; several may have one of the same name."""
    found: dict[str, list[Field[Any]]] = {}
    for setting in itertools.chain.from_iterable(scenario.settings() for scenario in SCENARIOS):
        found.setdefault(setting.name, []).append(setting)
    return found


@events.init.add_listener
def check_arguments(environment: Environment, **_: object) -> None:
    """Refuses a wrong setting before anything runs. Whoever names no users gets chats; who picks them in the
    web page gives their settings there.
    """
    # Imports took a second in which gevent's loop looked at no clock: --run-time would be shorter by that.
    gevent.get_hub().loop.update_now()
    options = environment.parsed_options
    if options.class_picker:
        return
    if not options.user_classes:
        environment.user_classes[:] = [ChatUser]
    try:
        for user_class in environment.user_classes:
            starts(user_class.scenario.of(options), options, "")
    except (ValueError, HerdError) as error:
        raise SystemExit(f"error: {error}") from None


def starts(scenario: Scenario, options: Namespace, seed: str) -> Iterator[tuple[float, Session]] | None:
    """When which session begins, for one user; None in a closed loop. Raises ValueError, TraceError."""
    load = scenario.load
    kind = options.arrivals or load.arrivals
    if kind == arrivals.TRACE:
        return scenario.starts(trace_moments(options, seed), seed)
    rate = load.rate if options.rate in (None, "") else float(options.rate)
    if rate < 0:
        raise ValueError(f"rate must be at least 0, not {rate}")
    pieces = scenario.rates(rate, options.run_time or load.duration)
    return scenario.starts(arrivals.moments(kind, pieces, seed), seed) if rate else None


def trace_moments(options: Namespace, seed: str) -> Iterable[float]:
    """When the requests of the trace came. Raises ValueError, TraceError."""
    if not options.trace or not options.speed > 0:
        raise ValueError("a trace's arrivals need --trace FILE, and a --speed above 0")
    return (arrival.at / options.speed for arrival in arrivals.traced(Path(options.trace), seed))


class ScenarioUser(FastHttpUser):
    """Holds the sessions of a scenario: in a closed loop the next begins when the last has ended, in an open
    loop one begins whenever it is due.
    """

    abstract = True
    scenario: ClassVar[type[Scenario]]

    # Waiting in line is what a load test measures, so no request is given up for it ...
    network_timeout = 600.0
    # ... and none waits here for a connection: so many at once no test has.
    concurrency = 100_000
    _numbers = itertools.count()
    _ending: ClassVar[bool] = False

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        options = environment.parsed_options
        self._scenario = self.scenario.of(options)
        # Locust's worker processes count their users each for itself.
        worker = getattr(environment.runner, "worker_index", 0)
        self._seed = f"{options.seed}/{worker}/{next(self._numbers)}"
        self._sessions = (self._scenario.session(f"{self._seed}/{n}") for n in itertools.count())
        self._starts = starts(self._scenario, options, self._seed)
        self._model = options.model
        self._keys = {"": options.api_key, **getattr(self._scenario, "key_of", {})}
        self._leaving, self._until = Event(), inf
        self._held = Group()

    def on_start(self) -> None:
        """Finds the model; without one the run is over, and failed."""
        if self._model:
            return
        with self.client.get("/v1/models", headers=self._headers(""), catch_response=True) as listing:
            models = listing.json()["data"] if listing.status_code == 200 else []
            if not models:
                told = listing.text if listing.status_code else listing.error
                listing.failure(f"no model: status {listing.status_code}: {told}")
                self._end_the_run()
                self._leaving.wait()
                raise gevent.GreenletExit
            self._model = models[0]["id"]

    def _end_the_run(self) -> None:
        """Once, however many users find that there is nothing to do."""
        if not ScenarioUser._ending:
            ScenarioUser._ending = True
            gevent.spawn(self.environment.runner.quit)

    def stop(self, force: bool = False) -> bool:
        """From now on nothing new is asked."""
        self._until = time.perf_counter()
        self._leaving.set()
        return super().stop(force)

    def on_stop(self) -> None:
        """What is still not answered never will be."""
        self._held.kill()

    @task
    def sessions(self) -> None:
        """One session after the other, or all of them as they are due."""
        if self._starts is None:
            self._hold(next(self._sessions))
        else:
            self._dispatch(self._starts)

    def _dispatch(self, starts: Iterable[tuple[float, Session]]) -> None:
        """Begins each session at its moment, until there are no more or the user has to leave."""
        began = time.perf_counter()
        for moment, session in starts:
            due = began + moment
            while (left := due - time.perf_counter()) > 0 and not self._leaving.wait(left):
                pass  # a timer of gevent's counts from its loop's last look at the clock: it may be early
            if due > self._until:  # what was due before is asked, however late this process is
                break
            self._held.spawn(self._hold, session, due)
        self._held.join()
        if not self._leaving.is_set():
            self._end_the_run()
            self._leaving.wait()

    def _hold(self, session: Session, due: float | None = None) -> None:
        """Asks all that a session asks, until it is over, an answer broke off, or the user has to leave."""
        said: str | None = None
        try:
            while True:
                step = session.send(said)
                said = self._fork(step) if isinstance(step, Fork) else self._turn(step, due)
                due = None
        except (StopIteration, BrokenSession):
            pass

    def _turn(self, ask: Ask, due: float | None) -> str:
        """One answer. A session that is due waits no more; any other first thinks."""
        if due is not None:
            self._report("LATE", row_of(ask), (time.perf_counter() - due) * 1000)
        elif self._leaving.wait(ask.after):
            raise BrokenSession
        return self._ask(ask, due or time.perf_counter()).text

    def _fork(self, fork: Fork) -> None:
        gevent.joinall([self._held.spawn(self._hold, branch) for branch in fork.branches])

    def _ask(self, ask: Ask, asked_at: float) -> Answer:
        """A whole answer; raises BrokenSession where there is none."""
        name, answer = row_of(ask), Answer(asked_at)
        try:
            self._post(ask, name, answer)
        except gevent.GreenletExit:
            # Who waits for answers at the end wants to know which of them did not come.
            if self.environment.stop_timeout:
                waited = (time.perf_counter() - asked_at) * 1000
                self._report("POST", name, waited, exception=Unanswered("not answered when the run was over"))
            raise
        self._report("TTFT", name, answer.ttft_ms, answer.usage.completion_tokens)
        self._report("TPOT", name, answer.tpot_ms, answer.usage.completion_tokens)
        return answer

    def _post(self, ask: Ask, name: str, answer: Answer) -> None:
        with self.client.post(
            PATH,
            name=name,
            json=self._body(ask),
            headers=self._headers(ask.tenant, ask.priority),
            stream=True,
            catch_response=True,
        ) as response:
            try:
                read(response, answer, ask.stream)
            except (Refused, BrokenStream, msgspec.DecodeError, *FAILURE_EXCEPTIONS) as error:
                response.failure(f"{type(error).__name__}: {error}")
                raise BrokenSession from None
            finally:
                # Locust took the time until the headers; the request lasts as long as its stream.
                response.request_meta["response_time"] = (time.perf_counter() - answer.asked_at) * 1000
                response.request_meta["response_length"] = answer.usage.completion_tokens
                response.request_meta["context"] = {"usage": answer.usage}

    def _body(self, ask: Ask) -> dict[str, Any]:
        streamed = {"stream": True, "stream_options": {"include_usage": True}} if ask.stream else {}
        tools = {"tools": ask.tools} if ask.tools else {}
        return {
            "model": self._model,
            "messages": ask.messages,
            "max_tokens": ask.output_tokens,
            **tools,
            **streamed,
        }

    def _headers(self, tenant: str, priority: int | None = None) -> dict[str, str]:
        key = self._keys.get(tenant) or self._keys[""]
        return {
            **({"authorization": f"Bearer {key}"} if key else {}),
            **({"x-herd-priority": str(priority)} if priority is not None else {}),
        }

    def _report(
        self,
        row: str,
        name: str,
        milliseconds: float | None,
        tokens: int = 0,
        exception: Exception | None = None,
    ) -> None:
        if milliseconds is not None:
            self.environment.events.request.fire(
                request_type=row,
                name=name,
                response_time=milliseconds,
                response_length=tokens,
                exception=exception,
                context={},
            )


class ChatUser(ScenarioUser):
    """A person who chats."""

    scenario = Chat


class AgentUser(ScenarioUser):
    """A program that calls tools."""

    scenario = Agent


class RagUser(ScenarioUser):
    """Asks about documents."""

    scenario = Rag


class BatchUser(ScenarioUser):
    """Has work done that nobody waits for."""

    scenario = Batch


class TenantsUser(ScenarioUser):
    """Asks for several tenants."""

    scenario = Tenants


class FlashCrowdUser(ScenarioUser):
    """A crowd that comes at once."""

    scenario = FlashCrowd


class TraceUser(ScenarioUser):
    """Replays a trace."""

    scenario = Replay
