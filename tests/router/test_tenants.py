"""Keys and tenants on real sockets: who gets in, how much they get, and that they do not meet in a cache."""

import asyncio
import contextlib
import json
import logging

import httpx
import openai
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from router_wire import (
    LAST_CHUNK,
    VLLM_PAGES,
    WAIT_S,
    answering,
    client,
    engine,
    front_door,
    get,
    post,
    reply,
    said,
    stream,
    until,
)
from support import HERD, ROOT, Start, eventually, free_port, free_ports, router, simulated_engine

from router.errors import ConfigError
from router.health import Endpoint
from router.keys import hash_of, new_key
from router.responses_api import is_sealed, mark, mark_in, new_id
from router.tenants import TenantConfig, TenantsConfig, load, salt_of, seal_of

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
SECRET = "5e" * 32
USAGE = {"prompt_tokens": 30, "completion_tokens": 12, "prompt_tokens_details": {"cached_tokens": 16}}
ANSWER = json.dumps({"id": "c", "usage": USAGE}).encode()
PAGES = {**VLLM_PAGES, CHAT.encode(): reply(ANSWER)}


def written(path, **tenants):
    """A file of tenants, each with a key of its name; replaced as people should."""
    document = {
        "secret": SECRET,
        "tenants": {name: {"keys": [hash_of(f"key of {name}")], **said} for name, said in tenants.items()},
    }
    put(path, yaml.safe_dump(document))
    return path


def put(path, text):
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


def bearer(name):
    return f"authorization: Bearer key of {name}"


def chat(*headers, path=CHAT, **members):
    return post(path, json.dumps({"model": "m", **members}).encode(), *headers)


def sent_body(request):
    return json.loads(request.partition(b"\r\n\r\n")[2])


def sent_salt(it):
    return sent_body(it.requests[-1])["cache_salt"]


@contextlib.asynccontextmanager
async def fleet(path, script=None, **settings):
    """A router that knows the tenants of a file, and its engine."""
    tenants = TenantsConfig(file=str(path))
    async with (
        engine(script or answering(PAGES)) as (it, url),
        front_door(tenants=tenants, **settings) as front,
    ):
        front.membership([Endpoint("a", url)])
        await until(lambda: front.ready)
        it.requests.clear()
        yield front, it


# -- the file


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "a mapping with `tenants` is expected"),
        ("[]", "a mapping with `tenants` is expected"),
        ("tenants: {a: [", "not YAML: "),
        ("{}", "tenants: Field required"),
        ("tenants: {}\nsecrets: x", "secrets: Extra inputs are not permitted"),
        ("tenants: {a b: {}}", "tenants.a b.[key]: String should match pattern"),
        ("tenants: {a: {keys: [sk-herd-plain]}}", "tenants.a.keys.0: String should match pattern"),
        ("tenants: {a: {rpm: 1}}", "tenants.a.rpm: Extra inputs are not permitted"),
        ("tenants: {a: {weight: 0}}", "tenants.a.weight: Input should be greater than 0"),
        ("tenants: {a: {tokens_per_minute: 0}}", "tenants.a.tokens_per_minute: Input should be greater"),
        ("tenants: {a: {}, b: {}}", "secret: keeps the caches of tenants apart"),
        ("secret: abc\ntenants: {a: {}}", "secret: String should match pattern"),
        (
            f"secret: {SECRET}\ntenants: {{a: {{keys: [{hash_of('k')}]}}, b: {{keys: [{hash_of('k')}]}}}}",
            "tenants.b.keys: a key of 'a' too",
        ),
    ],
)
def test_a_wrong_file_is_named_with_its_key(tmp_path, text, told):
    path = tmp_path / "tenants.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load(path)
    assert str(raised.value).startswith(f"{path}: {told}")
    assert "plain" not in str(raised.value)  # what was meant for a hash may be a key


