"""The chunk that streams are made of: one event with the token of one choice, in one HTTP chunk. Pure.

Nearly every read from an engine is just that, so it passes from socket to socket in one step, without a
reader's state and with few objects. Whatever is anything else (several events or half of one, the first or
the last, tool calls, logprobs) takes the general path of `framing`, `sse` and `Reply.write`. Both give the
same bytes; a test compares them.
"""

from __future__ import annotations

import re

_BREAKS = b"\n\n\r\n"
# A chunk of chat or text as vLLM writes it, in which nothing ends and something is said: its size line, the
# event up to its ids, the ids. `[^\n]*` gives back from the end, so text that looks alike is no matter.
_ORDINARY = re.compile(
    rb"([0-9a-f]+\r\n)"
    rb'(data: [^\n]*"finish_reason":null(?<!"delta":\{\},"logprobs":null,"finish_reason":null)'
    rb'(?:,"stop_reason":null)?)(?:,"prompt_token_ids":null)?'
    rb',"token_ids":\[([0-9,]+\])\}\]\}\n\n\r\n'
).fullmatch
_KEY = b'token_ids":'  # there are no other ids: a second choice's, a prompt's
_REST = b"}]}" + _BREAKS  # what stays behind the ids

MAX_BYTES = 4096  # the chunk of one token is a few hundred
_SIZE_LINES = [b"%x\r\n" % size for size in range(MAX_BYTES)]
# The size line of a chunk by the length of all of it. No chunk begins as those of impossible lengths do.
_LINE_OF = [b"none"] * (MAX_BYTES + 8)
for _size, _line in enumerate(_SIZE_LINES):
    _LINE_OF[len(_line) + _size + len(b"\r\n")] = _line
_REST_SIZE = len(_REST) - len(b"\r\n")


def without_ids(chunk: bytes) -> tuple[bytes, bytes] | None:
    """The ids as `1,2]`, and the chunk that is left without them; None if it is any other kind of chunk."""
    match = _ORDINARY(chunk)
    if match is None:
        return None
    line, event, ids = match.groups()
    length = len(chunk)
    if length >= MAX_BYTES or line != _LINE_OF[length] or event.find(_KEY) >= 0:
        return None
    return ids, _SIZE_LINES[len(event) + _REST_SIZE] + event + _REST


def each_without_ids(read: bytes) -> tuple[bytes, bytes] | None:
    """The same for several such chunks that came in one read, as they do when the router is late."""
    *chunks, behind = read.split(_BREAKS)
    found = [pair for chunk in chunks if (pair := without_ids(chunk + _BREAKS)) is not None]
    if behind or not chunks or len(found) < len(chunks):
        return None
    return b"".join([ids for ids, _ in found]), b"".join([rest for _, rest in found])
