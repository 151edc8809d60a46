"""Block keys: numbers that name a block of KV cache by its content and by all that comes before it.

The engine's own hashes cost ten times as much to compute and cover what a router cannot know, so the index is
keyed by these, which are computed from the token ids in requests and in KV events alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from xxhash import xxh3_64_intdigest

TOKEN_BYTES = 4  # token ids travel as little-endian uint32, the form that fastokens gives and arrays keep
# Text keys stand in for block keys where there is no tokenizer: one for so many bytes of the request. English
# has four bytes a token.
TEXT_BLOCK_BYTES = 256
TEXT_BLOCK_TOKENS = 64
# Keys have 60 bits: Python keeps those in 32 bytes, longer ones in 48.
SPARE_BITS = 4

Keys = list[int]


def root_key(adapter: str | None = None, salt: str | None = None) -> int:
    """What a chain of keys starts from: prompts with another adapter or cache salt share no block."""
    if not (adapter or salt):
        return 0
    return xxh3_64_intdigest(f"{len(adapter or '')}:{adapter or ''}{salt or ''}".encode())


def chain(data: bytes | memoryview, width: int, parent: int) -> Keys:
    """One key for each full `width` bytes of `data`, each over its bytes and the key before it."""
    return [
        parent := xxh3_64_intdigest(data[start : start + width], parent) >> SPARE_BITS
        for start in range(0, len(data) - width + 1, width)
    ]


def block_keys(token_ids: bytes, block_size: int, parent: int = 0) -> Keys:
    """The keys of all full blocks of `token_ids` (little-endian uint32); `parent`: the root, or a key."""
    return chain(token_ids, block_size * TOKEN_BYTES, parent)


@dataclass(slots=True)
class Prompt:
    """What a request asks to be prefilled, as far as placement knows it.

    `num_tokens`: exact where `token_ids` are there, else an estimate. `token_ids`: little-endian uint32.
    `text`: what text keys are made of where there are no ids. `root`: see `root_key`.
    """

    num_tokens: int
    token_ids: bytes | None = None
    text: bytes = b""
    root: int = 0
    _keys: dict[int, Keys] = field(default_factory=dict)

    @classmethod
    def of_keys(cls, num_tokens: int, keys: Keys, block_size: int) -> Prompt:
        """A prompt known by its keys alone, as the simulator has them."""
        return cls(num_tokens, _keys={block_size: keys})

    def keys(self, block_size: int) -> Keys:
        """Keys of the blocks that a cache could save: the last token is always computed. 0: text keys."""
        known = self._keys.get(block_size)
        if known is None:
            known = self._keys[block_size] = self._compute(block_size)
        return known

    def _compute(self, block_size: int) -> Keys:
        if not block_size:
            return chain(self.text, TEXT_BLOCK_BYTES, self.root)
        if self.token_ids is None:
            return []
        return block_keys(self.token_ids[:-TOKEN_BYTES], block_size, self.root)
