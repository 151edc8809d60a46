"""The reader of requests by itself: what it takes, what it refuses, and that splits change nothing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from request_cases import LIMITS, REFUSED, SHORT, TAKEN, get, line, read
from router_wire import post

from router.errors import BadRequest, TooLarge
from router.http.requests import Limits, RequestReader


@pytest.mark.parametrize("case", TAKEN)
def test_what_is_taken(case):
    sent, target, body = TAKEN[case]
    requests, error = read(sent + get(target=b"/next"))
    assert error is None
    assert [(r.target, r.body) for r in requests] == [(target, body), ("/next", b"")]
    assert requests[0].header(b"authorization") is None


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    sent, status = REFUSED[case]
    requests, error = read(get(target=b"/before") + sent)
    assert [r.target for r in requests] == ["/before"]
    assert error is not None and error.status == status
    assert error.message.count("\n") == 0


def outcome(requests, error):
    return requests, error and (error.status, error.message)


@pytest.mark.parametrize("sent", SHORT)
def test_single_bytes_give_the_same(sent):
    assert outcome(*read(*(sent[i : i + 1] for i in range(len(sent))))) == outcome(*read(sent))


# Parts of heads and bodies, some of them wrong: what comes together is seldom a request, often nearly.
PIECES = [
    b"GET / HTTP/1.1\r\n", b"POST http://h/p?q HTTP/1.1\r\n", b"host: h\r\n", b"\r\n", b"\n", b"\r", b"\0",
    b"content-length: 3\r\n", b"content-length: 99\r\n", b"transfer-encoding: chunked\r\n", b"a:\tb \r\n",
    b"x" * 40 + b": " + b"y" * 40 + b"\r\n", b"abc", b"3\r\nabc\r\n", b"2;x\r\nab\r\n", b"0\r\n\r\n",
    b"0\r\n", b"t: r\r\n\r\n", b"ff\r\n", b"GET /" + b"p" * 300, b" ", b":",
]  # fmt: skip
SMALL = Limits(head_bytes=250, headers=6, body_bytes=60)
messages = st.one_of(
    st.sampled_from([sent for sent in SHORT if len(sent) < 400]),
    st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join),
)


@settings(max_examples=1500)
@given(st.lists(messages, min_size=1, max_size=3).map(b"".join), st.data())
def test_wherever_the_bytes_are_split_the_result_is_the_same(sent, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(sent)))))
    parts = [sent[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
    for limits in (LIMITS, SMALL):
        assert outcome(*read(*parts, limits=limits)) == outcome(*read(sent, limits=limits))


@pytest.mark.parametrize(
    ("version", "connection", "keeps"),
    [
        (b"1.1", [], True),
        (b"1.1", [b"connection: close"], False),
        (b"1.1", [b"connection: Foo, CLOSE"], False),
        (b"1.1", [b"connection: foo", b"connection: close"], False),
        (b"1.1", [b"connection: keep-alive, close"], False),
        (b"1.1", [b"connection: closed"], True),
        (b"1.0", [], False),
        (b"1.0", [b"connection: Keep-Alive"], True),
        (b"1.0", [b"connection: keep-alive, close"], False),
    ],
)
def test_whether_the_connection_is_kept(version, connection, keeps):
    (request,), _ = read(line(b"GET / HTTP/" + version, *connection))
    assert (request.version.encode(), request.keep_alive) == (version, keeps)


@pytest.mark.parametrize(
    ("headers", "body", "must"),
    [
        ([b"expect: 100-continue", b"content-length: 4"], b"", True),
        ([b"expect: 100-Continue", b"transfer-encoding: chunked"], b"", True),
        ([b"expect: 100-continue", b"content-length: 4"], b"b", False),  # it did not wait
        ([b"expect: 100-continue"], b"", False),
        ([b"expect: something", b"content-length: 4"], b"", False),
        ([b"content-length: 4"], b"", False),
    ],
)
def test_who_waits_for_100_continue(headers, body, must):
    reader = RequestReader(LIMITS)
    reader.feed(line(b"POST / HTTP/1.1", *headers) + body)
    reader.next()
    assert reader.must_continue is must


def test_names_are_lower_case_and_the_first_of_a_name_counts():
    (request,), _ = read(get(b"X-A: 1 \t", b"x-a:2"))
    assert request.headers == [(b"host", b"h"), (b"x-a", b"1"), (b"x-a", b"2")]
    assert request.header(b"x-a") == b"1"


def test_what_is_held_is_counted():
    reader = RequestReader(LIMITS)
    reader.feed(post("/p", b"x" * 10)[:-4])
    assert reader.next() is None
    assert (reader.held, reader.between) == (6, False)
    reader.feed(b"xxxx")
    assert reader.next() is not None
    assert (reader.held, reader.between) == (0, True)


def test_a_refusal_knows_the_path_once_that_is_read():
    reader = RequestReader(LIMITS)
    reader.feed(line(b"POST http://h/v1/messages?q HTTP/1.1", b"content-length: 101"))
    with pytest.raises(TooLarge):
        reader.next()
    assert reader.path == "/v1/messages"
    reader = RequestReader(LIMITS)
    reader.feed(get() + b"nonsense\r\n\r\n")
    assert reader.next() is not None and reader.path == "/p"
    with pytest.raises(BadRequest):
        reader.next()
    assert reader.path == ""
