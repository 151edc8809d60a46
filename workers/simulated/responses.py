"""POST /v1/responses, and GET of a stored one."""

from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from workers.dialects import RESPONSES_ADD_SPECIAL_TOKENS, chat_of_items, tools_of_responses
from workers.simulated import errors
from workers.simulated.grammar import Arguments, CallOpened, Forced, Part, Said, ToolReader, forced_call
from workers.simulated.live import Generation, Sampling
from workers.simulated.requests import (
    ResponsesRequest,
    check_temperature,
    forwarded_token_ids,
    output_limit,
)
from workers.simulated.service import Identity, Service, named_event, new_id

# Answers kept for previous_response_id; the oldest go first.
MAX_STORED = 10_000

# Where the last two fields of an event go when they are not last; vLLM's order differs by event.
PLACE = {"sequence_number": None, "type": None}

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stored:
    """An answer and the chat that it ends."""

    body: dict[str, Any]
    messages: list[Message]


class ResponseStore:
    """The last answers by id: vLLM's store with VLLM_ENABLE_RESPONSES_API_STORE=1, but bounded."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, Stored] = OrderedDict()

    def put(self, body: dict[str, Any], messages: list[Message]) -> None:
        """Keep an answer with the messages it follows."""
        self._answers[body["id"]] = Stored(body, messages)
        if len(self._answers) > MAX_STORED:
            self._answers.popitem(last=False)

    def get(self, id: str) -> Stored:
        """A kept answer. ApiError 404 if there is none by this id."""
        try:
            return self._answers[id]
        except KeyError:
            raise errors.ApiError(
                f"Response with id '{id}' not found.",
                status=HTTPStatus.NOT_FOUND,
                type="invalid_request_error",
                param="response_id",
            ) from None


async def start(service: Service, store: ResponseStore, request: ResponsesRequest) -> "ResponsesAnswer":
    """Admit and begin an answer. ApiError if vLLM would refuse it."""
    service.check_model(request.model)
    service.live.check_admission(1)
    check_temperature(request)
    with errors.of_prompts():
        messages = input_messages(request, store)
        tools = tools_of_responses(request.tools)
    prompt = forwarded_token_ids(request.kv_transfer_params, messages, service.tokenizer.vocab_size)
    if prompt is None:
        prompt = await service.chat_prompt(messages, tools, add_special_tokens=RESPONSES_ADD_SPECIAL_TOKENS)
    service.check_length(prompt)
    sampling = Sampling(
        max_tokens=output_limit(request.max_output_tokens, len(prompt), service.max_model_len),
        cache_salt=request.cache_salt,
    )
    forced = _forced(request, tools or (), prompt)
    script = None if forced is None else service.tokenizer.encode(forced.text, add_special_tokens=False)
    id = request.request_id or f"resp_{new_id()}"
    identity = Identity(id, service.served_names[0], service.identity("", None).created)
    generation = service.live.generate(id, [prompt], sampling, script)
    return ResponsesAnswer(service, store, request, identity, generation, sampling, forced, messages)


def input_messages(request: ResponsesRequest, store: ResponseStore) -> list[Message]:
    """The chat that a request's instructions, history and input make."""
    messages: list[Message] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if request.previous_response_id:
        before = store.get(request.previous_response_id)
        messages += [m for m in before.messages if m["role"] != "system"]
        messages += [
            {"role": "assistant", "content": item["content"][0]["text"]}
            for item in before.body["output"]
            if item["type"] == "message"
        ]
    return chat_of_items(request.input, messages)


def _forced(
    request: ResponsesRequest, tools: Sequence[Mapping[str, Any]], prompt: Sequence[int]
) -> Forced | None:
    functions = [tool["function"] for tool in tools]
    if not functions or request.tool_choice in ("none", "auto"):
        return None
    name = request.tool_choice.get("name") if isinstance(request.tool_choice, dict) else None
    if name is not None and all(function["name"] != name for function in functions):
        message = f"Tool '{name}' in `tool_choice` does not match any of the specified `tools`"
        raise errors.invalid(message, "tool_choice")
    return forced_call(functions, name, prompt)


