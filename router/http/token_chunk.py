"""The chunk that streams are made of: one event with the token of one choice, in one HTTP chunk. Pure.

Nearly every read from an engine is just that, so it passes from socket to socket in one step, without a
reader's state and with few objects. Whatever is anything else (several events or half of one, the first or
the last, tool calls, logprobs) takes the general path of `framing`, `sse` and `Reply.write`. Both give the
same bytes; a test compares them.
"""

from __future__ import annotations

# As vLLM writes a chunk of chat and one of text in which nothing ends and something is said.
_IDS = b',"token_ids":['
_CHAT = b'"},"logprobs":null,"finish_reason":null'
_NO_PROMPT = b',"prompt_token_ids":null'
_TEXT = b'"finish_reason":null,"stop_reason":null' + _NO_PROMPT
_END = b"]}]}\n\n\r\n"
_REST = _END[1:]  # what stays of it without the ids
_BREAKS = b"\n\n\r\n"
_IDS_SIZE, _END_SIZE, _BREAKS_SIZE = len(_IDS), len(_END), len(_BREAKS)
_IDS_TAIL = _END_SIZE - 1  # the bracket stays with them
_REST_SIZE = len(_REST) - len(b"\r\n")

MAX_BYTES = 4096  # the chunk of one token is a few hundred
_SIZE_LINES = [b"%x\r\n" % size for size in range(MAX_BYTES)]
# The size line of a chunk by the length of all of it. No chunk begins as those of impossible lengths do.
_LINE_OF = [b"none"] * (MAX_BYTES + 8)
for _size, _line in enumerate(_SIZE_LINES):
    _LINE_OF[len(_line) + _size + len(b"\r\n")] = _line


def without_ids(chunk: bytes) -> tuple[bytes, bytes] | None:
    """The ids as `1,2]`, and the chunk that is left without them; None if it is any other kind of chunk."""
    length = len(chunk)
    if length >= MAX_BYTES or not chunk.endswith(_END):
        return None
    at = chunk.rfind(_IDS)
    if chunk.endswith(_CHAT, 0, at):
        cut = at
    elif chunk.endswith(_TEXT, 0, at):
        cut = at - len(_NO_PROMPT)
    else:
        return None
    line = _LINE_OF[length]
    begin = len(line)
    if not chunk.startswith(line) or chunk.find(b"\n", begin) != length - _BREAKS_SIZE:
        return None
    if chunk.find(b"]", at) != length - _END_SIZE:
        return None
    rest = _SIZE_LINES[cut - begin + _REST_SIZE] + chunk[begin:cut] + _REST
    return chunk[at + _IDS_SIZE : -_IDS_TAIL], rest


def each_without_ids(read: bytes) -> tuple[bytes, bytes] | None:
    """The same for several such chunks that came in one read, as they do when the router is late."""
    *chunks, behind = read.split(_BREAKS)
    found = [pair for chunk in chunks if (pair := without_ids(chunk + _BREAKS)) is not None]
    if behind or not chunks or len(found) < len(chunks):
        return None
    return b"".join([ids for ids, _ in found]), b"".join([rest for _, rest in found])