@pytest.mark.parametrize("text", ["tenants: {a: {}}", '{"tenants": {"a": {"keys": []}}}'])
def test_one_tenant_needs_no_secret(tmp_path, text):
    path = tmp_path / "tenants"
    path.write_text(text)
    assert list(load(path).tenants) == ["a"]


def test_the_file_that_ships_asks_for_a_secret_and_is_right_otherwise(tmp_path):
    shipped = ROOT / "deploy" / "tenants" / "tenants.yaml"
    with pytest.raises(ConfigError, match="secret: String should match pattern"):
        load(shipped)
    path = tmp_path / "tenants.yaml"
    path.write_text(shipped.read_text().replace("PUT HERE WHAT herd key secret PRINTS", SECRET))
    assert list(load(path).tenants) == ["shop", "search", "ads", "batch"]


def test_a_router_with_a_wrong_file_does_not_start(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        asyncio.run(_opened(tmp_path / "none.yaml"))


async def _opened(path):
    async with fleet(path):
        pass


# -- salts

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
GIVEN = st.none() | st.text(min_size=1)


def salt(name, given=None, secret=SECRET, **config):
    return salt_of(name, TenantConfig(**config), secret)(given)


@given(NAMES, GIVEN)
def test_a_salt_is_one_that_vllm_takes_and_always_the_same(name, given):
    made = salt(name, given)
    assert 0 < len(made) <= 128 and not set("@/\\\0") & set(made)
    assert made == salt(name, given)


@given(NAMES, NAMES, GIVEN, GIVEN)
def test_salts_are_the_same_only_for_the_same_tenant_and_salt(one, two, first, second):
    assert (salt(one, first) == salt(two, second)) == ((one, first) == (two, second))
    assert salt(one, first) != salt(one, first, secret="f0" * 32)


@given(NAMES, NAMES, GIVEN)
def test_a_group_shares_salts_and_is_no_tenant(one, two, given):
    assert salt(one, given, shared_cache="g") == salt(two, given, shared_cache="g")
    assert salt(one, given, shared_cache=two) != salt(two, given)


@given(NAMES, NAMES)
def test_an_id_of_a_response_is_one_tenants(one, two):
    made = new_id("a replica", seal_of(one, SECRET))
    assert mark_in(made) == mark("a replica")
    assert is_sealed(made, seal_of(one, SECRET))
    assert is_sealed(made, seal_of(two, SECRET)) == (one == two)
    assert not is_sealed(new_id("a replica"), seal_of(one, SECRET))


def test_without_a_secret_nothing_is_kept_apart():
    assert salt_of("a", TenantConfig(), None) is None
    assert seal_of("a", None) is None


# -- who gets in


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("authorization: Bearer wrong",),
        ("authorization: Basic key of a",),
        ("authorization: key of a",),
        ("x-api-key: wrong",),
        ("authorization: Bearer ",),
        (f"authorization: Bearer {hash_of('key of a')}",),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/tokenize", "/v1/responses", "/v1/unheard/of"])
async def test_without_a_known_key_nothing_is_answered(tmp_path, headers, path):
    async with fleet(written(tmp_path / "t", a={})) as (front, it):
        status, said_with, body = await said(front.port, chat(*headers, path=path))
        assert (status, said_with["www-authenticate"]) == (401, "Bearer")
        assert json.loads(body)["error"]["code"] == "invalid_api_key"
        assert not it.requests


async def test_anthropics_clients_are_told_in_their_way(tmp_path):
    async with fleet(written(tmp_path / "t", a={})) as (front, _):
        status, _, body = await said(front.port, chat(path=MESSAGES))
        assert (status, json.loads(body)["error"]["type"]) == (401, "authentication_error")


@pytest.mark.parametrize(
    "headers",
    [
        ("authorization: Bearer key of a",),
        ("Authorization: bearer  key of a",),
        ("x-api-key: key of a",),
        ("authorization: Bearer of something else", "x-api-key: key of a"),
    ],
)
async def test_with_the_key_it_is_answered_and_the_engine_never_sees_it(tmp_path, headers):
    async with fleet(written(tmp_path / "t", a={})) as (front, it):
        assert (await said(front.port, chat(*headers)))[0] == 200
        (request,) = it.requests
        assert b"key of a" not in request
        assert b"authorization" not in request.lower()


async def test_models_need_a_key_and_health_does_not(tmp_path):
    async with fleet(written(tmp_path / "t", a={})) as (front, _):
        for path in ("/v1/models", "/v1/models/m", "/nothing"):
            assert (await get(front.port, path))[0] == 401
        assert (await get(front.port, "/v1/models", bearer("a")))[0] == 200
        assert (await get(front.port, "/nothing", bearer("a")))[0] == 404
        for path in ("/health", "/ready"):
            assert (await get(front.port, path))[0] == 200


async def test_a_browser_may_ask_what_it_may_send(tmp_path):
    cors = {"allowed_origins": ["https://page"]}
    preflight = f"OPTIONS {CHAT} HTTP/1.1\r\nhost: h\r\norigin: https://page\r\n"
    preflight += "access-control-request-method: POST\r\n\r\n"
    async with fleet(written(tmp_path / "t", a={}), cors=cors) as (front, _):
        async with client(front.port) as c:
            await c.send(preflight.encode())
            status, headers = await c.head()
        assert (status, headers["access-control-allow-origin"]) == (204, "https://page")
        status, headers, _ = await said(front.port, chat("origin: https://page"))
        assert (status, headers["access-control-allow-origin"]) == (401, "https://page")


async def test_keys_alone_make_one_tenant_whose_cache_is_nobodys_secret():
    tenants = {"keys": [hash_of("one"), hash_of("two")]}
    async with engine(answering(PAGES)) as (it, url), front_door(tenants=tenants) as front:
        front.membership([Endpoint("a", url)])
        await until(lambda: front.ready)
        assert (await said(front.port, chat()))[0] == 401
        for key in ("one", "two"):
            assert (await said(front.port, chat(f"authorization: Bearer {key}")))[0] == 200
        assert sent_body(it.requests[-1]) == {"model": "m"}
        assert counted(front, "requests", tenant="default", code="200") == 2


async def test_without_keys_anybody_may_ask_as_ever():
    async with engine(answering(PAGES)) as (it, url), front_door() as front:
        front.membership([Endpoint("a", url)])
        await until(lambda: front.ready)
        status, headers, _ = await said(front.port, chat(cache_salt="mine"))
        assert status == 200
        assert not [name for name in headers if name.startswith("x-ratelimit")]
        assert it.requests[-1].endswith(b'{"model": "m", "cache_salt": "mine"}')  # as it came


# -- how much


def counted(front, name, **labels):
    return front.metrics.registry.get_sample_value(f"herd_tenant_{name}_total", labels)


async def test_requests_at_once_are_limited_and_end_with_their_clients(tmp_path):
    async def script(request, reader, writer):
        if request.startswith(b"POST"):
            writer.write(stream(b'data: {"choices":[{"index":0,"token_ids":[1]}]}\n\n'))
            await writer.drain()
            await reader.readexactly(1)
        await answering(VLLM_PAGES)(request, reader, writer)

    path = written(tmp_path / "t", a={"max_concurrent_requests": 1}, b={})
    async with fleet(path, script) as (front, _):
        async with client(front.port) as c:
            await c.send(chat(bearer("a"), stream=True))
            assert (await c.head())[0] == 200
            status, headers, body = await said(front.port, chat(bearer("a")))
            assert (status, headers["retry-after"]) == (429, "1")
            error = json.loads(body)["error"]
            assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
            assert "1 requests at once" in error["message"]
            status, _, body = await said(front.port, chat(bearer("a"), path=MESSAGES))
            assert (status, json.loads(body)["error"]["type"]) == (429, "rate_limit_error")
            async with client(front.port) as other:
                await other.send(chat(bearer("b"), stream=True))
                assert (await other.head())[0] == 200
        await until(lambda: counted(front, "requests", tenant="a", code="499") == 1)
        assert counted(front, "requests", tenant="a", code="429") == 2
        assert counted(front, "output_tokens", tenant="a") == 1  # what had come of it
        async with client(front.port) as c:
            await c.send(chat(bearer("a"), stream=True))
            assert (await c.head())[0] == 200


async def test_requests_per_minute_are_told_and_kept_to(tmp_path):
    async with fleet(written(tmp_path / "t", a={"requests_per_minute": 2})) as (front, it):
        for left in ("1", "0"):
            status, headers, _ = await said(front.port, chat(bearer("a")))
            assert (status, headers["x-ratelimit-remaining-requests"]) == (200, left)
            assert headers["x-ratelimit-limit-requests"] == "2"
        assert headers["x-ratelimit-reset-requests"] in ("59s", "60s")
        status, headers, _ = await said(front.port, chat(bearer("a")))
        assert (status, headers["x-ratelimit-remaining-requests"]) == (429, "0")
        assert 0 < int(headers["retry-after"]) <= 30
        assert len(it.requests) == 2
        assert (await get(front.port, "/v1/models", bearer("a")))[0] == 200  # no engine works for it


async def test_tokens_per_minute_are_what_engines_report(tmp_path):
    async with fleet(written(tmp_path / "t", a={"tokens_per_minute": 10})) as (front, _):
        status, headers, _ = await said(front.port, chat(bearer("a")))
        assert (status, headers["x-ratelimit-remaining-tokens"]) == (200, "10")
        status, headers, body = await said(front.port, chat(bearer("a")))  # 42 are charged
        assert (status, headers["x-ratelimit-remaining-tokens"]) == (429, "0")
        assert "10 tokens per minute" in json.loads(body)["error"]["message"]
        assert 180 < int(headers["retry-after"]) <= 198
        assert counted(front, "prompt_tokens", tenant="a") == 30
        assert counted(front, "cached_tokens", tenant="a") == 16
        assert counted(front, "output_tokens", tenant="a") == 12


async def test_a_stream_counts_too(tmp_path):
    usage = b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\n"
    whole = stream(usage, b"data: [DONE]\n\n") + LAST_CHUNK
    async with fleet(written(tmp_path / "t", a={}), answering({**PAGES, CHAT.encode(): whole})) as (front, _):
        status, _, body = await said(front.port, chat(bearer("a"), stream=True))
        assert (status, body) == (200, b"data: [DONE]\n\n")
        assert counted(front, "output_tokens", tenant="a") == 12


# -- a file that changes


async def until_answered(front, name, status):
    """Asks until the router answers so."""
    async with asyncio.timeout(WAIT_S):
        while (await said(front.port, chat(bearer(name))))[0] != status:
            await asyncio.sleep(0.02)


def refused(front):
    return front.metrics.registry.get_sample_value("herd_tenants_file_refused")


async def test_a_changed_file_counts_at_once_for_everybody(tmp_path):
    path = written(tmp_path / "t", a={"requests_per_minute": 100})
    async with fleet(path) as (front, _):
        await said(front.port, chat(bearer("a")))
        written(path, a={"requests_per_minute": 50}, b={})
        await until_answered(front, "b", 200)
        _, headers, _ = await said(front.port, chat(bearer("a")))
        assert headers["x-ratelimit-limit-requests"] == "50"
        written(path, b={})
        await until_answered(front, "a", 401)


@pytest.mark.parametrize("spoil", ["tenants: {a: {weight: none}}", None])
async def test_a_wrong_file_changes_nothing_and_is_told_of(tmp_path, caplog, spoil):
    path = written(tmp_path / "t", a={})
    async with fleet(path) as (front, _):
        with caplog.at_level(logging.ERROR, "router.tenants"):
            if spoil is None:
                path.unlink()
            else:
                put(path, spoil)
            await until(lambda: refused(front) == 1)
        (told,) = [record.getMessage() for record in caplog.records if record.name == "router.tenants"]
        assert str(path) in told
        assert ("No such file" if spoil is None else "tenants.a.weight: ") in told
        assert (await said(front.port, chat(bearer("a"))))[0] == 200
        written(path, b={})
        await until_answered(front, "b", 200)
        assert refused(front) == 0


# -- apart in caches


@pytest.mark.parametrize(
    "path", [CHAT, "/v1/completions", MESSAGES, "/v1/responses", "/v1/embeddings", "/score"]
)
async def test_engines_get_a_salt_of_the_tenants(tmp_path, path):
    pages = answering({**PAGES, path.encode(): reply(b"{}")})
    async with fleet(written(tmp_path / "t", a={}, b={}, c={"shared_cache": "g"}), pages) as (front, it):
        salts = []
        for headers, members in [
            ((bearer("a"),), {}),
            ((bearer("a"),), {"cache_salt": None}),
            ((bearer("a"),), {"cache_salt": "mine"}),
            ((bearer("b"),), {"cache_salt": "mine"}),
            ((bearer("b"),), {}),
            ((bearer("c"),), {}),
        ]:
            await said(front.port, chat(*headers, path=path, prompt="p", **members))
            salts.append(sent_salt(it))
            assert sent_body(it.requests[-1])["prompt"] == "p"
        assert salts[0] == salts[1] == salt("a")
        assert salts[2] == salt("a", "mine")
        assert salts[5] == salt("c", shared_cache="g")
        assert len(set(salts)) == 5


async def test_a_stored_response_is_its_tenants_alone(tmp_path):
    async def script(request, reader, writer):
        if request.startswith(b"POST /v1/responses "):
            writer.write(reply(json.dumps({"id": sent_body(request)["request_id"]}).encode()))
        elif b" /v1/responses/" in request:
            writer.write(reply(b'{"stored": true}'))
        else:
            await answering(VLLM_PAGES)(request, reader, writer)

    async with fleet(written(tmp_path / "t", a={}, b={}), script) as (front, _):
        asked = chat(bearer("a"), path="/v1/responses", request_id="resp_of_b")
        made = json.loads((await said(front.port, asked))[2])["id"]
        assert made.startswith("resp_herd_")
        for name, about, status in (("a", made, 200), ("b", made, 404), ("a", "resp_1", 404)):
            assert (await get(front.port, f"/v1/responses/{about}", bearer(name)))[0] == status
            asked = chat(bearer(name), path="/v1/responses", previous_response_id=about)
            told, _, body = await said(front.port, asked)
            assert told == status
            if status == 404:
                assert json.loads(body)["error"]["code"] == "previous_response_not_found"


async def test_what_is_no_salt_is_refused(tmp_path):
    async with fleet(written(tmp_path / "t", a={})) as (front, it):
        status, _, body = await said(front.port, chat(bearer("a"), cache_salt=1))
        assert (status, json.loads(body)["error"]["param"]) == (400, "cache_salt")
        assert not it.requests


async def test_where_engines_heed_no_salt_tenants_are_refused(tmp_path):
    async with fleet(written(tmp_path / "t", a={})) as (front, it):
        status, _, body = await said(front.port, chat(bearer("a"), path="/v2/embed"))
        assert (status, json.loads(body)["error"]["code"]) == (403, "cache_not_isolated")
        assert not it.requests


async def test_a_tenant_may_be_trusted_with_kv_transfer(tmp_path):
    path = written(tmp_path / "t", a={"allow_kv_transfer_params": True}, b={})
    async with fleet(path) as (front, it):
        for name in "ab":
            await said(front.port, chat(bearer(name), kv_transfer_params={}))
        assert ["kv_transfer_params" in sent_body(request) for request in it.requests] == [True, False]


QUESTION = [{"role": "user", "content": "How many sheep are in the herd on the hill? " * 40}]


def test_tenants_do_not_meet_in_the_cache_of_an_engine(start: Start, tmp_path):
    """On real processes, through the openai client: what is cached shows in its count and is predicted."""
    path = written(tmp_path / "t", a={}, b={}, c={"shared_cache": "g"}, d={"shared_cache": "g"})
    fleet = router(start, simulated_engine(start), flags=("--api-keys-file", str(path)))
    with httpx.Client(trust_env=False, verify=False) as http:

        def cached(name, **extra):
            client = openai.OpenAI(
                base_url=f"{fleet.url}/v1", api_key=f"key of {name}", http_client=http, max_retries=0
            )
            model = client.models.list().data[0].id
            answer = client.chat.completions.create(
                model=model, messages=QUESTION, max_tokens=2, extra_body=extra
            )
            return answer.usage.prompt_tokens_details.cached_tokens

        assert cached("a") == 0
        assert cached("a") > 100
        assert cached("b") == 0
        assert cached("a", cache_salt="x") == cached("b", cache_salt="x") == 0
        assert cached("a", cache_salt="x") > 100
        assert cached("c") == 0
        assert cached("d") > 100
        with pytest.raises(openai.AuthenticationError):
            cached("nobody")
        told = eventually(lambda: httpx.get(f"{fleet.admin}/decisions?last=8", trust_env=False).json())
    attempts = [each["attempts"][-1] for each in told]
    for attempt in attempts:
        assert attempt["predicted"]["cached_tokens"] == attempt["observed"]["cached_tokens"]


# -- admin ports


async def test_an_admin_port_with_a_key_asks_for_it():
    key = new_key()
    async with front_door(admin_key=hash_of(key)) as front:
        for path in ("/metrics", "/fleet", "/decisions", "/targets", "/routers", "/arrivals", "/nothing"):
            status, headers, body = await get(front.admin_port, path)
            assert (status, headers["www-authenticate"]) == (401, 'Bearer, Basic realm="herd"')
            assert json.loads(body)["error"]["code"] == "invalid_api_key"
            assert (await get(front.admin_port, path, f"authorization: Bearer {key}x"))[0] == 401
            status, _, _ = await get(front.admin_port, path, f"authorization: Bearer {key}")
            assert status == (404 if path == "/nothing" else 200)
        assert (await get(front.admin_port, "/health"))[0] == 200


@pytest.mark.parametrize(("password", "status"), [("KEY", 200), ("x", 401), ("", 401)])
async def test_a_browser_sends_the_key_as_a_password(password, status):
    key = new_key()
    sent = httpx.BasicAuth("anybody", password.replace("KEY", key))._auth_header
    async with front_door(admin_key=hash_of(key)) as front:
        assert (await get(front.admin_port, "/fleet", f"authorization: {sent}"))[0] == status
        assert (await get(front.admin_port, "/fleet", "authorization: Basic !"))[0] == 401


async def test_metrics_alone_may_be_open():
    async with front_door(admin_key=hash_of("k"), admin_open_metrics=True, admin_host="0.0.0.0") as front:
        assert (await get(front.admin_port, "/metrics"))[0] == 200
        assert (await get(front.admin_port, "/fleet"))[0] == 401


def test_commands_send_the_key_of_the_environment(start: Start):
    port, admin = str(free_port()), str(free_ports(1))
    key = {"HERD_ADMIN_KEY": "the admin key"}
    ports = ("--host", "127.0.0.1", "--port", port, "--admin-port", admin, "--admin-host", "0.0.0.0")
    start(*HERD, "route", *ports, "--worker-urls", "http://127.0.0.1:1", env=key)

    def status(env):
        asked = start(*HERD, "status", "--port", port, env=env)
        return asked.process.wait(WAIT_S), asked.output

    eventually(lambda: status(key)[0] == 0, timeout=30)
    assert "ADMIN PORT" in status(key)[1]
    for sent, told in (("x", "HERD_ADMIN_KEY is not its key"), ("", "HERD_ADMIN_KEY is not set")):
        code, output = status({"HERD_ADMIN_KEY": sent})
        assert (code, told in output) == (1, True)