class ResponsesAnswer:
    """A response under way, as a stream of events or as one body."""

    def __init__(
        self,
        service: Service,
        store: ResponseStore,
        request: ResponsesRequest,
        identity: Identity,
        generation: Generation,
        sampling: Sampling,
        forced: Forced | None,
        messages: list[Message],
    ) -> None:
        self.generation = generation
        self._service = service
        self._store = store
        self._request = request
        self._identity = identity
        self._sampling = sampling
        self._call = forced.call if forced else None
        self._messages = messages
        self._sequence = 0

    async def stream(self) -> AsyncIterator[bytes]:
        """The events of the stream."""
        started = self._body([], "in_progress", None, None)
        for name in ("response.created", "response.in_progress"):
            yield self._event({"response": started}, name)
        reader, item = ToolReader(self._call), _Item()
        said, finish = 0, None
        async for delta in self.generation:
            said += len(delta.token_ids)
            finish = delta.finish_reason or finish
            for part in reader.read(delta.text):
                for data, name in item.add(part):
                    yield self._event(data, name)
        for data, name in item.close():
            yield self._event(data, name)
        body = self._finished([item.done] if item.done else [], finish, said)
        yield self._event({"response": body}, "response.completed")

    async def whole(self) -> dict[str, Any]:
        """The body of the answer."""
        delta = (await self.generation.whole())[0]
        reader = ToolReader(self._call)
        reader.read(delta.text)
        if reader.whole_call is not None:
            id, call = reader.whole_call
            output = [_function_call(f"fc_{new_id()}", id, call.name, call.arguments)]
        else:
            output = [_message(f"msg_{new_id()}", delta.text)]
        return self._finished(output, delta.finish_reason, len(delta.token_ids))

    def _finished(self, output: list[dict[str, Any]], finish: str | None, said: int) -> dict[str, Any]:
        status = {"length": "incomplete", "abort": "cancelled"}.get(finish or "", "completed")
        details = {"reason": "max_output_tokens"} if finish == "length" else None
        body = self._body(output, status, details, self._usage(said))
        if self._request.store:
            self._store.put(body, self._messages)
        return body

    def _usage(self, said: int) -> dict[str, Any]:
        prompt, details = self.generation.num_prompt_tokens, self._service.prompt_tokens_details
        cached = self.generation.cached_tokens if details else 0
        block = self._service.live.core.config.block_size
        return {
            "input_tokens": prompt,
            "input_tokens_details": {
                "cached_tokens": cached,
                "cache_write_tokens": prompt // block * block - cached if details else 0,
                "input_tokens_per_turn": [],
                "cached_tokens_per_turn": [],
            },
            "output_tokens": said,
            "output_tokens_details": {
                "reasoning_tokens": 0,
                "tool_output_tokens": 0,
                "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": prompt + said,
        }

    def _body(
        self,
        output: list[dict[str, Any]],
        status: str,
        incomplete: dict[str, Any] | None,
        usage: dict[str, Any] | None,
    ) -> dict[str, Any]:
        request, identity = self._request, self._identity
        has_choice = bool(request.tools) or "tool_choice" in request.model_fields_set
        return {
            "id": identity.id,
            "created_at": identity.created,
            "incomplete_details": incomplete,
            "instructions": request.instructions,
            "metadata": request.metadata,
            "model": identity.model,
            "object": "response",
            "output": output,
            "parallel_tool_calls": request.parallel_tool_calls,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "tool_choice": request.tool_choice if has_choice else "none",
            "tools": [_echoed_tool(tool) for tool in request.tools],
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "background": False,
            "max_output_tokens": self._sampling.max_tokens,
            "max_tool_calls": None,
            "previous_response_id": request.previous_response_id,
            "prompt": None,
            "reasoning": None,
            "service_tier": "auto",
            "status": status,
            "text": None,
            "top_logprobs": request.top_logprobs,
            "truncation": "disabled",
            "usage": usage,
            "user": request.user,
            "presence_penalty": request.presence_penalty or 0.0,
            "frequency_penalty": request.frequency_penalty or 0.0,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "input_messages": None,
            "output_messages": None,
        }

    def _event(self, data: Mapping[str, Any], name: str) -> bytes:
        number, self._sequence = self._sequence, self._sequence + 1
        return named_event({**data, "sequence_number": number, "type": name})


class _Item:
    """The one output item of a stream, a message or a call, as the events that build it."""

    def __init__(self) -> None:
        self.done: dict[str, Any] | None = None
        self._id = ""
        self._call: CallOpened | None = None
        self._text = ""

    def add(self, part: Part) -> list[tuple[dict[str, Any], str]]:
        """Events that open the item, if it is not open, and add this part."""
        match part:
            case CallOpened():
                self._id, self._call = f"fc_{new_id()}", part
                item = _function_call(self._id, part.id, part.name, "", "in_progress")
                return [({"item": item, "output_index": 0}, "response.output_item.added")]
            case Arguments(text):
                self._text += text
                data = {"delta": text, "item_id": self._id, "output_index": 0}
                return [(data, "response.function_call_arguments.delta")]
            case Said(text):
                events = [] if self._id else self._open_message()
                self._text += text
                data = {
                    "content_index": 0,
                    "delta": text,
                    "item_id": self._id,
                    "logprobs": [],
                    "output_index": 0,
                }
                return [*events, (data, "response.output_text.delta")]

    def _open_message(self) -> list[tuple[dict[str, Any], str]]:
        self._id = f"msg_{new_id()}"
        item = {**_message(self._id, ""), "content": [], "status": "in_progress"}
        part: dict[str, Any] = {"annotations": [], "text": "", "type": "output_text", "logprobs": []}
        where = {"content_index": 0, "item_id": self._id, "output_index": 0, "part": part}
        return [
            ({"item": item, "output_index": 0}, "response.output_item.added"),
            (where, "response.content_part.added"),
        ]

    def close(self) -> list[tuple[dict[str, Any], str]]:
        """Events that end the item; none if nothing was said."""
        if not self._id:
            return []
        where = {"item_id": self._id, "output_index": 0}
        if self._call is not None:
            self.done = _function_call(self._id, self._call.id, self._call.name, self._text)
            data = {"arguments": self._text, **where, **PLACE, "name": self._call.name}
            events = [(data, "response.function_call_arguments.done")]
        else:
            self.done = _message(self._id, self._text)
            part = self.done["content"][0]
            text = {"content_index": 0, "item_id": self._id, "logprobs": [], "output_index": 0}
            text |= {"sequence_number": None, "text": self._text}
            events = [
                (text, "response.output_text.done"),
                ({"content_index": 0, **where, "part": part}, "response.content_part.done"),
            ]
        return [*events, ({"item": self.done, "output_index": 0}, "response.output_item.done")]


def _message(id: str, text: str) -> dict[str, Any]:
    return {
        "id": id,
        "content": [{"annotations": [], "text": text, "type": "output_text", "logprobs": None}],
        "role": "assistant",
        "status": "completed",
        "type": "message",
        "phase": None,
    }


def _function_call(
    id: str, call_id: str, name: str, arguments: str, status: str = "completed"
) -> dict[str, Any]:
    return {
        "arguments": arguments,
        "call_id": call_id,
        "name": name,
        "type": "function_call",
        "id": id,
        "async": None,
        "caller": None,
        "namespace": None,
        "status": status,
    }


def _echoed_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        return dict(tool)
    return {
        "name": tool.get("name"),
        "parameters": tool.get("parameters"),
        "strict": tool.get("strict"),
        "type": "function",
        "allowed_callers": None,
        "async": None,
        "defer_loading": None,
        "description": tool.get("description"),
        "output_schema": None,
    }
