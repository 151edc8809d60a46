"""Live traffic for `herd record`: when requests came, how long they were, what they have in common. No text.

Kept only while somebody asks. What prompts share is told by keys over their blocks, which are the same in
every router process.
"""

from __future__ import annotations

import time
from collections import deque

import msgspec
from xxhash import xxh3_64_intdigest

from router.core.blocks import TOKEN_BYTES, Keys, Prompt, chain
from router.http.sse import Usage

BLOCK_TOKENS = 512  # as in the traces that Mooncake published
BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES
# A recorder asks every second. One that has not asked for so long is gone.
LEASE_S = 10.0
# As many as a process answers within the lease.
MOST = 50_000


class Arrival(msgspec.Struct, frozen=True):
    """One answered request: when it came (Unix time), its tokens in and out, a key for each block of its
    prompt (None where that was not known), and one for its session."""

    at: float
    input_length: int
    output_length: int
    keys: list[int | None]
    session: int | None = None


class Batch(msgspec.Struct, frozen=True):
    """Those that were answered after the first `after` of a process; `next`: what to ask for next time."""

    next: int
    arrivals: list[Arrival]


class Arrivals:
    """Those of one router process."""

    def __init__(self) -> None:
        self._until = 0.0
        self._count = 0
        self._kept: deque[Arrival] = deque(maxlen=MOST)

    def wanted(self, now: float) -> bool:
        """Somebody records: prompts are to be read, whatever the policy."""
        return now < self._until

    def note(self, came_at: float, usage: Usage, prompt: Prompt | None, session: bytes | None) -> None:
        """A request was answered that had come at this time of the loop; one without output is left out."""
        prompt_tokens, output_tokens = usage.prompt_tokens, usage.completion_tokens
        if not prompt_tokens or not output_tokens:
            return
        at = time.time() - time.monotonic() + came_at
        keys = block_keys(prompt, prompt_tokens)
        named = xxh3_64_intdigest(session) if session else None
        self._kept.append(Arrival(at, prompt_tokens, output_tokens, keys, named))
        self._count += 1

    def after(self, number: int | None, now: float) -> Batch:
        """What came after the first `number`; nothing yet if that is None. Asking keeps it going."""
        if not self.wanted(now):
            self._kept.clear()
        self._until = now + LEASE_S
        if number is None:
            return Batch(self._count, [])
        fresh = self._count - number if number <= self._count else self._count  # it asked another process
        kept = list(self._kept)
        return Batch(self._count, kept[len(kept) - min(fresh, len(kept)) :])


def block_keys(prompt: Prompt | None, input_length: int) -> list[int | None]:
    """One key for each begun block of so many tokens. Where only text is known, four bytes of it are a token:
    a token id has as many."""
    keys = _known(prompt) if prompt is not None else []
    blocks = -(-input_length // BLOCK_TOKENS)
    return [*keys, *[None] * blocks][:blocks]


def _known(prompt: Prompt) -> Keys:
    data = prompt.text if prompt.token_ids is None else prompt.token_ids
    keys = chain(data, BLOCK_BYTES, prompt.root)
    rest = data[len(keys) * BLOCK_BYTES :]
    return [*keys, xxh3_64_intdigest(rest, keys[-1] if keys else prompt.root)] if rest else keys
