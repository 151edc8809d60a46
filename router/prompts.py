"""What a request asks to be prefilled: the tokens that engines make of it, or the text in place of them.

A request is read as vLLM reads it. Where that cannot be done exactly, the prompt is known by its text, and
why is said; the engine answers or refuses as if the router had not looked. Nothing here loads or waits.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import msgspec

from router.core.blocks import TOKEN_BYTES, Prompt, root_key
from router.openai_api import SALT, Call, Fields
from router.prompter import Prompter
from workers import dialects
from workers.chat_messages import Unrenderable, template_variables, tool_dicts
from workers.chat_template import TemplateError

# English takes about one token for so much, in all larger vocabularies.
BYTES_PER_TOKEN = 4
# What shows that there is more than text, which takes other numbers of tokens.
MEDIA = (b";base64,", b'"base64"', b'"input_audio"')
# More is not read: no context is that long, and a template would take seconds for it.
MAX_BODY_BYTES = 8 * 2**20
# Clients send the same tools with every request: the last ones are kept parsed, unless they are larger.
KEPT_TOOLS, MAX_KEPT_BYTES = 64, 256 * 1024
# What a client may set for a template: nothing that could make it loop or write for long.
MAX_VARIABLE_CHARS, MAX_VARIABLE = 256, 1_000_000

# Names in reasons are those of clients, and may be long.
MAX_REASON_CHARS = 200

# Members of a request that leave its prompt alone: those of which vLLM's source shows it, and a few that it
# ignores. With any other the token ids are not sent.
INERT = frozenset(
    {
        "allowed_token_ids", "bad_words", "cache_salt", "frequency_penalty", "ignore_eos",
        "include_stop_str_in_output", "length_penalty", "logit_bias", "logprob_token_ids", "logprobs",
        "max_tokens", "metadata", "min_p", "min_tokens", "model", "n", "presence_penalty", "priority",
        "prompt_cache_key", "prompt_logprobs", "repetition_detection", "repetition_penalty", "request_id",
        "response_format", "return_token_ids", "return_tokens_as_token_ids", "safety_identifier", "seed",
        "service_tier", "session_id", "skip_special_tokens", "spaces_between_special_tokens", "stop",
        "stop_token_ids", "store", "stream", "stream_interval", "stream_options", "structured_outputs",
        "temperature", "thinking_token_budget", "top_k", "top_p", "user",
    }
)  # fmt: skip
INERT_IN_CHATS = {"include_reasoning", "max_completion_tokens", "parallel_tool_calls", "top_logprobs"}
# Those that shape a prompt and are rendered.
SHAPE_CHATS = {
    "add_generation_prompt", "add_special_tokens", "chat_template_kwargs", "continue_final_message",
    "documents", "messages", "reasoning_effort", "tool_choice", "tools",
}  # fmt: skip
SHAPE_COMPLETIONS = {"add_special_tokens", "prompt"}
# Those that ask for a prompt which is not made here, unless they are null.
OTHER_PROMPT = (
    "chat_template", "media_io_kwargs", "mm_processor_kwargs", "previous_input_messages", "prompt_embeds",
    "suffix", "truncate_prompt_tokens", "truncation_side",
)  # fmt: skip
# Values with which members that are none of these do nothing.
NULL, FALSE = b"null", b"false"
IDLE: Mapping[str, tuple[bytes, ...]] = MappingProxyType(
    {"echo": (NULL, FALSE), "return_prompt_text": (NULL, FALSE)} | dict.fromkeys(OTHER_PROMPT, (NULL,))
)
SENT_BY_CLIENT = "the client sent token ids"
# With these no tool can be called.
NO_TOOL = ("none", {"type": "none"})


_decode_salt = msgspec.json.Decoder(str | None).decode


class Unread(Exception):
    """The tokens of the request are not known; the message says why."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What was made of a request. `prompt`: None where its family has none.

    `sendable`: the engine may be given the token ids in place of the text. `reason`: why not. `exact`: the
    ids are all that the engine reads, so they may be given to it with output behind them. `salt`: the
    cache's, if one was sent.
    """

    prompt: Prompt | None
    sendable: bool = False
    reason: str = ""
    exact: bool = False
    salt: str | None = None


UNREAD = Reading(None, reason="the policy does not go by prompts")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids as the engine will make them (little-endian uint32); `withheld`: why they are not sent."""

    ids: bytes
    withheld: str = ""


@dataclass(frozen=True, slots=True)
class Reader:
    """How the prompts of a family are read. `text`: the members that they consist of, as they follow.

    `harmless`: the members with which token ids may be sent; None where they are not.
    """

    read: Callable[[Fields, Prompter], Tokens]
    text: tuple[str, ...]
    harmless: frozenset[str] | None = None


