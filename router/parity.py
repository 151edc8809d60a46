"""How well the router knows the caches of its replicas, proven and watched beside the requests.

A replica is EXACT once a canary passed; one request in `SAMPLE_EVERY` is compared with the engine's own
tokens; every report of cached tokens is compared with its prediction. What contradicts costs the replica its
trust at once, and canaries bring it back. The rules are in router/core/trust.py.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import msgspec
from xxhash import xxh3_64_intdigest

from router.canary import Engine, Finding, compare_cache, compare_tokens, conversations
from router.core.blocks import Prompt
from router.core.fleet import Fleet, Flight, Replica, Trust
from router.core.trust import CURABLE, WINDOW, Doubt, Record, Response, Verdict, Window
from router.errors import EngineUnreachable
from router.health import Endpoint, learn
from router.http.sse import Usage
from router.metrics import Metrics
from router.openai_api import Call
from router.tokenizer import Tokenizers

log = logging.getLogger(__name__)

# Live requests of which one is compared with the engine's /tokenize.
SAMPLE_EVERY = 200
# Samples on their way at once, of all replicas: more are left out.
MAX_SAMPLES = 8
# Live requests that differed, kept for the canaries of their replica until it gets them right.
KEPT_SAMPLES = 4
# Canaries at once: a fleet that starts is proven without a rush on its engines.
MAX_CANARIES = 8
# How long a miss waits for the events that may explain it, in seconds.
SETTLE_S = 0.5
# For the parts of a request to an engine; a canary's first token has its own.
TIMEOUT_S = 10.0

# Prompt tokens found in the cache, and looked for there.
HITS, QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
# What can go wrong between the router and an engine's answer.
TROUBLE = (httpx.HTTPError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
MEANING = {
    Trust.EXACT: "exactly",
    Trust.APPROXIMATE: "only by what was sent there",
    Trust.LOAD: "not at all, requests go there by load",
}


@dataclass(slots=True)
class Silence:
    """What was sent to a replica that reports nothing, since its counters were read last; in tokens."""

    hits: int
    queries: int
    requests: int = 0
    predicted: int = 0
    prompts: int = 0
    removed: int = 0

    def window(self, hits: int, queries: int) -> Window:
        """All of it, with what the counters say now."""
        grown = (hits - self.hits, queries - self.queries)
        return Window(self.requests, self.predicted, self.prompts, *grown, self.removed)


@dataclass(slots=True, eq=False)
class Subject:
    """One replica under observation.

    `since`: when its verdict changed last; what was predicted before is not judged. `samples`: live requests
    of which its engine made other tokens.
    """

    replica: Replica
    record: Record = field(default_factory=Record)
    verdict: Verdict | None = None
    since: float = 0.0
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    samples: deque[Call] = field(default_factory=lambda: deque(maxlen=KEPT_SAMPLES))
    silence: Silence | None = None

    @property
    def id(self) -> str:
        return self.replica.id


class Parity:
    """Observes every replica. Its verbs return at once; what takes time happens in tasks of its own.

    `announce` tells everybody, Parity too, that another engine answers for a replica than before.
    """

    def __init__(
        self,
        fleet: Fleet,
        metrics: Metrics,
        tokenizers: Tokenizers,
        announce: Callable[[Replica], None],
    ) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._tokenizers = tokenizers
        self._announce = announce
        self._subjects: dict[str, Subject] = {}
        self._tasks: dict[str, set[asyncio.Task[object]]] = {}
        self._canaries = asyncio.Semaphore(MAX_CANARIES)
        self._samples = 0

    async def start(self) -> None:
        """Opens the client that engines are asked through."""
        self._client = httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False)

    async def stop(self) -> None:
        """Observes nothing any more."""
        tasks = [task for tasks in self._tasks.values() for task in tasks]
        for replica_id in list(self._subjects):
            self.left(replica_id)
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    # -- replicas come and go

    def joined(self, replica: Replica) -> None:
        """A replica joined the fleet, or is back: all is to be proven. The tokenizers follow it already."""
        subject = self._subjects.get(replica.id)
        if subject is None:
            subject = self._subjects[replica.id] = Subject(replica)
            self._spawn(subject, self._prove(subject))
        subject.record.complete = True  # its events are asked for from the first one on
        if self._tokenizers.lacking(replica.models[0]) is None:
            self._describe(subject, replica)
        else:
            self._spawn(subject, self._await_tokenizer(subject, replica))

    def left(self, replica_id: str) -> None:
        """A replica left the fleet: whatever is under way about it ends."""
        self._subjects.pop(replica_id, None)
        for task in self._tasks.pop(replica_id, ()):
            task.cancel()

    # -- what its events tell

    def restarted(self, replica_id: str) -> None:
        """Its events began anew: the engine is another than the one that was proven."""
        if (subject := self._subjects.get(replica_id)) is not None:
            subject.record.complete = True
            self._describe(subject, subject.replica)

    def doubted(self, replica_id: str, kind: Doubt, reason: str) -> None:
        """Its events contradict what is believed of it."""
        if (subject := self._subjects.get(replica_id)) is not None:
            self._doubt(subject, kind, reason)

    def removed(self, replica_id: str, keys: list[int]) -> None:
        """These blocks left its cache."""
        if (subject := self._subjects.get(replica_id)) is not None:
            subject.record.departures.note(keys, self._now())
            if subject.silence is not None:
                subject.silence.removed += len(keys) * subject.record.block_size

    # -- what requests tell

    def sampled(self, request_id: bytes, call: Call, replica_id: str, token_ids: bytes) -> None:
        """A request was sent whose tokens the router knows; some are compared with the engine's own."""
        subject = self._subjects.get(replica_id)
        if subject is None or xxh3_64_intdigest(request_id) % SAMPLE_EVERY or self._samples >= MAX_SAMPLES:
            return
        self._samples += 1
        self._spawn(subject, self._sample(subject, call, token_ids)).add_done_callback(self._sample_ended)

    def reported(self, flight: Flight, prompt: Prompt | None, usage: Usage) -> None:
        """A request ended that was placed by what is cached; its engine reported its usage."""
        subject, standing = self._subjects.get(flight.standing.id), flight.standing
        if subject is None or prompt is None or standing.trust is Trust.LOAD:
            return
        if flight.started_at < subject.since or (standing.key_blocks and prompt.token_ids is None):
            return
        if standing.takes_ids and usage.prompt_tokens not in (0, prompt.num_tokens):
            counts = f"{usage.prompt_tokens} tokens of a prompt, the router {prompt.num_tokens}"
            self._doubt(subject, Doubt.TOKENS_DIFFER, f"its engine counted {counts}")
            return
        predicted = flight.cached.known
        if not subject.record.reports:
            self._unreported(subject, predicted, usage.prompt_tokens)
            return
        self._count(subject, predicted, usage.cached_tokens)
        response = Response(predicted, usage.cached_tokens, [], flight.started_at, flight.confirmed)
        if abs(predicted - usage.cached_tokens) <= subject.record.block_size:
            self._judge(subject, response)
        else:
            asyncio.get_running_loop().call_later(SETTLE_S, self._judge_miss, subject, response, prompt)

    def _count(self, subject: Subject, predicted: int, reported: int) -> None:
        metrics = self._metrics.of(subject.replica.models[0])
        metrics.predictions.inc()
        metrics.predicted_cached.inc(predicted)
        metrics.reported_cached.inc(reported)

    def _judge_miss(self, subject: Subject, response: Response, prompt: Prompt) -> None:
        """Now that the events of its time have come."""
        self._look_for_holes(subject)
        if self._subjects.get(subject.id) is subject and response.placed_at >= subject.since:
            keys = prompt.keys(subject.record.block_size)
            self._judge(subject, response._replace(keys=keys, held=self._held(subject, prompt)))

    def _look_for_holes(self, subject: Subject) -> None:
        """Whether the index lacks what the replica told of, or the replica told of less than it has."""
        standing, record = self._fleet.get(subject.id), subject.record
        if standing is None or not record.complete:
            return
        source = self._fleet.index.source(standing.bit)
        if self._fleet.index.dropped or source.unkeyed:
            record.complete = False
        elif source.orphans:
            self._doubt(
                subject,
                Doubt.EVENTS_LOST,
                "its KV events tell of blocks behind others that they never told of",
            )

    def _judge(self, subject: Subject, response: Response) -> None:
        doubts = subject.record.doubts
        cause = subject.record.judge(response)
        if cause is not None:
            self._metrics.of(subject.replica.models[0]).misses[cause].inc()
        if subject.record.doubts != doubts:
            self._settle(subject)

    def _held(self, subject: Subject, prompt: Prompt) -> int:
        standing, size = self._fleet.get(subject.id), subject.record.block_size
        if standing is None or not size:
            return 0
        return self._fleet.index.told(prompt.keys(size), standing.bit) * size

    # -- engines that report nothing

    def _unreported(self, subject: Subject, predicted: int, num_tokens: int) -> None:
        silence = subject.silence
        if silence is None:
            return
        silence.requests += 1
        silence.predicted += predicted
        silence.prompts += num_tokens
        standing = self._fleet.get(subject.id)
        # Requests under way are in the counters and not in what was reported.
        if standing is not None and silence.requests >= max(WINDOW, 10 * standing.in_flight):
            subject.silence = None
            self._spawn(subject, self._listen(subject, silence))

    async def _listen(self, subject: Subject, before: Silence | None) -> None:
        """Reads the counters of an engine that reports nothing, and compares them with what was predicted."""
        try:
            text = (await self._client.get(f"{subject.replica.url}/metrics")).raise_for_status().text
        except httpx.HTTPError as error:
            log.info("replica %s: its counters cannot be read: %s", subject.id, said(error))
            return
        hits, queries = counter(text, HITS), counter(text, QUERIES)
        subject.silence = Silence(hits, queries)
        if before is not None:
            subject.record.counted(before.window(hits, queries))
            self._settle(subject)

    # -- samples

    async def _sample(self, subject: Subject, call: Call, token_ids: bytes) -> None:
        """Compares the tokens of one live request; if they differ, at the model's other replicas as well."""
        if not await self._differs(subject, call, token_ids):
            return
        for other in list(self._subjects.values()):
            if other is not subject and call.model in other.replica.models and _takes_ids(other):
                self._spawn(other, self._differs(other, call, token_ids))

    async def _differs(self, subject: Subject, call: Call, token_ids: bytes) -> bool:
        try:
            finding = await compare_tokens(Engine(self._client, subject.replica), call, token_ids)
        except TROUBLE as error:
            log.info("replica %s: a sample could not be compared: %s", subject.id, said(error))
            return False
        if finding is None or finding.kind is not Doubt.TOKENS_DIFFER:
            return False
        subject.samples.append(call)
        self._doubt(subject, finding.kind, f"a live request: {finding.reason}")
        return True

    def _sample_ended(self, _: object) -> None:
        self._samples -= 1

    # -- canaries

    async def _await_tokenizer(self, subject: Subject, replica: Replica) -> None:
        """Begins when the model's tokenizer has been loaded, or could not be."""
        await self._tokenizers.settled()
        self._describe(subject, replica)

    async def _prove(self, subject: Subject) -> None:
        """Sends canaries, once the replica is described, for as long as they can change something."""
        await subject.woken.wait()
        while True:
            subject.woken.clear()
            try:
                async with asyncio.timeout(subject.record.retry_s):
                    await subject.woken.wait()
            except TimeoutError:
                async with self._canaries:
                    await self._canary(subject)

    async def _canary(self, subject: Subject) -> None:
        try:
            await self._learn(subject)
            doubts = subject.record.doubts
            finding = await self._compare(subject)
        except EngineUnreachable as error:
            doubts, finding = subject.record.doubts, Finding(Doubt.UNPROVEN, str(error))
        except TROUBLE as error:
            doubts = subject.record.doubts
            finding = Finding(Doubt.UNPROVEN, f"its canary could not be completed: {said(error)}")
        if subject.record.doubts != doubts:
            return  # something else contradicted meanwhile
        if finding is not None:
            subject.record.canary_failed(*finding)
        else:
            subject.record.canary_passed()
            if subject.record.retry_s is None:
                subject.samples.clear()
        self._settle(subject)

    async def _learn(self, subject: Subject) -> None:
        """Asks the engine what it is: another may answer at the URL than before."""
        known = subject.replica
        replica = await learn(self._client, Endpoint(known.id, known.url, known.engine))
        if replica != known:
            self._fleet.joined(replica, self._now())
            self._announce(replica)

    async def _compare(self, subject: Subject) -> Finding | None:
        """What a canary finds that another one may find mended; what the engine lacks is noted."""
        for compare in (self._compare_tokens, self._compare_cache):
            finding = await compare(subject)
            if finding is None:
                continue
            if finding.kind in CURABLE:
                return finding
            subject.record.doubt(*finding)
        return None

    async def _compare_tokens(self, subject: Subject) -> Finding | None:
        engine = Engine(self._client, subject.replica)
        for name, call in [*conversations(engine.model), *(("a live request", c) for c in subject.samples)]:
            prompt = await self._tokenizers.prompt(call)
            if prompt.token_ids is None:
                continue  # the router sends text for these, so nobody relies on its tokens
            finding = await compare_tokens(engine, call, prompt.token_ids)
            if finding is not None and finding.kind in CURABLE:
                return finding._replace(reason=f"{name}: {finding.reason}")
            if finding is not None:
                return finding
        return None

    async def _compare_cache(self, subject: Subject) -> Finding | None:
        if not subject.replica.prefix_caching:
            return None
        engine, record = Engine(self._client, subject.replica), subject.record
        held = None if record.limited else partial(self._held, subject)
        found = await compare_cache(engine, self._tokenizers.prompt, held, secrets.token_hex(8))
        if isinstance(found, Finding):
            return found
        record.reports = found
        if not found and subject.silence is None:
            await self._listen(subject, None)
        return None

    # -- what follows

    def _describe(self, subject: Subject, replica: Replica) -> None:
        subject.replica = replica
        subject.silence = None
        subject.record.described(replica, self._tokenizers.lacking(replica.models[0]))
        self._settle(subject)
        subject.woken.set()

    def _doubt(self, subject: Subject, kind: Doubt, reason: str) -> None:
        subject.record.doubt(kind, reason)
        self._settle(subject)

    def _settle(self, subject: Subject) -> None:
        """Tells the fleet, the log and the metrics of a verdict that changed."""
        before, verdict = subject.verdict, subject.record.verdict
        if verdict == before or self._fleet.get(subject.id) is None:
            return
        subject.verdict = verdict
        self._fleet.trusted(subject.id, verdict.trust, verdict.reason, verdict.key_blocks, verdict.takes_ids)
        if before is not None and (verdict.trust, verdict.kind) == (before.trust, before.kind):
            return
        subject.since = self._now()
        subject.woken.set()
        self._metrics.of(subject.replica.models[0]).trust_changes[verdict.kind].inc()
        level = logging.INFO if verdict.kind in (None, Doubt.UNPROVEN) else logging.WARNING
        log.log(
            level, "replica %s: its cache is known %s: %s", subject.id, MEANING[verdict.trust], verdict.reason
        )

    # -- tasks

    def _spawn(self, subject: Subject, work: Coroutine[Any, Any, object]) -> asyncio.Task[object]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.setdefault(subject.id, set()).add(task)
        task.add_done_callback(partial(self._ended, subject.id))
        return task

    def _ended(self, replica_id: str, task: asyncio.Task[object]) -> None:
        self._tasks.get(replica_id, set()).discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("replica %s: %s", replica_id, error, exc_info=error)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _takes_ids(subject: Subject) -> bool:
    return subject.verdict is not None and subject.verdict.takes_ids


def said(error: Exception) -> str:
    """What an error says; some of httpx' say nothing."""
    return str(error) or type(error).__name__


def counter(metrics: str, name: str) -> int:
    """A counter in an engine's metrics, over all its series."""
    found = re.findall(rf"^{name}(?:\{{[^}}\n]*\}})? ([0-9.e+]+)$", metrics, re.MULTILINE)
    return int(sum(map(float, found)))
