import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.http.framing import Chunked, FramingError, Sized, UntilClose
from router.http.reply_head import read_head


def head(*lines, status="200 OK", version="1.1"):
    return "\r\n".join([f"HTTP/{version} {status}", *lines, "", ""]).encode("latin-1")


@pytest.mark.parametrize(
    ("raw", "framing", "keep_alive"),
    [
        (head("content-length: 5"), Sized, True),
        (head("Content-Length:5", "content-length: 5 "), Sized, True),
        (head("Transfer-Encoding: Chunked"), Chunked, True),
        (head(), UntilClose, True),
        (head("connection: close"), UntilClose, False),
        (head("connection: x", "connection: Y, Close"), UntilClose, False),
        (head("content-length: 1", version="1.0"), Sized, False),
        (head("content-length: 1", "connection: keep-alive", version="1.0"), Sized, True),
        (head("transfer-encoding: chunked", status="204 No Content"), Sized, True),
        (head("content-length: 9", status="304"), Sized, True),
        (head(status="103 Early Hints"), Sized, True),
    ],
)
def test_how_a_body_is_delimited(raw, framing, keep_alive):
    read = read_head(raw)
    assert (type(read.framing()), read.keep_alive) == (framing, keep_alive)
    assert read.framing() is not read.framing()  # a remembered head is shared, what reads a body is not


@pytest.mark.parametrize(
    "raw",
    [
        b"\r\n\r\n",
        b"HTTP/1.1 200 OK\n\r\n",
        b"HTTP/1.1 200 OK\r\na: 1\n\r\n",
        head(version="2.0"),
        head(status="20 OK"),
        head(status="101 Switching Protocols"),
        head("no colon"),
        head("space : 1"),
        head(" folded: 1"),
        head(": 1"),
        head("a: \0"),
        head("transfer-encoding: gzip"),
        head("transfer-encoding: gzip, chunked"),
        head("transfer-encoding: chunked", "transfer-encoding: chunked"),
        head("transfer-encoding: chunked", "content-length: 1"),
        head("content-length: x"),
        head("content-length: -1"),
        head("content-length: 1, 1"),
        head("content-length: 1", "content-length: 2"),
        head("content-length: " + "9" * 5000),
    ],
)
def test_what_is_no_reply(raw):
    with pytest.raises(FramingError):
        read_head(raw)


@given(
    names=st.lists(st.from_regex(r"\A[A-Za-z-]{1,20}\Z"), max_size=5),
    values=st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=255, exclude_characters="\x7f"))),
)
def test_headers_come_out_as_they_went_in(names, values):
    pairs = [(f"x-{name}", value.strip()) for name, value in zip(names, values, strict=False)]
    read = read_head(head(*(f"{name}:\t{value} " for name, value in pairs)))
    assert [(n.decode(), v.decode("latin-1").strip()) for n, v in read.headers] == [
        (name.lower(), value) for name, value in pairs
    ]


def test_a_head_is_read_once():
    assert read_head(head("a: 1")) is read_head(head("a: 1"))
    assert read_head(head("a: " + "1" * 3000)) is not read_head(head("a: " + "1" * 3000))