def read(call: Call, prompter: Prompter | None, adapter: str | None = None, lacking: str = "") -> Reading:
    """What a request asks to be prefilled. `adapter`: the LoRA it runs with. `lacking`: why no prompter."""
    reader = READERS.get(call.family.path)
    if reader is None:
        return Reading(None, reason="requests of this family have no prompt")
    salt = _salt(call.fields)
    root = root_key(adapter, salt)
    if prompter is None:
        return _by_text(call.fields, reader, root, lacking)
    try:
        tokens = _tokens(call, reader, prompter)
    except Exception as error:  # bodies hold whatever clients send: the engine is to judge this one
        return _by_text(call.fields, reader, root, _why(error))
    withheld = _foreign_member(call.fields, reader.harmless) or tokens.withheld
    if not tokens.ids:
        withheld = "the prompt is empty"
    prompt = Prompt(len(tokens.ids) // TOKEN_BYTES, tokens.ids, root=root)
    return Reading(prompt, not withheld, withheld, withheld in ("", SENT_BY_CLIENT), salt)


def _tokens(call: Call, reader: Reader, prompter: Prompter) -> Tokens:
    if len(call.body) > MAX_BODY_BYTES:
        raise Unread(f"the body is longer than {MAX_BODY_BYTES} bytes")
    for name in OTHER_PROMPT:
        if _given(call.fields, name):
            raise Unread(f"with {name!r} the engine makes another prompt")
    return reader.read(call.fields, prompter)


def _why(error: Exception) -> str:
    """In words that a log may hold: nothing of what the client said to the model."""
    match error:
        case TemplateError():
            return f"the chat template fails: {type(error.__cause__ or error).__name__}"
        case Unread() | Unrenderable():
            return str(error)[:MAX_REASON_CHARS]
    return f"the router cannot read it: {type(error).__name__}"


def _foreign_member(fields: Fields, harmless: frozenset[str] | None) -> str:
    if harmless is None:
        return "requests of this family are sent as they came"
    for name in fields.keys() - harmless:
        if bytes(fields[name]) not in IDLE.get(name, ()):
            return f"what {name!r} does to the prompt is not known"[:MAX_REASON_CHARS]
    return ""


def _by_text(fields: Fields, reader: Reader, root: int, reason: str) -> Reading:
    """The prompt as its bytes in the request, of which those of the next turn are a continuation."""
    text = b"".join([bytes(fields[name]) for name in reader.text if _given(fields, name)])
    text = text[:-1].rstrip() if text.endswith((b"]", b'"')) else text
    known = not any(sign in text for sign in MEDIA)
    return Reading(Prompt(len(text) // BYTES_PER_TOKEN if known else 0, text=text, root=root), reason=reason)


# -- one family after the other


def _chat(fields: Fields, prompter: Prompter) -> Tokens:
    tools, doubt = _tools(fields, prompter, _as_they_came)
    ids = prompter.chat(
        _required(fields, "messages", list),
        tools,
        add_special_tokens=_member(fields, "add_special_tokens", bool, False),
        add_generation_prompt=_member(fields, "add_generation_prompt", bool, True),
        continue_final_message=_member(fields, "continue_final_message", bool, False),
        documents=_documents(fields),
        variables=_variables(fields, prompter, _member(fields, "reasoning_effort", str, None)),
    )
    return Tokens(ids, doubt)


def _completion(fields: Fields, prompter: Prompter) -> Tokens:
    prompt = _required(fields, "prompt", str | list)
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if prompt in ("", []):
        raise Unread("the prompt is empty")
    if isinstance(prompt, str):
        return Tokens(prompter.text(prompt, _member(fields, "add_special_tokens", bool, True)))
    if any(isinstance(part, str | list) for part in prompt):
        raise Unread("there are several prompts")
    return Tokens(pack(prompt), SENT_BY_CLIENT)


def _messages(fields: Fields, prompter: Prompter) -> Tokens:
    """Anthropic's messages, which vLLM answers through its chat."""
    if _member(fields, "thinking", dict, {}).get("type") == "disabled":
        raise Unread("how thinking is disabled depends on the template")
    chat = dialects.chat_of_messages(
        _member(fields, "system", str | list, None), _required(fields, "messages", list)
    )
    tools, _ = _tools(fields, prompter, dialects.tools_of_messages)
    effort = _member(fields, "output_config", dict, {}).get("effort")
    return Tokens(prompter.chat(chat, tools, variables=_variables(fields, prompter, effort)))


def _response(fields: Fields, prompter: Prompter) -> Tokens:
    for name in ("previous_response_id", "prompt"):
        if _given(fields, name):
            raise Unread(f"only the engine has what {name!r} stands for")
    if _member(fields, "truncation", str, "disabled") != "disabled":
        raise Unread("the engine may truncate the prompt")
    instructions = _member(fields, "instructions", str, None)
    before = [{"role": "system", "content": instructions}] if instructions else []
    chat = dialects.chat_of_items(_required(fields, "input", str | list), before)
    tools, _ = _tools(fields, prompter, dialects.tools_of_responses)
    effort = _member(fields, "reasoning", dict, {}).get("effort")
    ids = prompter.chat(
        chat,
        tools,
        add_special_tokens=dialects.RESPONSES_ADD_SPECIAL_TOKENS,
        variables=_variables(fields, prompter, effort),
    )
    return Tokens(ids)


def _generate(fields: Fields, prompter: Prompter) -> Tokens:
    if _given(fields, "features"):
        raise Unread("the prompt is not text alone")
    return Tokens(pack(_required(fields, "token_ids", list)))


READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "/v1/chat/completions": Reader(_chat, ("tools", "messages"), INERT | INERT_IN_CHATS | SHAPE_CHATS),
        "/v1/completions": Reader(_completion, ("prompt",), INERT | SHAPE_COMPLETIONS),
        "/v1/messages": Reader(_messages, ("tools", "system", "messages")),
        "/v1/responses": Reader(_response, ("tools", "instructions", "input")),
        "/inference/v1/generate": Reader(_generate, ("token_ids",)),
    }
)


# -- members


def _tools(
    fields: Fields, prompter: Prompter, as_chats: Callable[[Any], Any]
) -> tuple[list[dict[str, Any]] | None, str]:
    """The tools as the template sees them, and what is doubtful about that."""
    if not _given(fields, "tools"):
        return None, ""
    raw = bytes(fields["tools"])
    parse = _parsed_tools if len(raw) <= MAX_KEPT_BYTES else _parsed_tools.__wrapped__
    tools = parse(raw, as_chats)
    if _member(fields, "tool_choice", str | dict, "auto") not in NO_TOOL:
        return tools, ""
    if prompter.excludes_tools is None:
        return tools, "whether tools are shown that cannot be called is not known of the engine"
    return (None if prompter.excludes_tools else tools), ""


@lru_cache(maxsize=KEPT_TOOLS)
def _parsed_tools(raw: bytes, as_chats: Callable[[Any], Any]) -> list[dict[str, Any]] | None:
    """Parsed by the JSON parser that vLLM's is: templates print numbers as it reads them."""
    tools = as_chats(json.loads(raw))
    return None if tools is None else tool_dicts(tools)


def _as_they_came(tools: Any) -> Any:
    return tools


def _documents(fields: Fields) -> list[dict[str, str]] | None:
    documents = _member(fields, "documents", list, None)
    for document in documents or ():
        if not isinstance(document, dict) or not all(isinstance(value, str) for value in document.values()):
            raise Unread("'documents' are not all texts by their names")
    return documents


def _variables(fields: Fields, prompter: Prompter, effort: object) -> dict[str, Any]:
    """What the template gets beside the chat, if it is harmless."""
    given = _member(fields, "chat_template_kwargs", dict, {})
    for name, value in given.items():
        if name in prompter.reserved or not _is_plain(value):
            raise Unread(f"'chat_template_kwargs' sets {name!r} to what templates do not get here")
    if not isinstance(effort, str | None):
        raise Unread("the reasoning effort is no text")
    return template_variables(given, effort, prompter.defaults)


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_VARIABLE_CHARS
    return value is None or (isinstance(value, bool | int | float) and abs(value) <= MAX_VARIABLE)


def pack(ids: Sequence[int]) -> bytes:
    """Token ids as prompts have them."""
    return array("I", ids).tobytes()


def _salt(fields: Fields) -> str | None:
    try:
        return _decode_salt(fields.get(SALT, NULL))
    except msgspec.MsgspecError:
        return None  # the engine refuses it


def _given(fields: Fields, name: str) -> bool:
    return name in fields and bytes(fields[name]) != NULL


def _required(fields: Fields, name: str, kind: Any) -> Any:
    value = _member(fields, name, kind, None)
    if value is None:
        raise Unread(f"{name!r} is missing")
    return value


def _member(fields: Fields, name: str, kind: Any, default: Any) -> Any:
    """A member of this type; null counts as missing."""
    raw = fields.get(name)
    value = None if raw is None else msgspec.json.decode(raw)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise Unread(f"{name!r} is of another type")
    return value
