"""What every API family needs of the engine: model names, prompts as tokens, generations, identities."""

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from workers.chat_messages import tool_dicts
from workers.chat_template import ChatTemplate
from workers.simulated import errors
from workers.simulated.faults import Faults
from workers.simulated.live import LiveEngine
from workers.tokenizer import Tokenizer

# The version whose wire this engine speaks.
VLLM_VERSION = "0.32.0"

# Texts longer than this many characters (about 2k tokens) are tokenised off the event loop.
LONG_TEXT = 8192

# What the fault `template` puts before every chat.
OTHER_TEMPLATE = "This is another chat template.\n"

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Identity:
    """How an answer names itself."""

    id: str
    model: str
    created: int


class Service:
    """The engine, its tokenizer and its names."""

    def __init__(
        self,
        live: LiveEngine,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        faults: Faults,
        *,
        served_names: Sequence[str],
        model_root: str,
        max_model_len: int,
        prompt_tokens_details: bool,
    ) -> None:
        self.live = live
        self.tokenizer = tokenizer
        self._template = template
        self._faults = faults
        self.served_names = served_names
        self.model_root = model_root
        self.max_model_len = max_model_len
        self.prompt_tokens_details = prompt_tokens_details
        self.started = int(time.time())
        self.fingerprint = f"vllm-{VLLM_VERSION}-{uuid.uuid5(uuid.NAMESPACE_OID, model_root).hex[:8]}"

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served; no name means whichever is."""
        if name and name not in self.served_names:
            raise errors.unknown_model(name, self.served_names)

    def identity(self, prefix: str, header: str | None, request_id: str | None = None) -> Identity:
        """A new answer's identity; the client's X-Request-Id becomes part of it."""
        return Identity(
            f"{prefix}-{header or request_id or new_id()}", self.served_names[0], int(time.time())
        )

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text that must leave room in the context."""
        encode = self.tokenizer.encode
        if len(text) > LONG_TEXT:
            ids = await asyncio.to_thread(encode, text, add_special_tokens=add_special_tokens)
        else:
            ids = encode(text, add_special_tokens=add_special_tokens)
        if len(ids) > self.max_model_len:  # vLLM stops tokenising one token past the limit
            raise errors.too_long(self.max_model_len, self.max_model_len + 1, at_least=True)
        return ids

    def check_length(self, token_ids: Sequence[int]) -> None:
        """Refuse a prompt of ids that is longer than the context."""
        if len(token_ids) > self.max_model_len:
            at_least = len(token_ids) == self.max_model_len + 1
            raise errors.too_long(self.max_model_len, len(token_ids), at_least=at_least)

    async def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_special_tokens: bool = False,
        **options: Any,
    ) -> list[int]:
        """Token ids of a chat; tools as requests bring them, options as of ChatTemplate.render."""
        with errors.of_prompts():
            shown = None if tools is None else tool_dicts(tools)
            text = self._template.render(messages, shown, **options)
        if self._faults.take("template"):
            text = OTHER_TEMPLATE + text
        return await self.encode(text, add_special_tokens=add_special_tokens)


def new_id() -> str:
    """A random id in vLLM's form: 16 hexadecimal digits."""
    return uuid.uuid4().hex[:16]


def event(data: object) -> bytes:
    """One server-sent event without a name."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def named_event(data: Mapping[str, Any]) -> bytes:
    """One server-sent event named by its type."""
    return b"event: " + str(data["type"]).encode() + b"\n" + event(data)


def usage(prompt: int, completion: int, **details: object) -> dict[str, Any]:
    """OpenAI usage in vLLM's order."""
    counts = {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}
    return {**counts, **details}
