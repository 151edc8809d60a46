"""One text field of a multipart/form-data body (RFC 7578). Pure.

The body is searched, never copied or split: beside the field there may be 25 MB of audio. What is a delimiter
and what is content is decided as python-multipart does, which reads forms for vLLM: a line that begins with
the boundary and ends there, or in `--`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from router.errors import BadRequest

# A part that is met later than this is no form that a client library made.
MAX_PARTS = 1000
MAX_HEAD_BYTES = 16 * 1024
_PARAMETER = re.compile(rb';\s*([\w*-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;\s]*))', re.DOTALL)
_DISPOSITION = re.compile(rb"(?:^|\r\n)content-disposition:\s*form-data\s*(;[^\r]*)", re.IGNORECASE)


class Span(NamedTuple):
    """Where a value lies in a body: body[begin:end]."""

    begin: int
    end: int


def is_form(content_type: bytes | None) -> bool:
    """Whether this content type is a form's."""
    return content_type is not None and content_type[:19].lower() == b"multipart/form-data"


def find_field(content_type: bytes, body: bytes, name: str) -> Span | None:
    """Where the value of the one text field of this name is; None if there is none.

    Raises BadRequest if the body is no form, or has the field twice: its readers differ in which one counts.
    """
    found: Span | None = None
    for head, content in _parts(body, _boundary(content_type)):
        if _field_name(body[head.begin : head.end]) != name.encode():
            continue
        if found is not None:
            raise BadRequest(f"The field {name!r} is given twice", param=name)
        found = content
    return found


def replaced(body: bytes, span: Span, value: bytes) -> bytes:
    """The body with another value there."""
    rest = memoryview(body)
    return b"".join((rest[: span.begin], value, rest[span.end :]))


def _boundary(content_type: bytes) -> bytes:
    for key, quoted, plain in _PARAMETER.findall(content_type):
        if key.lower() == b"boundary" and (quoted or plain):
            return re.sub(rb"\\(.)", rb"\1", quoted, flags=re.DOTALL) or bytes(plain)
    raise BadRequest("The content-type names no boundary")


def _parts(body: bytes, boundary: bytes) -> Iterator[tuple[Span, Span]]:
    """Head and content of every part. A head is all between the delimiter and the blank line."""
    delimiter = b"\r\n--" + boundary
    at = len(delimiter) - 2 if body.startswith(delimiter[2:]) else _delimited(body, delimiter, 0)[1]
    for _ in range(MAX_PARTS):
        if body.startswith(b"--", at):
            return
        blank = body.find(b"\r\n\r\n", at, at + MAX_HEAD_BYTES)
        if blank < 0 or not body.startswith(b"\r\n", at):
            raise BadRequest("The form is malformed: a part has no head")
        end, after = _delimited(body, delimiter, blank + 4)
        yield Span(at, blank), Span(blank + 4, end)
        at = after
    raise BadRequest(f"The form has more than {MAX_PARTS} parts")


def _delimited(body: bytes, delimiter: bytes, begin: int) -> tuple[int, int]:
    """Where the next delimiter stands and where it ends."""
    at = body.find(delimiter, begin)
    while at >= 0:
        end = at + len(delimiter)
        if body.startswith((b"\r\n", b"--"), end):
            return at, end
        at = body.find(delimiter, end)
    raise BadRequest("The form is malformed: it has no end, or its boundary is another than the header's")


def _field_name(head: bytes) -> bytes | None:
    """The name of a text field; None for a file."""
    disposition = _DISPOSITION.search(head)
    if disposition is None:
        return None
    given = {key.lower(): quoted or plain for key, quoted, plain in _PARAMETER.findall(disposition[1])}
    return None if given.keys() & {b"filename", b"filename*"} else given.get(b"name")
