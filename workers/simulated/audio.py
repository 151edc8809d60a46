"""POST /v1/audio/transcriptions and translations: text that depends on nothing but the file's bytes."""

import email
import email.policy
import struct
from collections.abc import AsyncIterator
from typing import Any

import xxhash

from workers.simulated import errors
from workers.simulated.live import Generation, Sampling
from workers.simulated.requests import TranscriptionRequest
from workers.simulated.service import DONE, Identity, Service, event

# 16-bit samples at 16 kHz, what Whisper hears; vLLM reads the true length from the file.
BYTES_PER_SECOND = 32_000
# Whisper makes this many positions of a second of sound.
TOKENS_PER_SECOND = 50
# Long enough for a test to break a stream off in its middle.
MAX_TOKENS = 64


def form(content_type: str, body: bytes) -> dict[str, Any]:
    """The fields of a form by name: text, or bytes for a file. ApiError if it is none."""
    if content_type.lower().partition(";")[0].strip() != "multipart/form-data":
        raise errors.malformed([_missing("file"), _missing("model")])
    head = f"content-type: {content_type}\r\n\r\n".encode()
    message = email.message_from_bytes(head + body, policy=email.policy.HTTP)
    return {
        str(part.get_param("name", header="content-disposition")): part.get_payload(decode=True)
        if part.get_filename() is not None
        else part.get_content()
        for part in message.iter_parts()
    }


async def start(
    service: Service, request: TranscriptionRequest, task: str, header: str | None
) -> "TranscriptionAnswer":
    """Admit and begin a transcription or translation (`task`). ApiError if vLLM would refuse it."""
    service.check_model(request.model)
    service.live.check_admission(1)
    if request.response_format not in ("json", "text"):
        raise errors.invalid("Only json and text are simulated.", "response_format")
    prompt = _heard(request.file, service)
    limit = min(request.max_completion_tokens or MAX_TOKENS, service.max_model_len - len(prompt))
    identity = service.identity(task, header)
    generation = service.live.generate(identity.id, [prompt], Sampling(max_tokens=limit))
    return TranscriptionAnswer(service, request, identity, generation, task)


def _heard(file: bytes, service: Service) -> list[int]:
    """The tokens of a sound: as many as it is long, within half the context."""
    count = min(len(file) * TOKENS_PER_SECOND // BYTES_PER_SECOND + 1, service.max_model_len // 2)
    seed = xxhash.xxh3_64_intdigest(file)
    size = service.tokenizer.vocab_size
    return [xxhash.xxh3_64_intdigest(struct.pack("<I", n), seed=seed) % size for n in range(count)]


class TranscriptionAnswer:
    """A transcription under way, as a stream of chunks or as one body."""

    def __init__(
        self,
        service: Service,
        request: TranscriptionRequest,
        identity: Identity,
        generation: Generation,
        task: str,
    ) -> None:
        self.generation = generation
        self._service = service
        self._request = request
        self._identity = identity
        self._object = f"{task}.chunk"

    async def stream(self) -> AsyncIterator[bytes]:
        """The events of the stream."""
        async for delta in self.generation:
            choice: dict[str, Any] = {"delta": {"content": delta.text}}
            if delta.finish_reason is not None:
                choice |= {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
            yield event(
                {
                    "id": self._identity.id,
                    "object": self._object,
                    "created": self._identity.created,
                    "model": self._request.model,
                    "choices": [choice],
                }
            )
        yield DONE

    async def whole(self) -> dict[str, Any]:
        """The body of the answer."""
        delta = (await self.generation.whole())[0]
        seconds = -(-len(self._request.file) // BYTES_PER_SECOND)
        return {"text": delta.text, "usage": {"type": "duration", "seconds": seconds}}


def _missing(name: str) -> dict[str, Any]:
    return {"type": "missing", "loc": (name,), "msg": "Field required", "input": None}
