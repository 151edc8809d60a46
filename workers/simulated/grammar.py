"""What a request forces the model to say, tool calls and JSON, and how a forced call reads as a stream."""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import xxhash

from workers.simulated import errors
from workers.simulated.json_example import example


class Said(NamedTuple):
    """Plain text."""

    text: str


class CallOpened(NamedTuple):
    """A tool call begins."""

    id: str
    name: str


class Arguments(NamedTuple):
    """A piece of a tool call's JSON arguments."""

    text: str


Part = Said | CallOpened | Arguments


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One tool call in the Hermes form that vLLM's `hermes` parser reads."""

    name: str
    arguments: str

    @property
    def opening(self) -> str:
        """The text up to the function's name: from here on it is known which call this is."""
        return f'<tool_call>\n{{"name": {json.dumps(self.name)}'

    @property
    def head(self) -> str:
        """The text before the arguments."""
        return f'{self.opening}, "arguments": '

    @property
    def text(self) -> str:
        """The whole text that the model says."""
        return f"{self.head}{self.arguments}}}\n</tool_call>"


@dataclass(frozen=True, slots=True)
class Forced:
    """The text a request makes the model say, and the tool call it is, if it is one."""

    text: str
    call: ToolCall | None = None


def forced_call(functions: Sequence[Mapping[str, Any]], name: str | None, prompt: Sequence[int]) -> Forced:
    """A call of the named function, or of one that the prompt chooses, with arguments that fit its schema."""
    seed = _seed(prompt)
    matching = [f for f in functions if name in (None, f["name"])]
    function = matching[seed % len(matching)]
    arguments = _example(function.get("parameters") or {"type": "object"}, seed)
    call = ToolCall(function["name"], json.dumps(arguments, ensure_ascii=False))
    return Forced(call.text, call)


def forced_json(response_format: Mapping[str, Any] | None, prompt: Sequence[int]) -> Forced | None:
    """The JSON that a response_format asks for; None if it asks for none."""
    match (response_format or {}).get("type"):
        case "json_object":
            schema: Mapping[str, Any] = {"type": "object", "properties": {"answer": {"type": "string"}}}
        case "json_schema":
            schema = ((response_format or {}).get("json_schema") or {}).get("schema") or {}
        case _:
            return None
    return Forced(json.dumps(_example(schema, _seed(prompt)), ensure_ascii=False))


class ToolReader:
    """Reads a choice's text as it comes: the parts that a tool parser would find in it."""

    def __init__(self, call: ToolCall | None) -> None:
        self._call = call
        self._id = call_id()
        self._text = ""

    def read(self, text: str) -> list[Part]:
        """The parts that this text adds."""
        if self._call is None:
            return [Said(text)] if text else []
        start, end = len(self._call.head), len(self._call.head) + len(self._call.arguments)
        before = len(self._text)
        self._text += text
        parts: list[Part] = []
        if before < len(self._call.opening) <= len(self._text):
            parts.append(CallOpened(self._id, self._call.name))
        if piece := self._text[max(before, start) : end]:
            parts.append(Arguments(piece))
        return parts

    @property
    def whole_call(self) -> tuple[str, ToolCall] | None:
        """The id and call, if all of it was said: what a parser finds that sees the text at once."""
        if self._call is None or not self._text.startswith(self._call.text):
            return None
        return self._id, self._call


def call_id() -> str:
    """An id as vLLM makes it for tool calls."""
    return f"chatcmpl-tool-{uuid.uuid4().hex[:16]}"


def _example(schema: Mapping[str, Any], seed: int) -> Any:
    try:
        return example(schema, seed)
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError) as error:
        raise errors.ApiError(f"The JSON schema cannot be followed: {error}") from error


def _seed(prompt: Sequence[int]) -> int:
    return xxhash.xxh3_64_intdigest(b"".join(i.to_bytes(4, "little") for i in prompt[-256:]))
