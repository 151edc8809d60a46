"""The events of a stream (server-sent events), changed on their way through. Pure: bytes in, bytes out.

Engines are asked for token ids and usage on every stream, because the router lives on them; what the client
did not ask for is cut out again. No JSON is decoded per event: inside a JSON string every quote is escaped,
so the bytes `"token_ids":` can only be a key, and the array of numbers behind it ends at the first `]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from router.http.token_chunk import Form, take_each
from router.http.transcript import Transcript

# Takes a read that begins with an HTTP chunk; False, and nothing done, if it is not of the kind it knows.
Shortcut = Callable[[bytes], bool]

# vLLM echoes the prompt's ids in the first event: 8 bytes a token, a million tokens.
MAX_EVENT_BYTES = 16 * 1024 * 1024
_IDS = b'token_ids":'  # the end of `"token_ids":` and of `"prompt_token_ids":`
_PROMPT = b'"prompt_'
_QUOTE, _BRACKET, _COMMA = b'"],'
# How a stream of chunks says that it is whole, and that it failed: the beginnings of such an event.
DONE_DATA = (b"data: [DONE]", b"data:[DONE]")
ERROR_DATA = (b'data: {"error"', b'data:{"error"')
_NO_CHOICE = (b'"choices":[]', b'"choices": []')
# A choice that the engine gave up, though its stream ends as if all was well.
_ABORT = (b'"finish_reason":"abort"', b'"finish_reason": "abort"')


class StreamTooLong(ValueError):
    """One event is larger than any engine sends."""


# What no count exceeds, and a float still holds exactly.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class PromptTokensDetails(msgspec.Struct):
    """Of the prompt tokens, how many needed no computing."""

    cached_tokens: Count | None = None


class Usage(msgspec.Struct):
    """Token counts as an engine reports them."""

    prompt_tokens: Count = 0
    completion_tokens: Count | None = 0
    prompt_tokens_details: PromptTokensDetails | None = None

    @property
    def cached_tokens(self) -> int:
        details = self.prompt_tokens_details
        return (details.cached_tokens or 0) if details else 0


class WithUsage(msgspec.Struct):
    """The part of a reply or event that carries usage."""

    usage: Usage | None = None


_decode_usage = msgspec.json.Decoder(WithUsage).decode


def usage_of(reply: bytes) -> Usage | None:
    """The usage in a reply or event, where it is told as vLLM tells it; the reply is good without."""
    try:
        return _decode_usage(reply).usage
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


@dataclass(slots=True)
class Splitter:
    """Bytes in, whole events out, each with its blank line; CR LF become LF. The rest is held."""

    _held: bytearray = field(default_factory=bytearray)
    _half_break: bytes = b""  # a CR whose LF has not come

    @property
    def between(self) -> bool:
        """Nothing is held: what comes next is the beginning of an event."""
        return not (self._held or self._half_break)

    def feed(self, data: bytes) -> list[bytes]:
        """The events that end in these bytes. Raises StreamTooLong."""
        if self.between and data.find(b"\r") < 0 and 0 < data.find(b"\n\n") == len(data) - 2:
            return [data]  # one event: what most reads from an engine are
        data = self._with_plain_breaks(data)
        if self._held and (self._held[-1:] + data).find(b"\n\n") < 0:
            self._hold(data)  # only what is new is searched: an event may come in a thousand pieces
            return []
        *events, rest = (bytes(self._held) + data).split(b"\n\n")
        self._held.clear()
        self._hold(rest)
        return [event + b"\n\n" for event in events]

    def _with_plain_breaks(self, data: bytes) -> bytes:
        """With LF for CR LF, also where that was split."""
        data = self._half_break + data
        self._half_break = b"\r" if data.endswith(b"\r") else b""
        return data.removesuffix(b"\r").replace(b"\r\n", b"\n")

    def _hold(self, data: bytes) -> None:
        self._held += data
        if len(self._held) > MAX_EVENT_BYTES:
            raise StreamTooLong(f"an event of more than {MAX_EVENT_BYTES} bytes")


@dataclass(slots=True)
class EventStream:
    """One stream on its way to the client: `feed` takes what the engine sent, returns what the client gets.

    `keep_ids` and `keep_usage` say what the client asked for itself. `transcript`: what the client was told,
    kept for a stream that may have to go on elsewhere. An error is withheld, and all behind it: whether the
    client is told of it is not decided here.
    """

    keep_ids: bool = False
    keep_usage: bool = False
    transcript: Transcript | None = None
    usage: Usage | None = None
    done: bool = False  # the engine said [DONE]
    error: bytes | None = None  # the event in which the engine failed, as it came
    _ids: bytearray = field(default_factory=bytearray)  # of each event in turn, closed by a bracket: 1,2]3]
    _besides: int = 0  # events passed on that told no ids, less those dropped that did
    _splitter: Splitter = field(default_factory=Splitter)

    def feed(self, data: bytes) -> bytes:
        """Whole events out; the rest is held until its end arrives. Raises StreamTooLong."""
        return b"".join([self._event(event) for event in self._splitter.feed(data)])

    def shortcut(self, write: Callable[[bytes], None]) -> Shortcut | None:
        """Takes a read that is one ordinary event in a chunk of its own, or several, and writes them on.

        False, and nothing done, if the read is anything else: that is for `feed`. None where ids are kept.
        """
        if self.keep_ids:
            return None
        form: Form | None = None
        add = self.transcript.add if self.transcript is not None else None

        def pass_on(read: bytes) -> bool:
            nonlocal form
            if form is None or (taken := form.take(read)) is None:
                form = form or Form.of(read)
                return self._pass_each_on(read, form, write)
            ids, text, rest = taken
            self._ids += ids
            if add is not None:
                add(text)
            write(rest)
            return True

        return pass_on

    def _pass_each_on(self, read: bytes, form: Form | None, write: Callable[[bytes], None]) -> bool:
        """The same for a read of several chunks, or of one that is not of the stream's form."""
        found = take_each(read, form)
        if found is None:
            return False
        for ids, text, rest in found:
            self._ids += ids
            if self.transcript is None:
                continue
            if text is None:
                self.transcript.note(rest)
            else:
                self.transcript.add(text)
        write(b"".join([rest for _, _, rest in found]))
        return True

    @property
    def between(self) -> bool:
        """What comes next is the beginning of an event."""
        return self._splitter.between

    @property
    def broken(self) -> bool:
        """Whether something is missing if nothing more comes."""
        return not self.done and self.error is None

    @property
    def events(self) -> int:
        """How many events with output were passed on."""
        return self._ids.count(b"]") + self._besides

    @property
    def token_ids(self) -> list[int]:
        """The ids of all output tokens so far."""
        return [int(number) for number in self._ids.replace(b"]", b",").split(b",") if number.strip()]

    def _note(self, ids: bytes) -> None:
        """Keeps `[1,2,3]`, or that there was `null`."""
        self._ids += ids.strip(b" []") + b"]" if ids[-1] == _BRACKET else b"]"

    def _event(self, event: bytes) -> bytes:
        """One event with its blank line; what remains of it."""
        if self.error is not None:
            return b""
        if event.startswith(ERROR_DATA) or _ABORT[0] in event or _ABORT[1] in event:
            self.error = event.rstrip()
            return b""
        if event.startswith(DONE_DATA):
            self.done = True
            return event
        if self.transcript is not None:
            self.transcript.note(event)
        at = event.rfind(_IDS)
        if at >= 0:
            return self._with_ids(event, at)
        if b'"usage":' in event and (_NO_CHOICE[0] in event or _NO_CHOICE[1] in event):
            self.usage = usage_of(event[event.find(b"{") :])
            return event if self.keep_usage else b""
        # An engine that knows nothing of token ids; the event that only names the role is no output.
        self._besides += b'"choices":[{' in event and b'"role":' not in event
        return event

    def _with_ids(self, event: bytes, at: int) -> bytes:
        """An event with token ids: notes the output's, cuts all of them, drops what is empty then."""
        output = False
        while at >= 0:
            begin, end = at, _end_of_ids(event, at + len(_IDS))
            if event[at - 1] == _QUOTE and end:
                begin, output = at - 1, True
                self._note(event[at + len(_IDS) : end])
            elif event.endswith(_PROMPT, 0, at) and end:
                begin = at - len(_PROMPT)
            if begin < at and not self.keep_ids:
                event = _cut(event, begin, end)
            at = event.rfind(_IDS, 0, begin)
        if output and not self.keep_ids and _is_empty(event):
            self._besides -= 1
            return b""
        return event


def _end_of_ids(event: bytes, at: int) -> int:
    """Where an array of numbers, or null, that begins here ends; 0 where something else stands."""
    if event.startswith(b" ", at):
        at += 1
    if event.startswith(b"[", at):
        return event.find(b"]", at) + 1
    return at + 4 if event.startswith(b"null", at) else 0


def _cut(event: bytes, begin: int, end: int) -> bytes:
    """The event without the member at [begin, end) and one comma beside it."""
    if event[begin - 1] == _COMMA:
        begin -= 1
    elif event[end] == _COMMA:
        end += 1
    return event[:begin] + event[end:]


def _is_empty(event: bytes) -> bool:
    """A chunk of chat that says nothing: vLLM sends it for its token ids alone."""
    return b'"delta":{}' in event and b'"finish_reason":null' in event and b'"logprobs":null' in event
