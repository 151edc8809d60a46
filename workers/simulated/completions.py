"""POST /v1/completions."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from workers.simulated import errors
from workers.simulated.chat import token_logprob
from workers.simulated.live import Delta, Generation
from workers.simulated.requests import CompletionRequest, check_vocabulary, openai_sampling
from workers.simulated.service import DONE, Identity, Service, event, usage


async def start(service: Service, request: CompletionRequest, header: str | None) -> "CompletionAnswer":
    """Admit and begin a completion. ApiError if vLLM would refuse it, or if it asks for echo."""
    if request.echo:
        raise errors.invalid("`echo` is not supported by the simulated engine.", "echo")
    service.check_model(request.model)
    service.live.check_admission(request.n or 1)
    prompts = await _prompts(service, request)
    # All prompts of a request get one limit here, the longest one's; vLLM gives each its own.
    sampling = openai_sampling(request, max(len(prompt) for prompt in prompts), service.max_model_len)
    identity = service.identity("cmpl", header, request.request_id)
    generation = service.live.generate(identity.id, prompts, sampling)
    return CompletionAnswer(service, request, identity, generation)


async def _prompts(service: Service, request: CompletionRequest) -> list[list[int]]:
    prompt = request.prompt
    if prompt is None or prompt == "":
        raise errors.invalid("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    if not prompt:
        raise errors.ApiError("You must pass at least one prompt")
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    prompts: Sequence[Any] = [prompt] if single else prompt
    encoded = [await _encoded(service, p, special=request.add_special_tokens) for p in prompts]
    if not all(encoded):
        raise errors.ApiError("The decoder prompt cannot be empty")
    return encoded


async def _encoded(service: Service, prompt: str | list[int], *, special: bool) -> list[int]:
    if isinstance(prompt, str):
        return await service.encode(prompt, add_special_tokens=special)
    check_vocabulary(prompt, service.tokenizer.vocab_size)
    service.check_length(prompt)
    return prompt


class CompletionAnswer:
    """A completion under way, as a stream of chunks or as one body."""

    def __init__(
        self, service: Service, request: CompletionRequest, identity: Identity, generation: Generation
    ) -> None:
        self.generation = generation
        self._service = service
        self._request = request
        self._identity = identity
        self._choices_per_prompt = request.n or 1

    async def stream(self) -> AsyncIterator[bytes]:
        """The events of the stream."""
        said = [0] * (len(self.generation.prompts) * self._choices_per_prompt)
        async for delta in self.generation:
            if not delta.text and not delta.token_ids and not said[delta.index]:
                continue  # aborted before its first token: vLLM sends nothing
            first = not said[delta.index]
            said[delta.index] += len(delta.token_ids)
            yield self._chunk(delta, said[delta.index], first=first)
        if self._request.include_usage:
            yield self._usage_chunk(sum(said))
        yield DONE

    def _head(self) -> dict[str, Any]:
        identity = self._identity
        return {
            "id": identity.id,
            "object": "text_completion",
            "created": identity.created,
            "model": identity.model,
        }

    def _prompt_of(self, delta: Delta) -> list[int]:
        return self.generation.prompts[delta.index // self._choices_per_prompt]

    def _chunk(self, delta: Delta, said: int, *, first: bool) -> bytes:
        request, prompt = self._request, self._prompt_of(delta)
        choice = {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta.token_ids),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            "prompt_token_ids": prompt if request.return_token_ids and first else None,
            "token_ids": delta.token_ids if request.return_token_ids else None,
        }
        chunk = self._head() | {"choices": [choice]}
        if request.continuous_usage:
            chunk["usage"] = usage(len(prompt), said)
        if delta.finish_reason is not None and not request.include_usage:
            chunk["system_fingerprint"] = self._service.fingerprint
        return event(chunk)

    def _usage_chunk(self, completion: int) -> bytes:
        details = {}
        if self._service.prompt_tokens_details:
            details["prompt_tokens_details"] = {"cached_tokens": self.generation.cached_tokens}
        total = usage(self.generation.num_prompt_tokens, completion, **details)
        chunk = self._head() | {"choices": [], "usage": total}
        return event(chunk | {"system_fingerprint": self._service.fingerprint})

    async def whole(self) -> dict[str, Any]:
        """The body of the answer."""
        deltas = await self.generation.whole()
        details = None
        if self._service.prompt_tokens_details:
            cached = self.generation.cached_tokens
            details = {"cached_tokens": cached, "created_cache_tokens": None, "multimodal_tokens": None}
        completion = sum(len(delta.token_ids) for delta in deltas)
        prompt = self.generation.num_prompt_tokens
        return self._head() | {
            "choices": [self._choice(delta) for delta in deltas],
            "service_tier": None,
            "system_fingerprint": self._service.fingerprint,
            "usage": usage(prompt, completion, prompt_tokens_details=details, completion_tokens_details=None),
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def _choice(self, delta: Delta) -> dict[str, Any]:
        ids = self._request.return_token_ids
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta.token_ids),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            "token_ids": delta.token_ids if ids else None,
            "prompt_logprobs": None,
            "prompt_token_ids": self._prompt_of(delta) if ids else None,
            "routed_experts": None,
        }

    def _logprobs(self, token_ids: Sequence[int]) -> dict[str, Any] | None:
        if self._request.logprobs is None:
            return None
        decode = self._service.tokenizer.decode
        tokens = [decode([token], skip_special_tokens=False) for token in token_ids]
        values = [token_logprob(token) for token in token_ids]
        offsets = [sum(len(token) for token in tokens[:n]) for n in range(len(tokens))]
        top = [{token: value} for token, value in zip(tokens, values, strict=True)]
        return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": top}
