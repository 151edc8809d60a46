"""Which streams go on where a character was not whole when they broke off."""

from __future__ import annotations

import json
from typing import Any

import fastokens
import pytest

from router.continuation import Continuation, Leg, NotContinuable
from router.http.sse import EventStream
from router.http.transcript import Transcript
from router.openai_api import FAMILIES, parse
from router.tokenizer import Tokenizers
from router.tokenizer_config import TokenizerConfig
from workers import demo_model

SAY: dict[str, Any] = {"model": "m", "prompt": "Tell", "stream": True, "max_tokens": 50}


async def onward(members: dict[str, Any]) -> Leg | bytes:
    """What is asked next of a stream that broke off behind a word and the first token of an animal."""
    coder = fastokens.Tokenizer.from_file(str(demo_model.tokenizer_dir() / "tokenizer.json"))
    word, animal = coder.encode("herd").ids, coder.encode("🐄").ids
    assert len(animal) > 1
    stream = EventStream(keep_ids=True, transcript=Transcript())
    for text, ids in (("herd", word), ("", animal[:1])):
        choice = {"index": 0, "text": text, "finish_reason": None, "token_ids": ids}
        stream.feed(b"data: %b\n\n" % json.dumps({"id": "c", "choices": [choice]}).encode())
    tokenizers = Tokenizers({"m": TokenizerConfig(source="demo")})
    tokenizers.start()
    try:
        await tokenizers.settled()
        call = parse(FAMILIES["/v1/completions"], json.dumps(SAY | members).encode())
        asked = Leg(call, await tokenizers.read(call))
        return Continuation({}, tokenizers).onward(asked, stream, 0)
    finally:
        await tokenizers.stop()


@pytest.mark.parametrize(
    "members", [{}, {"temperature": 0, "return_token_ids": True}, {"temperature": 0, "logprobs": 1}]
)
async def test_it_goes_on_before_the_character(members):
    leg = await onward(members)
    assert isinstance(leg, Leg) and leg.rest is not None
    assert leg.rest.seam.kept < len(leg.rest.told.ids)


@pytest.mark.parametrize("members", [{"return_token_ids": True}, {"logprobs": 0}])
async def test_nobody_is_told_of_tokens_that_are_drawn_anew(members):
    with pytest.raises(NotContinuable, match="drawn anew"):
        await onward(members)
