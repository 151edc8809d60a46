"""What clients may send: request bodies as vLLM declares them, and the checks it makes beside their form."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Required, TypeVar

import pydantic
from pydantic import AliasChoices, BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from workers.simulated import errors
from workers.simulated.live import Sampling

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
MAX_SALT_LENGTH = 128
SALT_FORBIDDEN = frozenset("@/\\\x00")


class Message(TypedDict, total=False):
    """One message of a chat. Other fields reach the chat template as they are."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    role: Required[str]
    content: str | list[Any] | None


Stop = str | list[str] | None


class Body(BaseModel):
    """A request body. Unknown fields are accepted and ignored, as vLLM does."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None


class StreamOptions(BaseModel):
    """Which usage a stream reports."""

    model_config = ConfigDict(extra="allow")

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class Function(BaseModel):
    """A function that a tool call may name."""

    model_config = ConfigDict(extra="allow")

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A tool of a chat request."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"] = "function"
    function: Function


def given(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """The tools as they came."""
    return None if tools is None else [tool.model_dump(exclude_unset=True) for tool in tools]


class NamedFunction(BaseModel):
    """The function that must be called."""

    name: str


class NamedTool(BaseModel):
    """A tool_choice that names its function."""

    type: Literal["function"] = "function"
    function: NamedFunction


class Generate(Body):
    """What all requests for text share. Ranges are checked when the sampling parameters are made."""

    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = False
    cache_salt: str | None = None
    kv_transfer_params: dict[str, Any] | None = None


class OpenAIGenerate(Generate):
    """What chat and text completions share."""

    frequency_penalty: float | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    n: int | None = 1
    presence_penalty: float | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    seed: int | None = None
    skip_special_tokens: bool = True
    stop: Stop = None
    stop_token_ids: list[int] | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage event."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every event of a stream carries usage."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class ChatRequest(OpenAIGenerate):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = 0
    response_format: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = "none"
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    echo: bool = False


class CompletionRequest(OpenAIGenerate):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool | None = False
    suffix: str | None = None
    add_special_tokens: bool = True


class ResponsesRequest(Generate):
    """POST /v1/responses."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = True
    previous_response_id: str | None = None
    request_id: str | None = None
    store: bool | None = True
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] = "auto"
    top_logprobs: int | None = None
    user: str | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


class MessagesRequest(Generate):
    """POST /v1/messages."""

    model: str
    messages: list[Message]
    max_tokens: int
    stop_sequences: list[str] | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None


class CountTokensRequest(Body):
    """POST /v1/messages/count_tokens."""

    model: str
    messages: list[Message]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


class EmbeddingsRequest(Body):
    """POST /v1/embeddings."""

    input: str | list[int] | list[str] | list[list[int]]
    dimensions: int | None = Field(default=None, ge=1)
    encoding_format: Literal["float", "base64"] = "float"


Texts = str | list[str]


class ScoreRequest(Body):
    """POST /score. vLLM knows the two sides by four pairs of names."""

    left: Texts = Field(validation_alias=AliasChoices("text_1", "data_1", "queries"))
    right: Texts = Field(validation_alias=AliasChoices("text_2", "data_2", "documents", "items"))

    @property
    def pairs(self) -> tuple[list[str], list[str]]:
        """The texts of both sides."""
        return as_list(self.left), as_list(self.right)


class RerankRequest(Body):
    """POST /rerank."""

    query: str
    documents: Texts
    top_n: int = Field(default=0, ge=0)


def as_list(texts: Texts) -> list[str]:
    """One text or several as several."""
    return [texts] if isinstance(texts, str) else texts


class TranscriptionRequest(Body):
    """POST /v1/audio/transcriptions and /v1/audio/translations: the fields of a form."""

    file: bytes
    response_format: str = "json"
    stream: bool | None = False
    max_completion_tokens: int | None = None


class TokenizeRequest(Body):
    """POST /tokenize, of a text or a chat."""

    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(Body):
    """POST /detokenize."""

    tokens: list[int]


Parsed = TypeVar("Parsed", bound=BaseModel)


