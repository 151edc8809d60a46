"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's form of a chat."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from workers.dialects import chat_of_messages, tools_of_messages
from workers.simulated import errors
from workers.simulated.grammar import Arguments, CallOpened, Forced, Part, Said, ToolReader, forced_call
from workers.simulated.live import Delta, Generation, Sampling
from workers.simulated.requests import (
    CountTokensRequest,
    MessagesRequest,
    check_temperature,
    forwarded_token_ids,
    output_limit,
    stop_strings,
)
from workers.simulated.service import Identity, Service, named_event


async def start(service: Service, request: MessagesRequest, header: str | None) -> "MessagesAnswer":
    """Admit and begin an answer. ApiError if vLLM would refuse it."""
    service.check_model(request.model)
    service.live.check_admission(1)
    check_temperature(request)
    prompt = await _prompt(service, request)
    sampling = Sampling(
        max_tokens=output_limit(request.max_tokens, len(prompt), service.max_model_len),
        stop=stop_strings(request.stop_sequences),
        cache_salt=request.cache_salt,
    )
    forced = _forced(request, prompt)
    script = None if forced is None else service.tokenizer.encode(forced.text, add_special_tokens=False)
    identity = service.identity("chatcmpl", header)  # vLLM answers messages through its chat
    generation = service.live.generate(identity.id, [prompt], sampling, script)
    return MessagesAnswer(service, identity, generation, forced)


async def count_tokens(service: Service, request: CountTokensRequest) -> dict[str, Any]:
    """How long the prompt of these messages would be."""
    service.check_model(request.model)
    count = len(await _prompt(service, request))
    return {"input_tokens": count, "context_management": {"original_input_tokens": count}}


async def _prompt(service: Service, request: MessagesRequest | CountTokensRequest) -> list[int]:
    params = request.kv_transfer_params if isinstance(request, MessagesRequest) else None
    forwarded = forwarded_token_ids(params, request.messages, service.tokenizer.vocab_size)
    if forwarded is not None:
        service.check_length(forwarded)
        return forwarded
    with errors.of_prompts():
        messages = chat_of_messages(request.system, request.messages)
        tools = tools_of_messages(request.tools)
    return await service.chat_prompt(messages, tools)


def _forced(request: MessagesRequest, prompt: Sequence[int]) -> Forced | None:
    functions = [tool["function"] for tool in tools_of_messages(request.tools) or ()]
    choice = request.tool_choice or {}
    if not functions or choice.get("type") not in ("any", "tool"):
        return None
    name = choice.get("name") if choice["type"] == "tool" else None
    if name is not None and all(function["name"] != name for function in functions):
        message = "The tool specified in `tool_choice` does not match any of the specified `tools`"
        raise errors.invalid(message, "tool_choice")
    return forced_call(functions, name, prompt)


class MessagesAnswer:
    """An answer under way, as a stream of events or as one body."""

    def __init__(
        self, service: Service, identity: Identity, generation: Generation, forced: Forced | None
    ) -> None:
        self.generation = generation
        self._service = service
        self._identity = identity
        self._call = forced.call if forced else None

    async def stream(self) -> AsyncIterator[bytes]:
        """The events of the stream."""
        reader = ToolReader(self._call)
        started = opened = False
        said, last = 0, Delta(0)
        async for delta in self.generation:
            if not started:
                started = True
                yield named_event(self._start())
            said, last = said + len(delta.token_ids), delta
            for part in reader.read(delta.text):
                if not opened:
                    opened = True
                    yield named_event(_open_block(part))
                if (data := _block_delta(part)) is not None:
                    yield named_event(data)
        if opened:
            yield named_event({"type": "content_block_stop", "index": 0})
        reason, sequence = _stop_reason(last, tool_used=opened and self._call is not None)
        yield named_event(
            {
                "type": "message_delta",
                "delta": {"stop_reason": reason, "stop_sequence": sequence},
                "usage": self._usage(said),
            }
        )
        yield named_event({"type": "message_stop"})

    def _start(self) -> dict[str, Any]:
        message: dict[str, Any] = {
            "id": self._identity.id,
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": self._identity.model,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": self.generation.num_prompt_tokens, "output_tokens": 0},
        }
        return {"type": "message_start", "message": message}

    async def whole(self) -> dict[str, Any]:
        """The body of the answer."""
        delta = (await self.generation.whole())[0]
        reader = ToolReader(self._call)
        reader.read(delta.text)
        block: dict[str, Any] = {"type": "text", "text": delta.text}
        if reader.whole_call is not None:
            id, call = reader.whole_call
            block = {"type": "tool_use", "id": id, "name": call.name, "input": json.loads(call.arguments)}
        reason, sequence = _stop_reason(delta, tool_used=reader.whole_call is not None)
        return {
            "id": self._identity.id,
            "type": "message",
            "role": "assistant",
            "content": [block],
            "model": self._identity.model,
            **({"stop_reason": reason} if reason else {}),
            **({"stop_sequence": sequence} if sequence else {}),
            "usage": self._usage(len(delta.token_ids)),
        }

    def _usage(self, said: int) -> dict[str, int]:
        """Anthropic counts what was read from the cache or written to it apart from other input."""
        prompt = self.generation.num_prompt_tokens
        if not self._service.prompt_tokens_details:
            return {"input_tokens": prompt, "output_tokens": said}
        block = self._service.live.core.config.block_size
        read = self.generation.cached_tokens
        written = prompt // block * block - read
        return {
            "input_tokens": prompt - read - written,
            "output_tokens": said,
            "cache_creation_input_tokens": written,
            "cache_read_input_tokens": read,
        }


def _open_block(part: Part) -> dict[str, Any]:
    block: dict[str, Any] = {"type": "text", "text": ""}
    if isinstance(part, CallOpened):
        block = {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
    return {"type": "content_block_start", "content_block": block, "index": 0}


def _block_delta(part: Part) -> dict[str, Any] | None:
    match part:
        case Said(text):
            delta = {"type": "text_delta", "text": text}
        case Arguments(text):
            delta = {"type": "input_json_delta", "partial_json": text}
        case CallOpened():
            return None
    return {"type": "content_block_delta", "delta": delta, "index": 0}


def _stop_reason(delta: Delta, *, tool_used: bool) -> tuple[str | None, str | None]:
    """Anthropic's stop_reason and stop_sequence."""
    match delta.finish_reason:
        case "length":
            return "max_tokens", None
        case "stop" if tool_used:
            return "tool_use", None
        case "stop" if isinstance(delta.stop_reason, str):
            return "stop_sequence", delta.stop_reason
        case "stop":
            return "end_turn", None
    return None, None
