"""The mock engine's bytes are vLLM's."""

import json
import subprocess
import sys

import httpx
import pytest
from support import ROOT, Start, eventually

from loadtests import mock_engine

VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"

# Builds the same stream with vLLM's own classes, in the way of chat_completion/serving.py.
VLLM_EVENTS = """
import json, sys
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionResponse, ChatCompletionResponseChoice, ChatCompletionResponseStreamChoice as Choice,
    ChatCompletionStreamResponse as Chunk, ChatMessage)
from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.serve.engine.protocol import PromptTokenUsageInfo, UsageInfo

id_, created, model, fingerprint, prompt, words = json.loads(sys.argv[1])
common = dict(id=id_, object="chat.completion.chunk", created=created, model=model)

def line(chunk, **how):
    return f"data: {chunk.model_dump_json(exclude_unset=True, **how)}\\n\\n"

def usage(tokens):
    info = UsageInfo(prompt_tokens=len(prompt), completion_tokens=tokens, total_tokens=len(prompt) + tokens,
                     completion_tokens_details=None)
    info.prompt_tokens_details = PromptTokenUsageInfo(cached_tokens=0)
    return info

def events(ids, wants_usage):
    role = DeltaMessage(role="assistant", content="")
    yield line(Chunk(**common, choices=[Choice(index=0, delta=role, logprobs=None, finish_reason=None)],
                     prompt_token_ids=prompt if ids else None, prompt_text=None))
    for n, word in enumerate(words):
        last = n == len(words) - 1
        end = dict(finish_reason="length", stop_reason=None) if last else dict(finish_reason=None)
        choice = Choice(index=0, delta=DeltaMessage(content=word), logprobs=None, **end,
                        token_ids=[10000 + n] if ids else None)
        chunk = Chunk(**common, choices=[choice])
        if last and not wants_usage:
            chunk.system_fingerprint = fingerprint
        yield line(chunk)
    if wants_usage:
        yield line(Chunk(**common, choices=[], usage=usage(len(words)), system_fingerprint=fingerprint,
                         metrics=None), exclude_none=True)
    yield "data: [DONE]\\n\\n"

message = ChatMessage(role="assistant", reasoning=None, content=words[0])
choice = ChatCompletionResponseChoice(index=0, message=message, logprobs=None, finish_reason="length",
                                      stop_reason=None, token_ids=None)
whole = ChatCompletionResponse(id=id_, created=created, model=model, choices=[choice], usage=usage(1),
                               system_fingerprint=fingerprint)
print(json.dumps({
    "streams": [list(events(ids, wants)) for ids in (False, True) for wants in (False, True)],
    "whole": json.dumps(whole.model_dump(), separators=(",", ":")),
}))
"""


@pytest.mark.vllm
@pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="needs .venv-vllm")
def test_events_and_replies_are_byte_for_byte_those_of_vllm() -> None:
    given = [
        mock_engine._ID, mock_engine._CREATED, mock_engine.MODEL, mock_engine._FINGERPRINT,
        mock_engine.PROMPT_IDS, mock_engine.WORDS[:3],
    ]  # fmt: skip
    command = [str(VLLM_PYTHON), "-c", VLLM_EVENTS, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    ours = [mock_engine.events(3, ids, usage) for ids in (False, True) for usage in (False, True)]
    assert [[event.decode() for event in stream] for stream in ours] == said["streams"]
    assert mock_engine.completion().decode() == said["whole"]


def test_an_engine_gives_what_was_asked_for_over_a_socket(start: Start) -> None:
    engine = start(sys.executable, "-m", "loadtests.mock_engine", "--engines=1", "--chunks=5")
    url = eventually(lambda: engine.output.strip())
    with httpx.Client(base_url=url, trust_env=False, verify=False) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == mock_engine.MODEL
        assert client.get("/health").status_code == 200
        assert 'block_size="32"' in client.get("/metrics").text
        assert client.get("/kv_event_sources").status_code == 404
        for ids in (False, True):
            for usage in (False, True):
                asked = {"return_token_ids": ids, "stream_options": {"include_usage": usage}, "stream": True}
                got = client.post("/v1/chat/completions", json={"model": mock_engine.MODEL, **asked})
                assert got.content == b"".join(mock_engine.events(5, ids, usage))
        whole = client.post("/v1/chat/completions", json={"model": mock_engine.MODEL, "stream": False})
        assert whole.content == mock_engine.completion()
