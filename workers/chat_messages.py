"""The messages and tools of a chat request as vLLM shows them to the chat template.

Follows vLLM's `renderers/chat_utils.py` and the types in its `chat_completion/protocol.py`, to the very order
of keys, which templates may print. What vLLM refuses, and what is not text alone, is `Unrenderable`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

Message = dict[str, Any]
# Content as one string or as a list of parts; "auto": as the template wants it.
ContentFormat = Literal["auto", "string", "openai"]

# Content parts that are text, and where in them it stands. The others than the first are the assistant's.
TEXT_PARTS = {"text": "text", "refusal": "refusal", "thinking": "thinking"}
# What else a part may hold: templates see it, none is known to print it.
PART_EXTRAS = ("cache_control",)
# How Claude Code's system prompt begins, with a number that is new in every request. vLLM drops the line.
BILLING_HEADER = "x-anthropic-billing-header"


class Unrenderable(ValueError):
    """No prompt can be made of the request that is surely vLLM's; the message says why."""


class Tool(dict[str, Any]):
    """A tool as templates get it, with the JSON that they print of it, which is the same in every request."""

    def __init__(self, members: Mapping[str, Any]) -> None:
        super().__init__(members)
        self.printed: dict[tuple[object, ...], str] = {}


def conversation(messages: Sequence[Any], parts: bool) -> list[Message]:
    """The messages as templates get them; `parts`: contents as lists of parts, else as strings."""
    return [_message(message, parts) for message in messages]


def tool_dicts(tools: Sequence[Any]) -> list[Tool]:
    """The tools as templates get them."""
    return [_tool(tool) for tool in tools]


def template_variables(
    given: Mapping[str, Any], effort: str | None = None, defaults: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """What the template gets beside the chat: chat_template_kwargs over the server's, and reasoning_effort.

    vLLM's `build_chat_params` and `merge_kwargs`: null and "auto" leave the server's choice.
    """
    variables = {**defaults, **{name: value for name, value in given.items() if value not in (None, "auto")}}
    if effort is not None:
        variables["reasoning_effort"] = effort
        if "enable_thinking" not in given:
            variables["enable_thinking"] = effort != "none"
    return variables


def _message(message: Any, parts: bool) -> Message:
    role, content = _field(message, "role", str), message.get("content")
    if role == "system" and content is not None:
        content = _without_billing_header(content)
    result: Message = {"role": role, "content": _content(content, role, parts)}
    if len(message) > 2 or content is None or role == "developer":
        _add_what_a_role_has(result, message)
    return result


def _add_what_a_role_has(result: Message, message: Mapping[str, Any]) -> None:
    match result["role"]:
        case "assistant":
            if calls := _field(message, "tool_calls", list | None):
                result["tool_calls"] = [_tool_call(call) for call in calls]
            reasoning = _field(message, "reasoning", str | None)
            if reasoning is None:
                reasoning = _field(message, "reasoning_content", str | None)
            if reasoning is not None:
                result["reasoning"] = result["reasoning_content"] = reasoning
        case "tool" if "tool_call_id" in message:
            result["tool_call_id"] = _field(message, "tool_call_id", str | None)
    for name in ("name", "task"):
        if (value := _field(message, name, str | None)) is not None:
            result[name] = value
    if result["role"] == "developer":
        if message.get("tools") is not None:
            raise Unrenderable("a developer's message brings tools")
        result["tools"] = None


def _content(content: object, role: str, parts: bool) -> str | list[dict[str, Any]]:
    """As the template wants it; what a tool said is always a string. In strings empty parts are no lines."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if parts and role != "tool" else content
    if content is None and role == "assistant":
        return [] if parts else ""
    if not isinstance(content, list):
        raise Unrenderable("a message's content is neither text nor a list")
    found = list(_texts(content, role))
    if parts and role != "tool":
        return found
    return "\n".join([part["text"] for part in found if parts or part["text"]])


def _texts(content: list[Any], role: str) -> Iterator[dict[str, Any]]:
    for part in content:
        kind = _field(part, "type", str)
        if kind not in TEXT_PARTS or (kind != "text" and role != "assistant"):
            raise Unrenderable(f"a message's content has a part of the type {kind!r}")
        if foreign := part.keys() - {"type", TEXT_PARTS[kind], *PART_EXTRAS}:
            raise Unrenderable(f"a part of a message's content has {min(foreign)!r}")
        extras = {name: part[name] for name in PART_EXTRAS if name in part}
        yield {"type": "text", "text": _field(part, TEXT_PARTS[kind], str), **extras}


def _without_billing_header(content: object) -> object:
    """Without the first line of a text that begins so, and without the text if it has no other."""
    if isinstance(content, str):
        return content.partition("\n")[2] if content.startswith(BILLING_HEADER) else content
    if not isinstance(content, list):
        return content
    kept = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not (isinstance(text, str) and text.startswith(BILLING_HEADER)):
            kept.append(part)
        elif rest := text.partition("\n")[2]:
            kept.append({**part, "text": rest})
    return kept


def _tool_call(call: Any) -> dict[str, Any]:
    """A call with its arguments as an object: what is not one counts as none."""
    function = _field(call, "function", dict)
    if call.get("type") != "function":
        raise Unrenderable("a tool call is of another type than 'function'")
    arguments = _field(function, "arguments", str)
    try:
        parsed = json.loads(arguments) if arguments else {}
    except json.JSONDecodeError:
        parsed = {}
    called = {"arguments": parsed if isinstance(parsed, dict) else {}, "name": _field(function, "name", str)}
    extras = {name: value for name, value in function.items() if name not in called}
    named = {"id": _field(call, "id", str), "function": called | extras, "type": "function"}
    return named | {name: value for name, value in call.items() if name not in named}


def _tool(tool: Any) -> Tool:
    """vLLM's `ChatCompletionToolsParam.model_dump`."""
    function = _field(tool, "function", dict)
    if tool.get("type", "function") != "function":
        raise Unrenderable("a tool is of another type than 'function'")
    described: dict[str, Any] = {
        "name": _field(function, "name", str),
        "description": _field(function, "description", str | None),
        "parameters": _field(function, "parameters", dict | None),
    }
    deferred = _field(tool, "defer_loading", bool | None)
    optional = {
        "strict": _field(function, "strict", bool | None),
        "defer_loading": _field(function, "defer_loading", bool | None),
    }
    if optional["defer_loading"] is None:
        optional["defer_loading"] = deferred
    described |= {name: value for name, value in optional.items() if value is not None}
    shown = {"type": "function", "function": described}
    return Tool(shown if deferred is None else {**shown, "defer_loading": deferred})


def _field(thing: Any, name: str, kind: Any) -> Any:
    """A member of this type; one that may be None may be missing."""
    if not isinstance(thing, dict):
        raise Unrenderable(f"what should have {name!r} is no object")
    value = thing.get(name)
    if not isinstance(value, kind):
        raise Unrenderable(f"{name!r} is missing or of the wrong type")
    return value
