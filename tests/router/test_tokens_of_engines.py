"""The router's tokens beside those that engines make of the same requests: simulated ones and real vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from chats import CHATS, TEMPLATES, TOOLS
from engine_wire import MODEL, RunningEngine, start_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import processes

from router.openai_api import FAMILIES, Call, parse
from router.prompter import Prompter
from router.prompts import read
from router.tokenizer_config import TokenizerConfig
from workers.tokenizer import ids_of
from workers.vllm_engine import where_can_run

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
# What lets vLLM take templates with requests, and show its prompts.
VLLM_ARGS = {"trust-request-chat-template": True, "enable-scale-out": True, "max-model-len": 8192}
PROMPTERS = {
    name: Prompter(
        TokenizerConfig(source="demo", chat_template=template, exclude_tools_when_tool_choice_none=False)
    )
    for name, template in {"demo": None, **TEMPLATES}.items()
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter für Städte",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "default": 1.0}, "day": {"enum": ["heute", None]}},
        },
        "strict": False,
    },
}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"town": "Höxter", "n": [1.0, 2e3, null]}'},
}
SYSTEM = {"role": "system", "content": "You count sheep."}
HELLO = {"role": "user", "content": "Hello, herd!"}
ODD = "  two  spaces\t\n\n<|im_end|> Grüße 日本語 العربية e\u0301 🐄👩\u200d👧 {{ x }}"
LONG = "How many sheep are in the herd, 7 or 77? " * 150

# Chats for which every template has an answer, by what they are there for.
FOR_ALL: dict[str, dict[str, Any]] = {
    "plain": {"messages": [HELLO]},
    "system": {"messages": [SYSTEM, HELLO]},
    "several turns": {"messages": [SYSTEM, HELLO, {"role": "assistant", "content": "7"}, HELLO]},
    "unicode": {"messages": [{"role": "user", "content": ODD}]},
    "long": {"messages": [{"role": "user", "content": LONG}]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
        ]
    },
    "no prompt for an answer": {"messages": [HELLO], "add_generation_prompt": False},
    "special tokens": {"messages": [HELLO], "add_special_tokens": True},
}
CHATTED: dict[str, dict[str, Any]] = {
    **FOR_ALL,
    "tools": {"messages": [SYSTEM, HELLO], "tools": [WEATHER]},
    "tools that may not be called": {"messages": [HELLO], "tools": [WEATHER], "tool_choice": "none"},
    "a call and its result": {
        "messages": [
            HELLO,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "warm"}]},
        ],
        "tools": [WEATHER],
    },
    "a message to be continued": {
        "messages": [HELLO, {"role": "assistant", "content": "There are "}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
    "a developer": {"messages": [HELLO, {"role": "developer", "content": "Be brief."}, SYSTEM, HELLO]},
}
# What only some templates look at.
FOR_ONE: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"messages": [HELLO], "chat_template_kwargs": {"enable_thinking": False}}),
    ("qwen3", {"messages": [HELLO], "reasoning_effort": "none"}),
    ("qwen3", {"messages": [HELLO, {"role": "assistant", "content": "7", "reasoning_content": "hm"}]}),
    ("llama3", {"messages": [SYSTEM, HELLO], "chat_template_kwargs": {"date_string": "1 May 2026"}}),
    ("llama3", {"messages": [SYSTEM, HELLO], "tools": [WEATHER]}),
    ("macros", {"messages": [HELLO], "documents": [{"title": "t", "text": "x"}], "tools": [WEATHER]}),
    ("macros", {"messages": [HELLO, {"role": "assistant", "tool_calls": [CALL], "name": "a"}]}),
    ("macros", {"messages": [HELLO], "chat_template_kwargs": {"style": "auto", "x": None}}),
    (
        "macros",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
                }
            ]
        },
    ),
]
WITH_TEMPLATES = [("demo", body) for body in CHATTED.values()] + FOR_ONE
WITH_TEMPLATES += [(name, body) for name in TEMPLATES for body in FOR_ALL.values()]


@pytest.fixture(scope="module", params=["simulated", pytest.param("vllm", marks=pytest.mark.vllm)])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningEngine]:
    if request.param == "vllm" and where_can_run().platform is None:
        pytest.skip(where_can_run().reason)
    args = VLLM_ARGS if request.param == "vllm" else {"speed": 20}
    with processes(tmp_path_factory.mktemp(request.param)) as start:
        yield start_engine(start, request.param, args)


def call_of(path: str, body: dict[str, Any]) -> Call:
    return parse(FAMILIES[path], json.dumps({"model": MODEL, **body}).encode())


def ours(path: str, body: dict[str, Any], template: str = "demo") -> bytes:
    reading = read(call_of(path, body), PROMPTERS[template])
    assert reading.prompt is not None
    assert reading.prompt.token_ids is not None, reading.reason
    return reading.prompt.token_ids


def with_template(name: str, body: dict[str, Any]) -> dict[str, Any]:
    return body if name == "demo" else {**body, "chat_template": TEMPLATES[name]}


@pytest.mark.parametrize(("template", "body"), WITH_TEMPLATES)
def test_chats(engine: RunningEngine, template: str, body: dict[str, Any]) -> None:
    asked = {**with_template(template, body), "max_tokens": 1, "return_token_ids": True}
    reply = engine.post(CHAT, asked).raise_for_status().json()
    assert reply["prompt_token_ids"] == ids_of(ours(CHAT, body, template))


@pytest.mark.parametrize("name", CHATTED)
def test_what_tokenize_says(engine: RunningEngine, name: str) -> None:
    body = {name: value for name, value in CHATTED[name].items() if name != "tool_choice"}
    told = engine.post("/tokenize", body).raise_for_status().json()["tokens"]
    assert told == ids_of(ours(CHAT, body))


@pytest.mark.parametrize(
    "body", [{"prompt": ODD}, {"prompt": [LONG]}, {"prompt": ODD, "add_special_tokens": False}]
)
def test_completions(engine: RunningEngine, body: dict[str, Any]) -> None:
    reply = engine.post(COMPLETION, {**body, "max_tokens": 1, "return_token_ids": True}).raise_for_status()
    assert reply.json()["choices"][0]["prompt_token_ids"] == ids_of(ours(COMPLETION, body))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, CHATTED["plain"]),
        (CHAT, CHATTED["tools"]),
        (CHAT, CHATTED["a call and its result"]),
        (CHAT, CHATTED["a message to be continued"]),
        (COMPLETION, {"prompt": ODD}),
        (COMPLETION, {"prompt": [LONG]}),
    ],
)
def test_ids_in_place_of_the_prompt_give_the_same_answer(
    engine: RunningEngine, path: str, body: dict[str, Any]
) -> None:
    body = {**body, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    call = call_of(path, body)
    assert read(call, PROMPTERS["demo"]).sendable
    by_text = engine.post(path, body).raise_for_status().json()
    with engine.client() as client:
        sent = call.upstream_body(prompt_ids=ours(path, body))
        reply = client.post(path, content=sent, headers={"content-type": "application/json"})
    by_ids = reply.raise_for_status().json()
    assert by_ids["choices"] == by_text["choices"]
    assert by_ids.get("prompt_token_ids") == by_text.get("prompt_token_ids")
    assert by_ids["usage"]["prompt_tokens"] == by_text["usage"]["prompt_tokens"]


BLOCKS = [
    {"type": "text", "text": "a"},
    {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}},
]
ANTHROPIC: list[dict[str, Any]] = [
    {"messages": [HELLO]},
    {"system": "S", "messages": [{"role": "user", "content": BLOCKS}]},
    {"system": [*BLOCKS, {"type": "text", "text": "x-anthropic-billing-header: 1\nx"}], "messages": [HELLO]},
    {
        "messages": [
            HELLO,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    *BLOCKS,
                    {"type": "tool_use", "id": "c1", "name": "weather", "input": {"town": "Höxter"}},
                ],
            },
            {
                "role": "user",
                "content": [BLOCKS[0], {"type": "tool_result", "tool_use_id": "c1", "content": BLOCKS}],
            },
        ],
        "tools": [{"name": "weather", "description": "d", "input_schema": {"properties": {}}}],
        "tool_choice": {"type": "none"},
    },
    {"messages": [HELLO, {"role": "assistant", "content": []}], "tools": []},
]
OPENAI: list[dict[str, Any]] = [
    {"input": "hello"},
    {"input": [HELLO], "instructions": "S"},
    {
        "input": [
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
            },
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "t"}],
            },
            {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"town": "Höxter"}'},
            {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": ""},
            {"type": "function_call_output", "call_id": "c1", "output": "warm"},
            {
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "id": "msg_1",
                "content": [{"type": "output_text", "text": "It is warm.", "annotations": []}],
            },
            HELLO,
        ],
        "tools": [{"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}],
        "tool_choice": "none",
    },
    {"input": "hello", "tools": [{"type": "web_search"}]},
]


@pytest.mark.parametrize(
    ("path", "body"),
    [(MESSAGES, {"max_tokens": 1, **body}) for body in ANTHROPIC] + [(RESPONSES, body) for body in OPENAI],
)
def test_messages_and_responses(engine: RunningEngine, path: str, body: dict[str, Any]) -> None:
    expected = ids_of(ours(path, body))
    if engine.kind == "vllm":
        assert engine.post(f"{path}/render", body).raise_for_status().json()["token_ids"] == expected
    else:
        limited = {"max_output_tokens": 1} if path == RESPONSES else {}
        usage = engine.post(path, {**body, **limited}).raise_for_status().json()["usage"]
        parts = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
        assert sum(usage.get(part, 0) for part in parts) == len(expected)


@pytest.mark.parametrize(
    "engine", [pytest.param("vllm", marks=pytest.mark.vllm)], indirect=True, scope="module"
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.sampled_from(sorted(PROMPTERS)), CHATS, st.one_of(st.none(), TOOLS), st.booleans())
def test_any_chat_that_the_router_reads_is_what_vllm_makes_of_it(
    engine: RunningEngine, template: str, chat: Any, tools: Any, prompt: bool
) -> None:
    """And what it would send ids for, vLLM does not refuse."""
    body = {"messages": chat, "add_generation_prompt": prompt, **({} if tools is None else {"tools": tools})}
    reading = read(call_of(CHAT, body), PROMPTERS[template])
    if not reading.sendable:
        return
    assert reading.prompt is not None
    assert reading.prompt.token_ids is not None
    rendered = engine.post(f"{CHAT}/render", with_template(template, body)).raise_for_status().json()
    assert rendered["token_ids"] == ids_of(reading.prompt.token_ids)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT, {"messages": [{"role": "user", "content": LONG * 6}]}), (COMPLETION, {"prompt": LONG * 6})],
)
def test_ids_of_a_prompt_that_is_too_long_are_refused_as_its_text_is(
    engine: RunningEngine, path: str, body: dict[str, Any], stream: bool
) -> None:
    """Not in a stream that has begun: the router would take that for a broken engine."""
    call = call_of(path, {**body, "max_tokens": 8, "stream": stream})
    with engine.client() as client:
        for sent in (call.upstream_body(), call.upstream_body(prompt_ids=ours(path, body))):
            reply = client.post(path, content=sent, headers={"content-type": "application/json"})
            assert reply.status_code == 400, reply.text
            assert "maximum context length" in reply.json()["error"]["message"]
