"""Faults on request: an engine that dies, hangs, refuses, breaks off or slows down when it is told to."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec

Kind = Literal["die", "hang", "status", "error_event", "cut", "slow", "drop_kv_events", "template"]


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One fault. What it does, by kind:

    die: kill the process, as SIGKILL does. hang: answer nothing, /health included. status: refuse
    generation requests. error_event: end a stream as vLLM does when its engine core dies. cut: close the
    connection in the middle of a stream. slow: stretch every step. drop_kv_events: lose batches of KV
    events on the wire (they can be replayed). template: render chats as another chat template would.
    """

    kind: Kind
    status: Literal[500, 429, 503] = 500
    factor: float = 4.0
    """slow: how many times longer a step takes."""
    after_chunks: int = 0
    """die, hang, error_event, cut: strike when this many chunks of one stream have been sent."""
    times: int | None = 1
    """status, error_event, cut, drop_kv_events, template: how often; null for ever."""
    duration_s: float | None = None
    """hang, slow: when it is over by itself; null never."""

    def __post_init__(self) -> None:
        if self.factor <= 0 or self.after_chunks < 0:
            raise ValueError("factor must be above 0 and after_chunks not negative")
        if self.times is not None and self.times < 1:
            raise ValueError("times must be at least 1, or null for ever")


class Faults:
    """The faults that are set, and what they do where the server asks."""

    def __init__(self) -> None:
        self._set: list[Fault] = []
        self._left: dict[int, int] = {}
        self._released = asyncio.Event()
        self._released.set()

    def set(self, fault: Fault) -> None:
        """Begin a fault; die and hang strike at once unless they wait for a stream's chunk."""
        self._set.append(fault)
        if fault.times is not None:
            self._left[id(fault)] = fault.times
        if fault.kind in ("die", "hang") and not fault.after_chunks:
            self._strike(fault)
        elif fault.kind == "slow" and fault.duration_s is not None:
            asyncio.get_running_loop().call_later(fault.duration_s, self._drop, fault)

    def clear(self) -> None:
        """End all faults; what hangs goes on."""
        self._set.clear()
        self._left.clear()
        self._released.set()

    def list(self) -> list[Fault]:
        """The faults that are set and not used up."""
        return list(self._set)

    @property
    def slowdown(self) -> float:
        """By what factor steps are stretched."""
        product = 1.0
        for fault in self._set:
            if fault.kind == "slow":
                product *= fault.factor
        return product

    async def while_hanging(self) -> None:
        """Return when nothing hangs."""
        await self._released.wait()

    def take(self, kind: Kind) -> Fault | None:
        """The fault of this kind that applies now; counts as one of its times."""
        fault = next((f for f in self._set if f.kind == kind), None)
        if fault is not None and fault.times is not None:
            self._left[id(fault)] -= 1
            if not self._left[id(fault)]:
                self._drop(fault)
        return fault

    def for_stream(self) -> Callable[[int], Awaitable[Fault | None]]:
        """A function that a stream asks before each chunk: it strikes, or says how the stream breaks off."""
        breaks = self.take("error_event") or self.take("cut")

        async def before_chunk(sent: int) -> Fault | None:
            for fault in self._set:
                if fault.kind in ("die", "hang") and fault.after_chunks and sent == fault.after_chunks:
                    self._strike(fault)
            await self.while_hanging()
            return breaks if breaks is not None and sent >= breaks.after_chunks else None

        return before_chunk

    def _strike(self, fault: Fault) -> None:
        if fault.kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        self._released.clear()
        if fault.duration_s is not None:
            asyncio.get_running_loop().call_later(fault.duration_s, self._release, fault)

    def _release(self, fault: Fault) -> None:
        self._drop(fault)
        if not any(f.kind == "hang" for f in self._set):
            self._released.set()

    def _drop(self, fault: Fault) -> None:
        self._left.pop(id(fault), None)
        self._set = [f for f in self._set if f is not fault]
