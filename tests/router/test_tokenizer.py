"""Every model's tokenizer, loaded beside the loop and asked for each request."""

import asyncio
import json

import pytest

from router.core.fleet import Replica
from router.openai_api import FAMILIES, parse
from router.tokenizer import LONG_BODY_BYTES, Tokenizers
from router.tokenizer_config import ANY, TokenizerConfig
from workers import demo_model

DEMO = TokenizerConfig(source="demo")


def call(model="m", text="hello"):
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    return parse(FAMILIES["/v1/chat/completions"], json.dumps(body).encode())


def replica(*models, root=None, adapters=()):
    return Replica("r", "http://r", models, root=root, adapters=frozenset(adapters))


class Running:
    """Tokenizers that have loaded what they are to load."""

    def __init__(self, configured=None, *replicas):
        self._tokenizers, self._replicas = Tokenizers(configured or {}), replicas

    async def __aenter__(self):
        self._tokenizers.start()
        for replica in self._replicas:
            self._tokenizers.follow(replica)
        await self._tokenizers.settled()
        return self._tokenizers

    async def __aexit__(self, *_):
        await self._tokenizers.stop()


async def test_requests_are_known_by_their_text_until_the_tokenizer_is_there():
    tokenizers = Tokenizers({"m": DEMO})
    tokenizers.start()
    before = await tokenizers.read(call())
    await tokenizers.settled()
    after = await tokenizers.read(call())
    await tokenizers.stop()
    assert (before.prompt.token_ids, before.reason) == (None, "its tokenizer is being loaded")
    assert after.sendable
    assert after.prompt.token_ids


@pytest.mark.parametrize(
    ("configured", "known"),
    [
        ({"m": DEMO}, {"m": True, "other": False}),
        ({ANY: DEMO}, {"m": True, "other": True}),
        ({"m": DEMO, ANY: TokenizerConfig(source="/nonexistent")}, {"m": True, "other": False}),
        ({}, {"m": False, "other": False}),
    ],
)
async def test_a_model_has_the_tokenizer_that_is_configured(configured, known):
    async with Running(configured, replica("m"), replica("other")) as tokenizers:
        for model, is_known in known.items():
            assert (tokenizers.lacking(model) is None) is is_known
            assert ((await tokenizers.read(call(model))).prompt.token_ids is not None) is is_known


async def test_a_model_that_is_not_configured_has_the_one_its_engine_names():
    folder = str(demo_model.tokenizer_dir())
    async with Running(
        {}, replica("m", "other-name", root=folder), replica("far", root="/far/away")
    ) as tokenizers:
        assert (await tokenizers.read(call("m"))).sendable
        assert (await tokenizers.read(call("other-name"))).sendable
        assert tokenizers.lacking("far") == "the model has no tokenizer here"


async def test_an_adapter_is_tokenised_as_its_model_and_keyed_apart():
    lora = replica("m", "sql", adapters=["sql"])
    async with Running({"m": DEMO}, lora) as tokenizers:
        plain, adapted = await tokenizers.read(call("m")), await tokenizers.read(call("sql"))
    assert adapted.sendable
    assert adapted.prompt.token_ids == plain.prompt.token_ids
    assert (plain.prompt.root, adapted.prompt.root != 0) == (0, True)


async def test_an_adapter_of_a_model_without_a_tokenizer_is_keyed_apart_too():
    async with Running({}, replica("m", "sql", adapters=["sql"])) as tokenizers:
        assert (await tokenizers.read(call("sql"))).prompt.root != 0


async def test_a_tokenizer_that_cannot_be_loaded_is_said(caplog):
    async with Running({"m": TokenizerConfig(source="/nonexistent")}) as tokenizers:
        reading = await tokenizers.read(call())
        assert "its tokenizer cannot be loaded" in tokenizers.lacking("m")
    assert (reading.prompt.token_ids, reading.reason) == (None, tokenizers.lacking("m"))
    assert "holds no tokenizer.json" in caplog.text


async def test_long_requests_are_read_beside_the_loop():
    """While one is read, the loop turns."""
    text = "The herd moves as one. " * (2 * LONG_BODY_BYTES // 23)
    async with Running({"m": DEMO}) as tokenizers:
        turns = 0
        reading = asyncio.ensure_future(tokenizers.read(call(text=text)))
        while not reading.done():
            turns += 1
            await asyncio.sleep(0)
        assert turns > 2
        short = await tokenizers.read(call(text=text[:100]))
    assert reading.result().sendable
    assert reading.result().prompt.num_tokens > short.prompt.num_tokens


async def test_models_with_one_tokenizer_share_it():
    async with Running({"a": DEMO, "b": DEMO}) as tokenizers:
        assert tokenizers._by_name["a"] is tokenizers._by_name["b"]


async def test_what_is_still_loaded_is_given_up():
    tokenizers = Tokenizers({"m": DEMO})
    tokenizers.start()
    await tokenizers.stop()
    assert tokenizers.lacking("m") is not None
