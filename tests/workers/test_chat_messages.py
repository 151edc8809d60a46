"""What templates get to see of messages and tools, as vLLM 0.32 shows them; read off its renderer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from workers.chat_messages import Unrenderable, conversation, template_variables, tool_dicts

CALL = {
    "foo": 1,
    "type": "function",
    "id": "c1",
    "function": {"arguments": '{"b": 1.0, "a": "é"}', "name": "f", "extra": 2},
    "index": 0,
}
SEEN_CALL = {
    "id": "c1",
    "function": {"arguments": {"b": 1.0, "a": "é"}, "name": "f", "extra": 2},
    "type": "function",
    "foo": 1,
    "index": 0,
}


def text(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("message", "as_string"),
    [
        ({"role": "user", "content": "hi"}, {"role": "user", "content": "hi"}),
        (
            {"content": "hi", "name": "bob", "foo": 1, "role": "user"},
            {"role": "user", "content": "hi", "name": "bob"},
        ),
        ({"role": "user", "content": text("a", "b")}, {"role": "user", "content": "a\nb"}),
        ({"role": "user", "content": text("a", "", "b")}, {"role": "user", "content": "a\nb"}),
        ({"role": "user", "content": []}, {"role": "user", "content": ""}),
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
        ({"role": "assistant"}, {"role": "assistant", "content": ""}),
        ({"role": "assistant", "tool_calls": []}, {"role": "assistant", "content": ""}),
        ({"role": "assistant", "tool_calls": None}, {"role": "assistant", "content": ""}),
        (
            {"role": "assistant", "content": "x", "tool_calls": [CALL]},
            {"role": "assistant", "content": "x", "tool_calls": [SEEN_CALL]},
        ),
        (
            {"role": "assistant", "content": "x", "reasoning_content": "r"},
            {"role": "assistant", "content": "x", "reasoning": "r", "reasoning_content": "r"},
        ),
        (
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "t"}, *text("a")]},
            {"role": "assistant", "content": "t\na"},
        ),
        ({"role": "user", "content": "x", "reasoning": "r"}, {"role": "user", "content": "x"}),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, {"role": "user", "content": "x"}),
        (
            {"role": "tool", "content": "x", "tool_call_id": "c", "name": "f"},
            {"role": "tool", "content": "x", "tool_call_id": "c", "name": "f"},
        ),
        ({"role": "developer", "content": "x"}, {"role": "developer", "content": "x", "tools": None}),
        ({"role": "weird", "content": "x", "task": "t"}, {"role": "weird", "content": "x", "task": "t"}),
        (
            {"role": "system", "content": "x-anthropic-billing-header: 1\nrest"},
            {"role": "system", "content": "rest"},
        ),
        (
            {"role": "system", "content": text("x-anthropic-billing-header: 1", "rest")},
            {"role": "system", "content": "rest"},
        ),
    ],
)
def test_messages_for_templates_that_want_strings(message: Any, as_string: Any) -> None:
    (seen,) = conversation([message], parts=False)
    assert json.dumps(seen) == json.dumps(as_string)  # the order of keys counts: templates may print it


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"role": "user", "content": "hi"}, text("hi")),
        ({"role": "user", "content": text("a", "", "b")}, text("a", "", "b")),
        ({"role": "assistant", "content": None}, []),
        (
            {"role": "user", "content": [{"cache_control": {"type": "e"}, "text": "a", "type": "text"}]},
            [{"type": "text", "text": "a", "cache_control": {"type": "e"}}],
        ),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, text("no")),
        ({"role": "tool", "content": "x"}, "x"),
        ({"role": "tool", "content": text("a", "", "b")}, "a\n\nb"),
        ({"role": "tool", "content": []}, ""),
    ],
)
def test_contents_for_templates_that_want_parts(message: Any, content: Any) -> None:
    (seen,) = conversation([message], parts=True)
    assert json.dumps(seen["content"]) == json.dumps(content)


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [("", {}), ("not json", {}), ("[1]", {}), ("null", {}), ('{"a": 1, "a": 2}', {"a": 2}), ("{}", {})],
)
def test_arguments_that_are_no_object_count_as_none(arguments: str, seen: dict[str, Any]) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    (message,) = conversation([{"role": "assistant", "content": "", "tool_calls": [call]}], parts=False)
    assert message["tool_calls"][0]["function"]["arguments"] == seen


@pytest.mark.parametrize(
    "message",
    [
        "hello",
        {"content": "x"},
        {"role": 1, "content": "x"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": 7},
        {"role": "user", "content": ["a"]},
        {"role": "user", "content": [{"text": "a"}]},
        {"role": "user", "content": [{"type": "text", "text": None}]},
        {"role": "user", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
        {"role": "user", "content": [{"type": "text", "text": "a", "image_url": "x"}]},
        {"role": "user", "content": [{"type": "text", "text": "a", "uuid": "x"}]},
        {"role": "user", "content": "x", "name": 3},
        {"role": "assistant", "content": "", "tool_calls": {}},
        {"role": "assistant", "content": "", "tool_calls": [{**CALL, "type": "custom"}]},
        {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": None}]},
        {"role": "assistant", "content": "", "tool_calls": [{**CALL, "function": {"name": "f"}}]},
        {"role": "assistant", "content": "", "reasoning": ["r"]},
        {"role": "developer", "content": "x", "tools": []},
    ],
)
def test_what_vllm_refuses_or_reads_more_than_text_from_is_not_rendered(message: Any) -> None:
    with pytest.raises(Unrenderable):
        conversation([message], parts=False)


@pytest.mark.parametrize(
    ("tool", "seen"),
    [
        (
            {"type": "function", "function": {"parameters": {"z": 1, "a": 2}, "name": "f", "x": 1}, "y": 2},
            {
                "type": "function",
                "function": {"name": "f", "description": None, "parameters": {"z": 1, "a": 2}},
            },
        ),
        (
            {"function": {"strict": False, "description": "d", "name": "f"}},
            {
                "type": "function",
                "function": {"name": "f", "description": "d", "parameters": None, "strict": False},
            },
        ),
        (
            {"function": {"name": "f"}, "defer_loading": True},
            {
                "type": "function",
                "function": {"name": "f", "description": None, "parameters": None, "defer_loading": True},
                "defer_loading": True,
            },
        ),
    ],
)
def test_tools(tool: Any, seen: Any) -> None:
    assert json.dumps(tool_dicts([tool])) == json.dumps([seen])


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "web_search"},
        {"type": "custom", "function": {"name": "f"}},
        {"function": {"description": "d"}},
        {"function": {"name": "f", "parameters": []}},
        {"function": {"name": "f", "strict": "yes"}},
        "f",
    ],
)
def test_tools_that_vllm_refuses_are_not_rendered(tool: Any) -> None:
    with pytest.raises(Unrenderable):
        tool_dicts([tool])


@pytest.mark.parametrize(
    ("given", "effort", "defaults", "seen"),
    [
        ({}, None, {}, {}),
        ({"a": 1, "b": None, "c": "auto"}, None, {"b": 2, "c": 3}, {"b": 2, "c": 3, "a": 1}),
        ({}, "low", {}, {"reasoning_effort": "low", "enable_thinking": True}),
        ({}, "none", {"enable_thinking": True}, {"reasoning_effort": "none", "enable_thinking": False}),
        ({"enable_thinking": False}, "high", {}, {"reasoning_effort": "high", "enable_thinking": False}),
        ({"enable_thinking": None}, "high", {}, {"reasoning_effort": "high"}),
    ],
)
def test_variables(given: Any, effort: Any, defaults: Any, seen: Any) -> None:
    assert template_variables(given, effort, defaults) == seen
