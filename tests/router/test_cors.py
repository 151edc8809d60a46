"""What a browser is told, by the rules of the Fetch standard."""

import pytest
from request_cases import line, read
from router_wire import client, engine, post, relaying, reply, says, serving

from router.http.cors import EXPOSED, METHODS, Cors, is_preflight

PAGE = b"https://app.example"
ANYONE = Cors(allowed_origins=("*",))
PAGES = Cors(allowed_origins=(PAGE.decode(), "https://other.example"))
PREFLIGHT = line(
    b"OPTIONS /v1/chat/completions HTTP/1.1",
    b"origin: " + PAGE,
    b"access-control-request-method: POST",
    b"access-control-request-headers: authorization,content-type",
)


def told(cors, sent, origin=PAGE):
    (request,), _ = read(sent)
    headers = cors.headers(request, origin)
    assert len(headers) == len(dict(headers))
    return {name.removeprefix(b"access-control-").decode(): value for name, value in headers}


def test_a_preflight_is_answered_with_what_was_asked_for():
    assert told(ANYONE, PREFLIGHT) == {
        "allow-origin": b"*",
        "allow-methods": METHODS,
        "allow-headers": b"authorization,content-type",
        "max-age": b"600",
    }


def test_a_preflight_of_a_listed_page():
    cors = PAGES.model_copy(update={"allow_credentials": True, "allowed_methods": ("POST",)})
    assert told(cors.model_copy(update={"allowed_headers": ("authorization", "x-a")}), PREFLIGHT) == {
        "allow-origin": PAGE,
        "vary": b"origin",
        "allow-credentials": b"true",
        "allow-methods": b"POST",
        "allow-headers": b"authorization, x-a",
        "max-age": b"600",
    }


@pytest.mark.parametrize(
    ("cors", "origin", "expected"),
    [
        (ANYONE, PAGE, {"allow-origin": b"*", "expose-headers": EXPOSED}),
        (ANYONE, b"null", {"allow-origin": b"*", "expose-headers": EXPOSED}),
        (PAGES, PAGE, {"allow-origin": PAGE, "vary": b"origin", "expose-headers": EXPOSED}),
        (PAGES, PAGE + b".evil", {"vary": b"origin"}),
        (PAGES, b"null", {"vary": b"origin"}),
        (Cors(), PAGE, {}),
    ],
)
def test_who_may_read_a_reply(cors, origin, expected):
    assert told(cors, line(b"GET / HTTP/1.1"), origin) == expected


def test_options_alone_is_no_preflight():
    (plain,), _ = read(line(b"OPTIONS / HTTP/1.1", b"origin: x"))
    (post_,), _ = read(line(b"POST / HTTP/1.1", b"access-control-request-method: POST"))
    assert not is_preflight(plain) and not is_preflight(post_)


async def never(request, reply):
    raise AssertionError("OPTIONS is not for the handler")


@pytest.mark.parametrize("target", [b"*", b"/v1/chat/completions", b"/nothing"])
async def test_options_is_answered_without_the_handler(target):
    async with serving(never, cors=Cors()) as (_, port), client(port) as c:
        for _ in range(2):  # the connection goes on
            await c.send(line(b"OPTIONS %b HTTP/1.1" % target))
            assert await c.head() == (204, {"allow": METHODS.decode()})


async def test_a_preflight_over_the_wire():
    async with serving(never, cors=ANYONE) as (_, port), client(port) as c:
        await c.send(PREFLIGHT)
        status, headers = await c.head()
        assert (status, headers["access-control-allow-origin"]) == (204, "*")


async def test_without_cors_options_is_the_handlers_as_on_the_admin_port():
    async def handler(request, reply):
        reply.send(405, [], b"")

    async with serving(handler) as (_, port), client(port) as c:
        await c.send(PREFLIGHT)
        assert await c.head() == (405, {"content-length": "0"})


@pytest.mark.parametrize("body", [b'{"model":"m"}', b'{"model":"gone"}', b"{"])
async def test_every_reply_tells_it_once_and_it_is_the_routers_word(body):
    """vLLM says whom it allows too when it sees an origin; it does not know the pages that may call us."""
    page = reply(b"{}").replace(b"\r\n\r\n", b"\r\nAccess-Control-Allow-Origin: *\r\n\r\n")
    async with (
        engine(says(page)) as (_, url),
        relaying(url) as (relay, _, _),
        serving(relay, cors=PAGES) as (_, port),
        client(port) as c,
    ):
        await c.send(post("/v1/chat/completions", body, f"origin: {PAGE.decode()}"))
        raw = await c.reader.readuntil(b"\r\n\r\n")
        assert raw.lower().count(b"access-control-allow-origin") == 1
        assert b"access-control-allow-origin: " + PAGE in raw
        assert b"access-control-expose-headers: x-request-id, retry-after" in raw


async def test_who_names_no_origin_is_told_nothing_of_it():
    async with (
        engine(says(reply(b"{}"))) as (_, url),
        relaying(url) as (relay, _, _),
        serving(relay, cors=ANYONE) as (_, port),
        client(port) as c,
    ):
        await c.send(post("/v1/chat/completions", b'{"model":"m"}'))
        assert not [name for name in (await c.head())[1] if name.startswith("access-control")]