def parse(kind: type[Parsed], content_type: str, body: bytes) -> Parsed:
    """A request body as its type. ApiError in vLLM's words if it is not one."""
    if content_type.lower().partition(";")[0].strip() != "application/json":
        raise errors.not_json()
    if not body:
        raise errors.malformed([{"type": "missing", "loc": (), "msg": "Field required", "input": None}])
    try:
        value = json.loads(body)
    except json.JSONDecodeError as error:
        raise errors.bad_json(error) from error
    if not isinstance(value, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        raise errors.malformed([{"type": "model_attributes_type", "loc": (), "msg": message, "input": value}])
    _check_before_parsing(kind, value)
    return validated(kind, value)


def validated(kind: type[Parsed], value: Mapping[str, Any]) -> Parsed:
    """The members of a body as its type. ApiError in vLLM's words if they do not fit."""
    try:
        return kind.model_validate(value)
    except pydantic.ValidationError as error:
        raise errors.malformed([dict(e) for e in error.errors(include_url=False)]) from error


def _check_before_parsing(kind: type[BaseModel], value: dict[str, Any]) -> None:
    """What vLLM checks on the raw body, before the types of its fields."""
    if value.get("stream_options") and not value.get("stream"):
        raise errors.invalid("Stream options can only be defined when `stream=True`.", "stream_options")
    _check_salt(value.get("cache_salt"))
    if kind is ChatRequest and value.get("tools") == []:
        message = (
            "`tools` must not be an empty array. Either provide at least one tool or omit the field entirely."
        )
        raise errors.invalid(message, "tools")


def _check_salt(salt: object) -> None:
    if salt is None:
        return
    if not isinstance(salt, str) or not salt:
        raise errors.invalid("Parameter 'cache_salt' must be a non-empty string if provided.", "cache_salt")
    if len(salt) > MAX_SALT_LENGTH or SALT_FORBIDDEN & set(salt):
        message = (
            "Parameter 'cache_salt' must be at most 128 characters and must "
            "not contain '@', '/', '\\\\', or NUL."
        )
        raise errors.invalid(message, "cache_salt")


def check_tools(request: ChatRequest) -> None:
    """Let tool_choice default to auto when there are tools; refuse what names no tool."""
    choice = request.tool_choice
    if "tool_choice" not in request.model_fields_set and request.tools:
        request.tool_choice = "auto"
    if choice in (None, "none"):
        return
    if not request.tools:
        raise errors.invalid("When using `tool_choice`, `tools` must be set.", "tool_choice")
    if isinstance(choice, NamedTool) and all(
        tool.function.name != choice.function.name for tool in request.tools
    ):
        message = "The tool specified in `tool_choice` does not match any of the specified `tools`"
        raise errors.invalid(message, "tool_choice")


def openai_sampling(request: OpenAIGenerate, prompt_tokens: int, max_model_len: int) -> Sampling:
    """Sampling parameters of a chat or completion for a prompt of this length."""
    limit, name = request.max_tokens, "max_tokens"
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        limit, name = request.max_completion_tokens, "max_completion_tokens"
    max_tokens = output_limit(limit, prompt_tokens, max_model_len, name)
    _check_ranges(request, max_tokens)
    return Sampling(
        max_tokens=max_tokens,
        n=1 if request.n is None else request.n,
        min_tokens=request.min_tokens,
        ignore_eos=request.ignore_eos,
        stop=stop_strings(request.stop),
        stop_token_ids=frozenset(request.stop_token_ids or ()),
        include_stop=request.include_stop_str_in_output,
        skip_special_tokens=request.skip_special_tokens,
        cache_salt=request.cache_salt,
    )


def output_limit(limit: int | None, prompt_tokens: int, max_model_len: int, name: str = "max_tokens") -> int:
    """How many tokens may come out: what was asked for, as far as the context has room."""
    if limit is not None and limit > max_model_len:
        message = (
            f"{name}={limit} cannot be greater than {max_model_len=}. Please request fewer output tokens."
        )
        raise errors.invalid(message, name, limit)
    room = max_model_len - prompt_tokens
    result = room if limit is None else min(limit, room)
    if result < 1:
        raise errors.invalid(f"max_tokens must be at least 1, got {result}.", "max_tokens", result)
    return result


def check_temperature(request: Generate) -> None:
    """Refuse temperatures and nuclei that do not exist."""
    if request.temperature is not None and request.temperature < 0:
        message = f"temperature must be non-negative, got {request.temperature}."
        raise errors.invalid(message, "temperature", request.temperature)
    if request.top_p is not None and not 0 < request.top_p <= 1:
        raise errors.invalid(f"top_p must be in (0, 1], got {request.top_p}.", "top_p", request.top_p)


def stop_strings(stop: Stop) -> tuple[str, ...]:
    """Stop strings as a tuple. ApiError for an empty one or too many."""
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if "" in strings:
        raise errors.ApiError("stop cannot contain an empty string.")
    if len(strings) > MAX_STOP_STRINGS:
        raise errors.invalid(f"at most {MAX_STOP_STRINGS} stop strings are allowed.", "stop")
    return strings


def _check_ranges(request: OpenAIGenerate, max_tokens: int) -> None:
    check_temperature(request)
    if request.n is not None and request.n < 1:
        raise errors.ApiError(f"n must be at least 1, got {request.n}.")
    if request.min_tokens < 0:
        raise errors.ApiError(f"min_tokens must be greater than or equal to 0, got {request.min_tokens}.")
    if request.min_tokens > max_tokens:
        raise errors.ApiError(
            f"min_tokens must be less than or equal to {max_tokens=}, got {request.min_tokens}."
        )
    wanted = request.top_logprobs if isinstance(request, ChatRequest) else getattr(request, "logprobs", None)
    if wanted and wanted > MAX_LOGPROBS:
        message = f"Requested sample logprobs of {wanted}, which is greater than max allowed: {MAX_LOGPROBS}"
        raise errors.invalid(message, "logprobs", wanted)


def forwarded_token_ids(
    params: dict[str, Any] | None, messages: Iterable[Mapping[str, Any]], vocab_size: int
) -> list[int] | None:
    """The ids of kv_transfer_params, which replace rendering and tokenising; None where vLLM ignores them."""
    ids = (params or {}).get("prompt_token_ids")
    if ids is None or any(_has_media(message) for message in messages):
        return None
    name = "kv_transfer_params.prompt_token_ids"
    if not isinstance(ids, list) or not ids or any(type(i) is not int or i < 0 for i in ids):
        message = (
            "`kv_transfer_params['prompt_token_ids']` must be a non-empty list of non-negative integers."
        )
        raise errors.invalid(message, name)
    check_vocabulary(ids, vocab_size, name)
    return ids


def check_vocabulary(token_ids: list[int], vocab_size: int, param: str | None = None) -> None:
    """Refuse ids that the model has no embedding for."""
    largest = max(token_ids, default=0)
    if largest >= vocab_size or min(token_ids, default=0) < 0:
        message = f"Token id {largest} is out of vocabulary"
        raise errors.invalid(message, param) if param else errors.ApiError(message)


def _has_media(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, list) and any(
        isinstance(part, dict) and part.get("type", "text") not in ("text", "refusal") for part in content
    )
