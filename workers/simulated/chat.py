"""POST /v1/chat/completions."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from workers.chat_messages import template_variables
from workers.simulated.grammar import (
    Arguments,
    CallOpened,
    Forced,
    Part,
    Said,
    ToolReader,
    forced_call,
    forced_json,
)
from workers.simulated.live import Delta, Generation
from workers.simulated.requests import (
    ChatRequest,
    NamedTool,
    check_tools,
    forwarded_token_ids,
    given,
    openai_sampling,
)
from workers.simulated.service import DONE, Identity, Service, event, usage
from workers.tokenizer import Tokenizer


async def start(service: Service, request: ChatRequest, header: str | None) -> "ChatAnswer":
    """Admit and begin a chat. ApiError if vLLM would refuse it."""
    check_tools(request)
    service.check_model(request.model)
    service.live.check_admission(request.n or 1)
    prompt = await _prompt(service, request)
    sampling = openai_sampling(request, len(prompt), service.max_model_len)
    forced = _forced(request, prompt)
    script = None if forced is None else service.tokenizer.encode(forced.text, add_special_tokens=False)
    identity = service.identity("chatcmpl", header, request.request_id)
    generation = service.live.generate(identity.id, [prompt], sampling, script)
    return ChatAnswer(service, request, identity, generation, forced)


async def _prompt(service: Service, request: ChatRequest) -> list[int]:
    params = None if request.echo else request.kv_transfer_params
    forwarded = forwarded_token_ids(params, request.messages, service.tokenizer.vocab_size)
    if forwarded is not None:
        service.check_length(forwarded)
        return forwarded
    return await service.chat_prompt(
        request.messages,
        given(request.tools),
        add_special_tokens=request.add_special_tokens,
        template=request.chat_template,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        documents=request.documents,
        variables=template_variables(request.chat_template_kwargs or {}, request.reasoning_effort),
    )


def _forced(request: ChatRequest, prompt: Sequence[int]) -> Forced | None:
    functions = [tool.function.model_dump() for tool in request.tools or ()]
    if isinstance(request.tool_choice, NamedTool):
        return forced_call(functions, request.tool_choice.function.name, prompt)
    if request.tool_choice == "required":
        return forced_call(functions, None, prompt)
    return forced_json(request.response_format, prompt)


class ChatAnswer:
    """A chat under way, as a stream of chunks or as one body."""

    def __init__(
        self,
        service: Service,
        request: ChatRequest,
        identity: Identity,
        generation: Generation,
        forced: Forced | None,
    ) -> None:
        self.generation = generation
        self._service = service
        self._request = request
        self._identity = identity
        self._call = forced.call if forced else None
        self._prompt_tokens = generation.num_prompt_tokens

    async def stream(self) -> AsyncIterator[bytes]:
        """The events of the stream."""
        request = self._request
        choices = request.n or 1
        readers = [ToolReader(self._call) for _ in range(choices)]
        said = [0] * choices
        first = True
        async for delta in self.generation:
            if first:
                first = False
                for index in range(choices):
                    yield self._role_chunk(index)
            if not delta.text and not delta.token_ids and not said[delta.index]:
                continue  # aborted before its first token: vLLM sends nothing
            said[delta.index] += len(delta.token_ids)
            message = _delta_message(readers[delta.index].read(delta.text))
            bare = not (request.return_token_ids or request.logprobs)
            if not message and delta.finish_reason is None and bare:
                continue
            yield self._chunk(delta, message, said[delta.index])
        if request.include_usage:
            yield self._usage_chunk(sum(said))
        yield DONE

    def _head(self) -> dict[str, Any]:
        identity = self._identity
        return {
            "id": identity.id,
            "object": "chat.completion.chunk",
            "created": identity.created,
            "model": identity.model,
        }

    def _role_chunk(self, index: int) -> bytes:
        message = {"role": "assistant", "content": ""}
        chunk = self._head()
        chunk["choices"] = [{"index": index, "delta": message, "logprobs": None, "finish_reason": None}]
        if self._request.continuous_usage:
            chunk["usage"] = usage(self._prompt_tokens, 0, completion_tokens_details=None)
        chunk["prompt_token_ids"] = self.generation.prompts[0] if self._request.return_token_ids else None
        chunk["prompt_text"] = None
        return event(chunk)

    def _chunk(self, delta: Delta, message: dict[str, Any], said: int) -> bytes:
        request = self._request
        choice: dict[str, Any] = {
            "index": delta.index,
            "delta": message,
            "logprobs": self._logprobs(delta.token_ids),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            if (
                delta.finish_reason == "stop"
                and self._call
                and not isinstance(request.tool_choice, NamedTool)
            ):
                choice["finish_reason"] = "tool_calls"
            choice["stop_reason"] = delta.stop_reason
        choice["token_ids"] = delta.token_ids if request.return_token_ids else None
        chunk = self._head()
        chunk["choices"] = [choice]
        if request.continuous_usage:
            chunk["usage"] = usage(self._prompt_tokens, said, completion_tokens_details=None)
        if delta.finish_reason is not None and not request.include_usage:
            chunk["system_fingerprint"] = self._service.fingerprint
        return event(chunk)

    def _usage_chunk(self, completion: int) -> bytes:
        details = {"prompt_tokens_details": self._cached()} if self._service.prompt_tokens_details else {}
        chunk = self._head() | {"choices": [], "usage": usage(self._prompt_tokens, completion, **details)}
        return event(chunk | {"system_fingerprint": self._service.fingerprint})

    def _cached(self) -> dict[str, int]:
        cached = self.generation.cached_tokens
        return {"cached_tokens": cached, "created_cache_tokens": self._created(cached)}

    def _created(self, cached: int) -> int:
        """Prompt tokens whose blocks were new to the cache."""
        block = self._service.live.core.config.block_size
        return self._prompt_tokens // block * block - cached

    async def whole(self) -> dict[str, Any]:
        """The body of the answer."""
        deltas = await self.generation.whole()
        identity = self._identity
        details = None
        if self._service.prompt_tokens_details:
            details = {**self._cached(), "multimodal_tokens": None}
        completion = sum(len(delta.token_ids) for delta in deltas)
        return {
            "id": identity.id,
            "object": "chat.completion",
            "created": identity.created,
            "model": identity.model,
            "choices": [self._choice(delta) for delta in deltas],
            "service_tier": None,
            "system_fingerprint": self._service.fingerprint,
            "usage": usage(
                self._prompt_tokens, completion, prompt_tokens_details=details, completion_tokens_details=None
            ),
            "prompt_logprobs": None,
            "prompt_token_ids": self.generation.prompts[0] if self._request.return_token_ids else None,
            "prompt_text": None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def _choice(self, delta: Delta) -> dict[str, Any]:
        reader = ToolReader(self._call)
        reader.read(delta.text)
        finish = delta.finish_reason
        if finish == "stop" and self._request.tool_choice == "required":
            finish = "tool_calls"
        return {
            "index": delta.index,
            "message": _message(delta.text, reader),
            "logprobs": self._logprobs(delta.token_ids),
            "finish_reason": finish,
            "stop_reason": delta.stop_reason,
            "token_ids": delta.token_ids if self._request.return_token_ids else None,
            "routed_experts": None,
        }

    def _logprobs(self, token_ids: Sequence[int]) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        top = bool(self._request.top_logprobs)
        return {"content": [_logprob(self._service.tokenizer, token, top=top) for token in token_ids]}


def token_logprob(token_id: int) -> float:
    """A made-up log-probability, always the same for a token."""
    return -(1 + token_id % 97) / 100


def _logprob(tokenizer: Tokenizer, token_id: int, *, top: bool) -> dict[str, Any]:
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    entry = {"token": text, "logprob": token_logprob(token_id), "bytes": list(text.encode())}
    return {**entry, "top_logprobs": [entry] if top else []}


def _delta_message(parts: Sequence[Part]) -> dict[str, Any]:
    """A chunk's `delta`: text, or a piece of the tool call, or nothing."""
    function: dict[str, str] = {}
    call: dict[str, Any] = {}
    for part in parts:
        match part:
            case Said(text):
                return {"content": text}
            case CallOpened(id, name):
                call = {"id": id, "type": "function"}
                function["name"] = name
            case Arguments(text):
                function["arguments"] = text
    return {"content": None, "tool_calls": [{**call, "index": 0, "function": function}]} if function else {}


def _message(text: str, reader: ToolReader) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": text,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
    }
    if reader.whole_call is not None:
        id, call = reader.whole_call
        function = {"name": call.name, "arguments": call.arguments}
        message["content"] = ""
        message["tool_calls"] = [{"id": id, "type": "function", "function": function}]
    return message | {"reasoning": None}
