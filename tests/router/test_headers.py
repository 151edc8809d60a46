import pytest

from router.http.headers import to_client, to_engine, to_router, tokens


@pytest.mark.parametrize(
    "name",
    [
        b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization",
        b"te", b"trailer", b"transfer-encoding", b"upgrade", b"http2-settings", b"content-length",
        b"x-request-id",
    ],
)  # fmt: skip
def test_what_is_of_one_hop_or_written_anew_passes_in_no_direction(name):
    headers = [(b"a", b"1"), (name, b"x"), (b"b", b"2")]
    assert to_engine(headers) == to_router(headers) == to_client(headers) == [(b"a", b"1"), (b"b", b"2")]


def test_what_connection_names_is_of_one_hop():
    headers = [(b"connection", b"close, X-A"), (b"x-a", b"1"), (b"x-b", b"2"), (b"connection", b" x-c ,")]
    assert to_engine([*headers, (b"x-c", b"3")]) == [(b"x-b", b"2")]


@pytest.mark.parametrize("name", [b"host", b"expect", b"accept-encoding"])
def test_what_engines_do_not_get(name):
    assert to_engine([(name, b"x"), (b"traceparent", b"00-1")]) == [(b"traceparent", b"00-1")]


@pytest.mark.parametrize("name", [b"authorization", b"x-api-key"])
def test_keys_pass_to_other_routers_and_no_further(name):
    assert to_engine([(name, b"x")]) == []
    assert to_router([(name, b"x")]) == [(name, b"x")]


@pytest.mark.parametrize("name", [b"access-control-allow-origin", b"access-control-expose-headers"])
def test_what_clients_are_told_by_the_router_alone(name):
    assert to_client([(name, b"*"), (b"vary", b"origin")]) == [(b"vary", b"origin")]


def test_a_list_may_be_given_in_parts():
    headers = [(b"connection", b"Close,"), (b"x", b"y"), (b"connection", b"\tUPGRADE ")]
    assert tokens(headers, b"connection") == {b"close", b"upgrade", b""}
    assert tokens(headers, b"te") == frozenset()
