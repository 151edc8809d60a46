"""The chunk that streams are made of: one event with the token of one choice, in one HTTP chunk. Pure.

Nearly every read from an engine is just that, so it passes from socket to socket in one step, without a
reader's state and with few objects. All such chunks of a stream are alike but for text and ids: the rest is
learnt from the first, which is cheaper than an expression and tells the text as well. Whatever is anything
else (several events or half of one, the first or the last, tool calls, logprobs) takes the general
path of `framing`, `sse` and `Reply.write`. Both give the same bytes; a test compares them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

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
_END = b"]" + _REST
_IDS = re.compile(rb"[0-9,]+\]").fullmatch
# What stands before the text of a chunk in chats and in completions, and between it and the ids.
_TEXTS = (b'"delta":{"content":"', b'"text":"')
_BETWEEN = re.compile(
    rb'("\}?,"logprobs":null,"finish_reason":null(?:,"stop_reason":null)?)(?:,"prompt_token_ids":null)?'
    rb',"token_ids":\['
).fullmatch

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


# The ids as `1,2]`, the text as JSON has it where that is known, and what is left of the chunk without ids.
Taken = tuple[bytes, bytes | None, bytes]


@dataclass(frozen=True, slots=True)
class Form:
    """What the ordinary chunks of a stream have in common. `kept`: so much of what is between stays."""

    before: bytes  # from `data:` to the text
    between: bytes  # from there to the ids
    kept: int

    @classmethod
    def of(cls, chunk: bytes) -> Form | None:
        """That of an ordinary chunk; None if its text cannot be told from the rest."""
        ids_at = chunk.rfind(b"[") + 1
        for marker in _TEXTS:
            text_at = chunk.find(marker) + len(marker)
            if text_at >= len(marker) and (match := _BETWEEN(chunk, chunk.find(b'"', text_at), ids_at)):
                return cls(chunk[chunk.find(b"data:") : text_at], match[0], len(match[1]))
        return None

    def take(self, chunk: bytes) -> tuple[bytes, bytes, bytes] | None:
        """Ids, text and rest of a chunk of this form whose text holds no quotes; None of any other."""
        length = len(chunk)
        if length >= MAX_BYTES:
            return None
        line, before = _LINE_OF[length], self.before
        begin = len(line)
        ids_at = chunk.rfind(b"[") + 1
        text_at, ends = begin + len(before), ids_at - len(self.between)
        if not (
            text_at <= ends
            and chunk.startswith(before, begin)
            and chunk.startswith(self.between, ends)
            and chunk.startswith(line)
            and chunk.endswith(_END)
        ):
            return None
        ids, text = chunk[ids_at : -len(_REST)], chunk[text_at:ends]
        if text.find(b'"') >= 0 or not (ids[:-1].isdigit() or _IDS(ids)):
            return None
        event = chunk[begin : ends + self.kept]
        return ids, text, _SIZE_LINES[len(event) + _REST_SIZE] + event + _REST


def take_each(read: bytes, form: Form | None) -> list[Taken] | None:
    """The same of each chunk of a read, of whatever form; None if one of them is not ordinary."""
    *chunks, behind = read.split(_BREAKS)
    if behind:
        return None
    found: list[Taken] = []
    for chunk in chunks:
        taken = _take(chunk + _BREAKS, form)
        if taken is None:
            return None
        found.append(taken)
    return found or None


def _take(chunk: bytes, form: Form | None) -> Taken | None:
    if form is not None and (taken := form.take(chunk)) is not None:
        return taken
    pair = without_ids(chunk)
    return pair and (pair[0], None, pair[1])
