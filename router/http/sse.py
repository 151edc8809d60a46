"""The events of a stream (server-sent events), changed on their way through. Pure: bytes in, bytes out.

Engines are asked for token ids and usage on every stream, because the router lives on them; what the client
did not ask for is cut out again. No JSON is decoded per event: inside a JSON string every quote is escaped,
so the bytes `"token_ids":` can only be a key, and the array of numbers behind it ends at the first `]`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

# vLLM echoes the prompt's ids in the first event: 8 bytes a token, a million tokens.
MAX_EVENT_BYTES = 16 * 1024 * 1024
_IDS = b'"token_ids":'
_PROMPT_IDS = b'"prompt_token_ids":'
_DONE = b"data: [DONE]"
_ERROR = (b'data: {"error"', b'data:{"error"')


class StreamTooLong(ValueError):
    """One event is larger than any engine sends."""


class PromptTokensDetails(msgspec.Struct):
    """Of the prompt tokens, how many needed no computing."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """Token counts as an engine reports them."""

    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: PromptTokensDetails | None = None

    @property
    def cached_tokens(self) -> int:
        details = self.prompt_tokens_details
        return (details.cached_tokens or 0) if details else 0


class WithUsage(msgspec.Struct):
    """The part of a reply or event that carries usage."""

    usage: Usage | None = None


_decode_usage = msgspec.json.Decoder(WithUsage).decode


@dataclass(slots=True)
class EventStream:
    """One stream on its way to the client: `feed` takes what the engine sent, returns what the client gets.

    `keep_ids` and `keep_usage` say what the client asked for itself.
    """

    keep_ids: bool = False
    keep_usage: bool = False
    events: int = 0  # events with output, passed on
    usage: Usage | None = None
    done: bool = False  # the engine said [DONE]
    error: bytes | None = None  # the engine's error event, as it came
    _ids: bytearray = field(default_factory=bytearray)
    _held: bytes = b""

    def feed(self, data: bytes) -> bytes:
        """Whole events out; the rest is held until its end arrives. Raises StreamTooLong."""
        if self._held:
            data, self._held = self._held + data, b""
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        end = data.rfind(b"\n\n") + 2
        if end < 2:
            end = 0
        if end < len(data):
            self._hold(data[end:])
        if not end:
            return b""
        out = [self._event(event) for event in data[: end - 2].split(b"\n\n")]
        return out[0] if len(out) == 1 else b"".join(out)

    @property
    def token_ids(self) -> list[int]:
        """The ids of all output tokens so far."""
        return [int(number) for number in bytes(self._ids).split(b",") if number]

    def _hold(self, data: bytes) -> None:
        if len(data) > MAX_EVENT_BYTES:
            raise StreamTooLong(f"an event of more than {MAX_EVENT_BYTES} bytes")
        self._held = data

    def _event(self, event: bytes) -> bytes:
        """One event without its blank line; what remains of it, with."""
        at = event.find(_IDS)
        if at > 0:
            return self._output(event, at)
        if event.startswith(_DONE):
            self.done = True
            return b"" if self.error is not None else b"data: [DONE]\n\n"
        if event.startswith(_ERROR):
            self.error = event
        elif b'"choices":[]' in event and b'"usage":' in event:
            self.usage = _decode_usage(event[event.index(b"{") :]).usage
            if not self.keep_usage:
                return b""
        else:
            # An engine that knows nothing of token ids; the event that only names the role is no output.
            self.events += b'"choices":[{' in event and b'"role":' not in event
            return self._without_prompt(event)
        return event + b"\n\n"

    def _output(self, event: bytes, at: int) -> bytes:
        """An event with output tokens: notes their ids, cuts them, drops what is empty then."""
        while at > 0:
            begin = at + len(_IDS)
            if event[begin : begin + 1] == b"[":
                end = event.find(b"]", begin) + 1
                self._ids += event[begin + 1 : end - 1]
                self._ids += b","
            else:  # null
                end = begin + 4
            if self.keep_ids:
                at = event.find(_IDS, end)
            else:
                event, at = _cut(event, at, end)
                at = event.find(_IDS, at)
        if self.keep_ids:
            self.events += 1
            return event + b"\n\n"
        if b'"delta":{}' in event and b'"finish_reason":null' in event and b'"logprobs":null' in event:
            return b""
        self.events += 1
        return self._without_prompt(event)

    def _without_prompt(self, event: bytes) -> bytes:
        """vLLM echoes the whole prompt's ids in the first event."""
        at = -1 if self.keep_ids else event.find(_PROMPT_IDS)
        if at < 0:
            return event + b"\n\n"
        begin = at + len(_PROMPT_IDS)
        end = event.find(b"]", begin) + 1 if event[begin : begin + 1] == b"[" else begin + 4
        return _cut(event, at, end)[0] + b"\n\n"


def _cut(event: bytes, begin: int, end: int) -> tuple[bytes, int]:
    """The event without the member at [begin, end) and one comma beside it; and where the cut was."""
    if event[begin - 1 : begin] == b",":
        begin -= 1
    elif event[end : end + 1] == b",":
        end += 1
    return event[:begin] + event[end:], begin
