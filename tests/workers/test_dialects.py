"""Messages and responses as the chats that vLLM 0.32 makes of them; read off its renderer."""

from __future__ import annotations

from typing import Any

import pytest

from workers.chat_messages import Unrenderable
from workers.dialects import chat_of_items, chat_of_messages, tools_of_messages, tools_of_responses


def block(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


def call(id: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "f", "arguments": arguments}}


USER = {"role": "user", "content": "a"}
USE = {"type": "tool_use", "id": "x", "name": "f", "input": {"a": "é"}}


@pytest.mark.parametrize(
    ("system", "messages", "chat"),
    [
        (None, [USER], [USER]),
        ("S", [USER], [{"role": "system", "content": "S"}, USER]),
        (
            [block("S", cache_control={"type": "ephemeral"}), block("T")],
            [USER],
            [{"role": "system", "content": "ST"}, USER],
        ),
        ([block("x-anthropic-billing-header: 1\nx"), block("T")], [], [{"role": "system", "content": "T"}]),
        ("", [{"role": "user", "content": [block("a")]}], [USER]),
        (
            None,
            [{"role": "user", "content": [block("a"), block("", x=1), block("b")]}],
            [{"role": "user", "content": [block("a"), block("b")]}],
        ),
        (None, [{"role": "user", "content": []}], []),
        (None, [{"role": "assistant", "content": []}], [{"role": "assistant"}]),
        (
            None,
            [{"role": "assistant", "content": [{"type": "thinking", "thinking": "t"}, block("b"), USE]}],
            [
                {
                    "role": "assistant",
                    "content": "b",
                    "reasoning": "t",
                    "tool_calls": [call("x", '{"a": "\\u00e9"}')],
                }
            ],
        ),
        (
            None,
            [
                {
                    "role": "user",
                    "content": [
                        block("after"),
                        {"type": "tool_result", "tool_use_id": "x", "content": [block("r"), block("s")]},
                    ],
                }
            ],
            [
                {"role": "tool", "tool_call_id": "x", "content": "r\ns"},
                {"role": "user", "content": "after"},
            ],
        ),
        (
            None,
            [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}],
            [{"role": "tool", "tool_call_id": "x", "content": ""}],
        ),
    ],
)
def test_messages(system: Any, messages: Any, chat: Any) -> None:
    assert chat_of_messages(system, messages) == chat


@pytest.mark.parametrize(
    "message",
    [
        {"role": "system", "content": "in the middle"},
        {"role": "user", "content": ["a"]},
        {"role": "user", "content": [{"type": "image", "source": {}}]},
        {"role": "user", "content": [{"type": "document"}]},
        {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "image"}]}]},
        {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "tool_reference"}]}]},
        {"role": "assistant", "content": [{"type": "tool_result", "content": "x"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]},  # its id would be the time
    ],
)
def test_messages_that_are_not_rendered(message: Any) -> None:
    with pytest.raises(Unrenderable):
        chat_of_messages(None, [message])


def test_tools_of_messages() -> None:
    assert tools_of_messages(None) is None
    assert tools_of_messages([]) == []
    (tool,) = tools_of_messages([{"name": "f", "input_schema": {"properties": {}}}]) or ()
    assert tool["function"]["parameters"] == {"properties": {}, "type": "object"}
    with pytest.raises(Unrenderable):
        tools_of_messages([{"type": "web_search_20250305", "name": "web_search"}])


OUTPUT = {"type": "output_text", "annotations": []}


@pytest.mark.parametrize(
    ("items", "chat"),
    [
        ("hi", [{"role": "user", "content": "hi"}]),
        ([USER], [USER]),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}],
            [{"role": "user", "content": [block("a")]}],
        ),
        (
            [
                {
                    "type": "message",
                    "role": "assistant",
                    "content": [{**OUTPUT, "text": "a"}, {**OUTPUT, "text": "b"}],
                }
            ],
            [{"role": "assistant", "content": "a"}],
        ),
        (
            [
                USER,
                {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "t"}]},
                {"type": "message", "role": "assistant", "content": [{**OUTPUT, "text": "a"}]},
                {"type": "function_call", "call_id": "x", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "y", "name": "f", "arguments": ""},
                {"type": "function_call_output", "call_id": "x", "output": "r"},
                {
                    "type": "function_call_output",
                    "call_id": "y",
                    "output": [{"type": "input_text", "text": "s"}],
                },
            ],
            [
                USER,
                {
                    "role": "assistant",
                    "reasoning": "t",
                    "content": "a",
                    "tool_calls": [call("x", "{}"), call("y", "")],
                },
                {"role": "tool", "content": "r", "tool_call_id": "x"},
                {"role": "tool", "content": [block("s")], "tool_call_id": "y"},
            ],
        ),
        (
            [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
            [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
        ),
    ],
)
def test_items(items: Any, chat: Any) -> None:
    assert chat_of_items(items) == chat


def test_items_do_not_join_what_was_said_before() -> None:
    before = [{"role": "assistant", "content": "a"}]
    called = {"type": "function_call", "call_id": "x", "name": "f", "arguments": "{}"}
    chat = chat_of_items([called], before)
    assert chat == [*before, {"role": "assistant", "tool_calls": [call("x", "{}")]}]
    assert before == [{"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "item",
    [
        {"type": "item_reference", "id": "msg_1"},
        {"type": "reasoning", "encrypted_content": "x", "content": [{"text": "t"}]},
        {"type": "function_call", "namespace": "n", "call_id": "x", "name": "f", "arguments": "{}"},
        {"role": "assistant", "content": []},
        {"role": "assistant", "status": "incomplete", "content": "a"},
        {"type": "message"},
    ],
)
def test_items_that_are_not_rendered(item: Any) -> None:
    with pytest.raises(Unrenderable):
        chat_of_items([item])


def test_tools_of_responses() -> None:
    function = {"type": "function", "name": "f", "strict": True}
    assert tools_of_responses([]) is None
    assert tools_of_responses([{"type": "web_search"}]) == []
    assert tools_of_responses([function, {"type": "web_search"}]) == [
        {"type": "function", "function": {"name": "f", "strict": True}}
    ]
    with pytest.raises(Unrenderable):
        tools_of_responses([{"type": "namespace"}])
