"""Errors as vLLM words them: one exception, and the bodies it becomes."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any

from workers.chat_messages import Unrenderable

# vLLM reports at most this many validation errors, and this much of what was wrong (validation.py).
MAX_REPORTED_ERRORS = 10
MAX_REPORTED_INPUT = 200


class ApiError(Exception):
    """A request that ends with an error body; `type` and `param` as vLLM names them."""

    def __init__(
        self,
        message: str,
        *,
        status: HTTPStatus = HTTPStatus.BAD_REQUEST,
        type: str = "BadRequestError",
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        """The OpenAI error body."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": int(self.status)}
        return {"error": error}

    @property
    def anthropic_body(self) -> dict[str, Any]:
        """The Anthropic error body."""
        return {"type": "error", "error": {"type": self.type, "message": self.message}}

    @property
    def event(self) -> bytes:
        """The event that ends an OpenAI stream; vLLM writes it with json.dumps, spaces and all."""
        return f"data: {json.dumps(self.body)}\n\n".encode()


@contextlib.contextmanager
def of_prompts() -> Iterator[None]:
    """Requests that no prompt can be made of are refused."""
    try:
        yield
    except Unrenderable as error:
        raise ApiError(str(error)) from error


def invalid(message: str, param: str, value: object = None) -> ApiError:
    """A value that vLLM refuses when it makes sampling parameters or checks a request."""
    shown = f", value={value}" if value is not None else ""
    return ApiError(f"{message} (parameter={param}{shown})", param=param)


def malformed(errors: Iterable[Mapping[str, Any]]) -> ApiError:
    """A body that does not have the right form; errors as pydantic gives them, without `body` in loc."""
    listed = [_entry(error) for error in errors]
    noun = "error" if len(listed) == 1 else "errors"
    lines = [f"{len(listed)} validation {noun}:", *(f"  {entry}" for entry in listed[:MAX_REPORTED_ERRORS])]
    if len(listed) > MAX_REPORTED_ERRORS:
        lines.append(f"  ...and {len(listed) - MAX_REPORTED_ERRORS} more {noun}")
    return ApiError("\n".join(lines), type=HTTPStatus.BAD_REQUEST.phrase, param=listed[0]["loc"])


def bad_json(error: json.JSONDecodeError) -> ApiError:
    """A body that is not JSON."""
    context = {"error": error.msg}
    return malformed(
        [
            {
                "type": "json_invalid",
                "loc": (error.pos,),
                "msg": "JSON decode error",
                "input": {},
                "ctx": context,
            }
        ]
    )


def not_json() -> ApiError:
    """A body that does not say it is JSON."""
    return ApiError(
        "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed",
        type=HTTPStatus.BAD_REQUEST.phrase,
    )


def unknown_model(name: str, served: Iterable[str]) -> ApiError:
    """A model that is not served here."""
    return ApiError(
        f"The model `{name}` does not exist. Valid aliases: {', '.join(served)}.",
        status=HTTPStatus.NOT_FOUND,
        type="NotFoundError",
        param="model",
    )


def busy() -> ApiError:
    """The queue limit (--max-num-queued-reqs) is reached."""
    return ApiError(
        "The engine is currently busy and cannot accept new requests. "
        "Please try again later or on a different instance.",
        status=HTTPStatus.SERVICE_UNAVAILABLE,
        type=HTTPStatus.SERVICE_UNAVAILABLE.phrase,
    )


def engine_dead() -> ApiError:
    """What every request gets when vLLM's engine core has died."""
    return ApiError(
        "EngineCore encountered an issue. See stack trace (above) for the root cause.",
        status=HTTPStatus.INTERNAL_SERVER_ERROR,
        type="InternalServerError",
    )


def too_long(limit: int, tokens: int, *, at_least: bool) -> ApiError:
    """A prompt that leaves no room for output."""
    return invalid(
        f"This model's maximum context length is {limit} tokens. However, your prompt contains "
        f"{'at least ' if at_least else ''}{tokens} input tokens, which exceeds this limit even without any "
        "output tokens. Please reduce the length of the input prompt.",
        "input_tokens",
        tokens,
    )


def _entry(error: Mapping[str, Any]) -> dict[str, Any]:
    loc = ".".join(["body", *(str(part) for part in error["loc"] if not _internal(str(part)))])
    entry = {"type": error["type"], "loc": loc, "msg": error["msg"], "input": _shown(error.get("input"))}
    return entry | ({"ctx": error["ctx"]} if "ctx" in error else {})


def _internal(part: str) -> bool:
    """Whether pydantic put this part there to tell branches of a union apart."""
    return part in ("str", "int", "float", "bool", "list", "dict") or any(c in part for c in "[](){}")


def _shown(value: object) -> str:
    if isinstance(value, list | tuple | dict):
        return f"<{type(value).__name__} of {len(value)} items>"
    text = str(value)
    return text if len(text) <= MAX_REPORTED_INPUT else text[:MAX_REPORTED_INPUT] + "...[truncated]"
