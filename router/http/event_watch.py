"""Streams that the router passes on as they are and only watches: how far they got, and how they end.

Pure: bytes in, the same bytes out, in whole events. An event is known by its name; nothing is decoded per
event. What a stream told of itself is kept as the events were, to be read once when it is over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from router.http.sse import DONE_DATA, ERROR_DATA, Shortcut, Splitter

# How events without a name are called here: chat's chunks have none.
DATA, DONE, ERROR = b"data", b"[DONE]", b"error"
_EVENT = b"event:"


class _Typed(msgspec.Struct):
    type: str = ""


_decode_type = msgspec.json.Decoder(_Typed).decode


@dataclass(frozen=True, slots=True)
class Ending:
    """By which events a kind of stream says that it is whole, or that it failed.

    `output`: what the names of events with output end in. `counts`: events that tell token counts;
    `aborted`: what the last of them holds if the engine gave the request up, which else looks whole.
    `named`: events have names, or at least a `type` in their data. `said`: a stream that ends without one of
    these events is broken.
    """

    whole: frozenset[bytes] = frozenset({DONE})
    failed: frozenset[bytes] = frozenset({ERROR})
    output: bytes = DATA
    counts: frozenset[bytes] = frozenset()
    aborted: bytes = b""
    named: bool = False
    said: bool = True


# Chat's convention, which most streams follow that have no events of their own.
CHUNKS = Ending()
UNKNOWN = Ending(said=False)


@dataclass(slots=True)
class EventWatch:
    """One stream on its way to the client: `feed` takes what the engine sent, returns what the client gets.

    An error is withheld, and all behind it: vLLM says [DONE] after one. Whether the client is told of it is
    not decided here.
    """

    ending: Ending
    events: int = 0  # events with output
    done: bool = False  # it said that it is whole
    error: bytes | None = None  # the event by which it said that it failed
    first: bytes = b""
    last: bytes = b""
    counts: list[bytes] = field(default_factory=list)
    _splitter: Splitter = field(default_factory=Splitter)

    def feed(self, data: bytes) -> bytes:
        """Whole events out; the rest is held until its end arrives. Raises StreamTooLong."""
        return b"".join([self._event(event) for event in self._splitter.feed(data)])

    def shortcut(self, write: Callable[[bytes], None]) -> Shortcut | None:
        """None: every event is looked at."""
        return None

    @property
    def between(self) -> bool:
        """What comes next is the beginning of an event."""
        return self._splitter.between

    @property
    def broken(self) -> bool:
        """Whether something is missing if nothing more comes."""
        return not self.done and self.error is None and (self.ending.said or not self.between)

    def _event(self, event: bytes) -> bytes:
        """One event with its blank line, and what of it goes on."""
        if self.error is not None:
            return b""
        name, ending = self._name(event), self.ending
        if name in ending.counts:
            self.counts.append(event)
        if name in ending.failed:
            self.error = event
            return b""
        if name.endswith(ending.output):
            self.events += 1
        elif name in ending.whole or name == DONE:
            if self._given_up:
                return b""
            self.done = self.done or name in ending.whole
        if name:
            self.first = self.first or event
            self.last = event
        return event

    @property
    def _given_up(self) -> bool:
        aborted = self.ending.aborted
        return bool(aborted and self.counts) and aborted in self.counts[-1]

    def _name(self, event: bytes) -> bytes:
        if event.startswith(_EVENT):
            return event[len(_EVENT) : event.find(b"\n")].strip()
        return self._nameless(event)

    def _nameless(self, event: bytes) -> bytes:
        """An event that does not begin with its name, or has none."""
        at = event.find(b"\n" + _EVENT) + 1
        if at:
            return self._name(event[at:])
        if event.startswith(DONE_DATA):
            return DONE
        if event.startswith(ERROR_DATA):
            return ERROR
        if not event.startswith(b"data:"):
            return b""  # a comment
        return _type_of(event) if self.ending.named else DATA


def data_of(event: bytes) -> bytes:
    """The JSON of an event of one data line."""
    return event[event.find(b"{") :]


def _type_of(event: bytes) -> bytes:
    try:
        return _decode_type(data_of(event)).type.encode()
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return b""
