from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.http.framing import MAX_SIZE_LINE, Chunked, FramingError, Sized, UntilClose


def fed(framing, pieces):
    return b"".join(framing.feed(piece) for piece in pieces)


def pieces_of(data, cuts):
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]


def chunked(parts, extension=b""):
    return b"".join(b"%x%b\r\n%b\r\n" % (len(p), extension, p) for p in parts) + b"0\r\n\r\n"


@given(
    parts=st.lists(st.binary(min_size=1, max_size=40)),
    cuts=st.lists(st.integers(min_value=0), max_size=20),
    extension=st.sampled_from([b"", b";a=b", b" "]),
    rest=st.binary(max_size=5),
)
def test_any_split_of_a_chunked_body_gives_its_payload(parts, cuts, extension, rest):
    framing = Chunked()
    whole = chunked(parts, extension)
    assert fed(framing, pieces_of(whole, cuts)) == b"".join(parts)
    assert framing.done
    assert framing.eof()


def test_bytes_after_the_body_are_kept_apart():
    framing = Chunked()
    assert framing.feed(chunked([b"ab"]) + b"HTTP/1.1 200") == b"ab"
    assert framing.rest == b"HTTP/1.1 200"


def test_trailers_are_dropped():
    framing = Chunked()
    assert framing.feed(b"1\r\na\r\n0\r\nexpires: never\r\n\r\n") == b"a"
    assert framing.done


@pytest.mark.parametrize(
    "data",
    [
        b"x\r\n",
        b"\r\n",
        b"-1\r\n",
        b"0x2\r\nab\r\n",
        b"2\r\nabc\r\n",
        b"2\r\nab\n\n",
        b"2\r\nabXY",
        b"1" * (MAX_SIZE_LINE + 1),
    ],
)
def test_what_is_not_chunked_is_refused(data):
    with pytest.raises(FramingError):
        fed(Chunked(), [data])


@given(cut=st.integers(min_value=0, max_value=8))
def test_a_wrong_line_break_is_found_at_any_split(cut):
    data = b"2\r\nabX\n0\r"
    with pytest.raises(FramingError):
        fed(Chunked(), [data[:cut], data[cut:]])


def test_a_chunked_body_is_cut_anywhere_before_its_end():
    whole = chunked([b"ab", b"c"])
    for length in range(len(whole)):
        framing = Chunked()
        framing.feed(whole[:length])
        assert not framing.eof()


def test_sized_body():
    framing = Sized(3)
    assert fed(framing, [b"a", b"bcd"]) == b"abc"
    assert (framing.done, framing.rest) == (True, b"d")
    assert Sized(0).done
    assert not Sized(1).eof()


def test_body_until_close():
    framing = UntilClose()
    assert framing.feed(b"a") == b"a"
    assert not framing.done
    assert framing.eof()
