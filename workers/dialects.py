"""Requests of the messages and responses APIs as the chats that vLLM makes of them.

Follows vLLM's `anthropic/serving.py` and `openai/responses/utils.py` for text and tools. All else there, from
images to citations, is `Unrenderable`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from workers.chat_messages import BILLING_HEADER, Message, Unrenderable

# vLLM sets no `add_special_tokens` for responses, and its default is that of texts, not of chats: behind a
# template that writes its own, the prompt begins with two.
RESPONSES_ADD_SPECIAL_TOKENS = True

# Items and messages of which the reply is to go on in the middle.
_UNFINISHED = ("in_progress", "incomplete")


def chat_of_messages(system: object, messages: Sequence[Any]) -> list[Message]:
    """Anthropic's messages as chat messages; each tool result becomes a message of its own."""
    chat: list[Message] = []
    if text := system if isinstance(system, str) else _system_text(_blocks(system)):
        chat.append({"role": "system", "content": text})
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant"):
            raise Unrenderable(f"a message of the role {role!r} among the others")
        if isinstance(content, str):
            chat.append({"role": role, "content": content})
        else:
            chat += _of_blocks(role, _blocks(content))
    return chat


def tools_of_messages(tools: Sequence[Any] | None) -> list[dict[str, Any]] | None:
    """Anthropic's tools as tools of a chat."""
    if tools is None:
        return None
    return [{"type": "function", "function": _function_of_messages(tool)} for tool in tools]


def chat_of_items(items: object, before: Sequence[Message] = ()) -> list[Message]:
    """The input of a response as chat messages, after those before; calls join what the assistant said."""
    chat = [*before]
    if isinstance(items, str):
        return [*chat, {"role": "user", "content": items}]
    listed = _blocks(items)
    if listed and listed[-1].get("status") in _UNFINISHED:
        raise Unrenderable("the last item is to be continued")
    for item in listed:
        _add_item(chat, item, len(before))
    return chat


def tools_of_responses(tools: Sequence[Any]) -> list[dict[str, Any]] | None:
    """The functions among a response's tools as tools of a chat."""
    if any(tool.get("type") == "namespace" for tool in tools):
        raise Unrenderable("a namespace of tools")
    functions = [tool for tool in tools if tool.get("type") == "function"]
    shown = [
        {"type": "function", "function": {name: tool[name] for name in tool if name != "type"}}
        for tool in functions
    ]
    return shown if tools else None


def _blocks(content: object) -> list[dict[str, Any]]:
    if content is None:
        return []
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise Unrenderable("content that is neither text nor a list of objects")
    return content


def _system_text(blocks: Sequence[Mapping[str, Any]]) -> str:
    texts = [block.get("text") or "" for block in blocks if block.get("type") == "text"]
    return "".join([text for text in texts if not text.startswith(BILLING_HEADER)])


def _of_blocks(role: str, blocks: Sequence[Mapping[str, Any]]) -> list[Message]:
    texts: list[dict[str, Any]] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[Message] = []
    for block in blocks:
        match block.get("type"):
            case "text":
                texts += [{"type": "text", "text": block["text"]}] if block.get("text") else []
            case "thinking" if block.get("thinking") is not None:
                thoughts.append(block["thinking"])
            case "redacted_thinking":
                pass
            case "tool_use" if block.get("id"):
                calls.append(
                    _call(block["id"], block.get("name") or "", json.dumps(block.get("input") or {}))
                )
            case "tool_result" if role == "user":
                results.append(_result(block.get("tool_use_id") or "", block.get("content")))
            case other:
                raise Unrenderable(f"a message's content has a block of the type {other!r}")
    message: Message = {"role": role}
    if texts:
        message["content"] = texts[0]["text"] if len(texts) == 1 else texts
    if thoughts:
        message["reasoning"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return [*results, message] if texts or role == "assistant" else results


def _result(call: str, content: object) -> Message:
    """What a tool said. vLLM drops what is neither text, image nor a reference to a tool."""
    if not isinstance(content, str):
        blocks = _blocks(content)
        if any(block.get("type") in ("image", "tool_reference") for block in blocks):
            raise Unrenderable("a tool's result is not text alone")
        content = "\n".join([block.get("text", "") for block in blocks if block.get("type") == "text"])
    return {"role": "tool", "tool_call_id": call, "content": content}


def _call(id: object, name: object, arguments: object) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _function_of_messages(tool: Mapping[str, Any]) -> dict[str, Any]:
    schema = tool.get("input_schema")
    if not isinstance(schema, dict):
        raise Unrenderable("a tool without input_schema")
    return {
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": schema if "type" in schema else {**schema, "type": "object"},
        "strict": tool.get("strict"),
        "defer_loading": tool.get("defer_loading"),
    }


def _add_item(chat: list[Message], item: Mapping[str, Any], first: int) -> None:
    """One input item; `first`: where the items' own messages begin, which later items may add to."""
    last = chat[-1] if len(chat) > first and chat[-1]["role"] == "assistant" else None
    match item.get("type", "message"):
        case "function_call" if not item.get("namespace"):
            call = _call(item.get("call_id"), item.get("name"), item.get("arguments"))
            if last is None:
                chat.append({"role": "assistant", "tool_calls": [call]})
            else:
                last["tool_calls"] = [*last.get("tool_calls", ()), call]
        case "function_call_output":
            content = _input_text(item.get("output"))
            chat.append({"role": "tool", "content": content, "tool_call_id": item.get("call_id")})
        case "message" if item.get("role") == "assistant":
            text = _first_text(item.get("content"))
            if last is not None and last.get("content") is None:
                last["content"] = text
            else:
                chat.append({"role": "assistant", "content": text})
        case "message" if "role" in item:
            chat.append({"role": item["role"], "content": _input_text(item.get("content"))})
        case "reasoning" if item.get("content") and not item.get("encrypted_content"):
            thought = _first_text(item["content"])
            if last is not None and last.get("reasoning") is None:
                last["reasoning"] = thought
            else:
                chat.append({"role": "assistant", "reasoning": thought})
        case other:
            raise Unrenderable(f"an input item of the type {other!r}")


def _input_text(content: object) -> object:
    """Parts of an input's content as those of a chat."""
    if isinstance(content, str):
        return content
    blocks = _blocks(content)
    return [{**block, "type": "text"} if block.get("type") == "input_text" else block for block in blocks]


def _first_text(content: object) -> str:
    """What vLLM takes of an assistant's content: its first part."""
    text = content if isinstance(content, str) else next(iter(_blocks(content)), {}).get("text")
    if not isinstance(text, str):
        raise Unrenderable("an assistant's message without text")
    return text
