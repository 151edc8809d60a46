"""`herd route --processes N`: the parent of several router processes. It carries no traffic.

It starts one again that ends, has them leave one after the other on SIGHUP (each new one takes connections
before the next leaves), and ends all of them on SIGINT or SIGTERM; a second signal cuts. Only the standard
library is used, to stay small.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from router.http import listener

LINK = 0  # a process's standard input, which ends with its parent
# What a process tells its parent.
OPEN = "open"  # with its admin port: it takes connections
LEFT = "left"  # its rank is free; it finishes what it has

# A process knows its engines within router.front.SETTLE_S; one that is not open by now never will be.
START_S = 60.0
# One that ends sooner after its start than this will probably do so again: then the next start waits.
STEADY_S = 10.0
BACK_OFF_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
TURN_S = 0.25  # how exactly times are kept
# A little more than a process takes to end its streams (router.route.GRACE_S).
END_S = 35.0
ENDING = (signal.SIGINT, signal.SIGTERM)


def run(urls: Sequence[str], settings: dict[str, Any], say: Callable[[str], None]) -> int:
    """Runs `settings["replicas"]` router processes until they are to end; the exit status.

    Raises ListenError. What the first process finds wrong it says itself, and the status is 1.
    """
    with _settled(settings["host"], settings["port"]) as port:
        spec = {"urls": urls, "settings": {**settings, "port": port}, "fleet": f"herd route {os.getpid()}"}
        parent = Parent(json.dumps(spec), settings["replicas"])
        ports = parent.start()
        if ports is None:
            return 1
        say(
            f"Routing to {len(urls)} engines on port {port} in {len(ports)} processes; "
            f"metrics and state: {', '.join(map(str, ports))}."
        )
        parent.keep()
    return 0


@contextmanager
def _settled(host: str, port: int) -> Iterator[int]:
    """The port; for 0 a free one that nobody else gets meanwhile."""
    if port:
        yield port
        return
    with listener.bind(host, 0, shared=True) as bound:
        yield bound.getsockname()[1]


class Child:
    """One router process, as its parent knows it."""

    def __init__(self, spec: str) -> None:
        argv = [sys.executable, "-P", "-m", "router.route", spec]
        # In a session of its own: Ctrl-C on a terminal reaches the parent alone, which passes it on.
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdout is not None
        self.reports = self._process.stdout.fileno()
        self.pid = self._process.pid
        self.started = time.monotonic()
        self.admin_port: int | None = None  # until it takes connections
        self.leaving = self.left = False
        self._unread = b""

    @property
    def open(self) -> bool:
        """It takes connections, and will go on."""
        return self.admin_port is not None and not self.leaving

    def hear(self) -> bool:
        """Takes in what it tells; False when it has ended."""
        told = os.read(self.reports, 4096)
        *lines, self._unread = (self._unread + told).split(b"\n")
        for word, *rest in (line.decode().split() for line in lines):
            if word == OPEN:
                self.admin_port = int(rest[0])
            elif word == LEFT:
                self.left = True
        return bool(told)

    def late(self, now: float) -> bool:
        """It should take connections by now."""
        return self.admin_port is None and now - self.started > START_S

    def leave(self) -> None:
        """Has it leave to others."""
        self.leaving = True
        self.signal(signal.SIGHUP)

    def signal(self, number: int) -> None:
        """Sends it a signal, if it is still there."""
        self._process.send_signal(number)

    def end(self) -> int:
        """Its exit status; it has closed its output, so it has ended or soon will."""
        status = self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        return status


@dataclass(slots=True)
class Slot:
    """A place for one process: who has it, and how starting one went lately."""

    child: Child | None = None
    failures: int = 0
    due: float = 0.0

    @property
    def open(self) -> bool:
        """Its process takes connections."""
        return self.child is not None and self.child.open


class Parent:
    """Keeps a process in every slot."""

    def __init__(self, spec: str, count: int) -> None:
        self._spec = spec
        self._slots = [Slot() for _ in range(count)]
        self._children: dict[int, Child] = {}  # all that have not ended, by the descriptor they report on
        self._rolling: deque[Slot] = deque()
        self._started = self._ending = False
        self._selector = selectors.DefaultSelector()
        self._signals = _signals()
        self._selector.register(self._signals, selectors.EVENT_READ)

    def start(self) -> list[int] | None:
        """Brings all up, the first before the others; their admin ports, or None when they are to end.

        What is wrong with a setting or a port is so for all of them: the first one says it.
        """
        for slots in (self._slots[:1], self._slots):
            for slot in slots:
                if slot.child is None:
                    self._start(slot)
            while not all(slot.open for slot in slots):
                self._turn()
                if self._ending or any(slot.child is None for slot in slots):
                    self._end()
                    return None
        self._started = True
        return [slot.child.admin_port for slot in self._slots if slot.child and slot.child.admin_port]

    def keep(self) -> None:
        """Starts again what ends, until all are to end."""
        while not self._ending:
            self._turn()
            now = time.monotonic()
            for slot in self._slots:
                if slot.child is None and now >= slot.due:
                    self._start(slot)
                elif slot.child is not None and slot.child.late(now):
                    slot.child.signal(signal.SIGKILL)
            self._roll()
        self._end()

    def _start(self, slot: Slot) -> None:
        slot.child = Child(self._spec)
        self._children[slot.child.reports] = slot.child
        self._selector.register(slot.child.reports, selectors.EVENT_READ)

    def _roll(self) -> None:
        """Has the next process leave, once those before it have successors that take connections."""
        if not self._rolling or not all(slot.open for slot in self._slots):
            return
        child = self._rolling.popleft().child
        assert child is not None
        child.leave()

    def _turn(self) -> None:
        """Waits until something happens or is due, and takes it in."""
        for key, _ in self._selector.select(TURN_S):
            if key.fd == self._signals:
                for number in os.read(self._signals, 64):
                    self._signalled(number)
            elif (child := self._children[key.fd]).hear():
                self._told(child)
            else:
                self._ended(child)

    def _signalled(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._rolling = deque(self._slots)
        else:
            self._signal_all(signal.SIGKILL if self._ending else signal.SIGTERM)
            self._ending = True

    def _told(self, child: Child) -> None:
        """A process that has left frees its slot: its successor gets the same rank."""
        for slot in self._slots:
            if slot.child is child and child.left:
                slot.child, slot.due = None, 0.0

    def _ended(self, child: Child) -> None:
        self._selector.unregister(child.reports)
        del self._children[child.reports]
        status = child.end()
        for slot in self._slots:
            if slot.child is child:
                steady = time.monotonic() - child.started > STEADY_S
                slot.failures = 0 if steady else slot.failures + 1
                wait = BACK_OFF_S[min(slot.failures, len(BACK_OFF_S) - 1)]
                slot.child, slot.due = None, time.monotonic() + wait
                if self._started and not self._ending:
                    print(f"Router process {child.pid} ended with status {status}.", file=sys.stderr)

    def _end(self) -> None:
        """Returns when all have ended; what has not in time is cut."""
        if not self._ending:
            self._ending = True
            self._signal_all(signal.SIGTERM)
        deadline = time.monotonic() + END_S
        while self._children:
            self._turn()
            if time.monotonic() > deadline:
                self._signal_all(signal.SIGKILL)

    def _signal_all(self, number: int) -> None:
        for child in self._children.values():
            child.signal(number)


def _signals() -> int:
    """A descriptor that gives one byte, its number, for each signal that matters here."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    for number in (*ENDING, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writable)
    return readable
