"""What the simulated model says: each next token is a function of all tokens before it.

So the same prompt gives the same output on every replica and in every batch, and a prompt followed by the
first k output tokens gives the rest of that output: an exact continuation can be proven.
"""

from array import array
from collections.abc import Sequence

import xxhash

from workers.simulated.kv_cache import ROOT_KEY, chain_key
from workers.tokenizer import Tokenizer

# One token in this many ends the text: outputs without a limit are 500 tokens long on average.
EOS_ONE_IN = 500

# Characters that most vocabularies split into several byte tokens, so that streams cross them.
SPLIT_CHARACTERS = "é日本語牛🐄🐑"

# One token in this many begins such a character.
SPLIT_ONE_IN = 24


class Language:
    """The tokens a model may say, and the choice among them."""

    def __init__(self, tokenizer: Tokenizer, seed: int = 0) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_id
        self.seed = seed
        special = tokenizer.special_ids()
        ids = [i for i in range(tokenizer.vocab_size) if i not in special]
        texts = tokenizer.decode_each(ids)
        self._words = [i for i, text in zip(ids, texts, strict=True) if _is_text(text)]
        if not self._words:
            raise ValueError("the tokenizer has no token that is text by itself")
        self._split = [ids for c in SPLIT_CHARACTERS if len(ids := self._split_ids(c)) > 1]
        self._rest = {tuple(ids[:n]): ids[n] for ids in self._split for n in range(1, len(ids))}
        self._longest = max((len(head) for head in self._rest), default=0)

    def _split_ids(self, character: str) -> list[int]:
        """The ids of a character none of which is text by itself, else nothing."""
        ids = self.tokenizer.encode(character, add_special_tokens=False)
        return ids if all("\ufffd" in text for text in self.tokenizer.decode_each(ids)) else []

    def next_token(self, digest: int, tail: Sequence[int], *, may_end: bool) -> int:
        """The token after a text with this hash and these last tokens."""
        for length in range(self._longest, 0, -1):
            if (token := self._rest.get(tuple(tail[-length:]))) is not None:
                return token
        if may_end and self.eos_token_id is not None and (digest >> 40) % EOS_ONE_IN == 0:
            return self.eos_token_id
        if self._split and (digest >> 20) % SPLIT_ONE_IN == 0:
            return self._split[digest % len(self._split)][0]
        return self._words[digest % len(self._words)]


class TokenSequence:
    """The token ids of one sequence, prompt and output: the `Content` that the live engine runs.

    A script is said word for word, then the sequence ends: that is how a grammar is obeyed here.
    """

    def __init__(
        self,
        language: Language,
        prompt: Sequence[int],
        *,
        block_size: int,
        choice: int = 0,
        cache_salt: str | None = None,
        ignore_eos: bool = False,
        min_tokens: int = 0,
        stop_token_ids: frozenset[int] = frozenset(),
        script: Sequence[int] | None = None,
    ) -> None:
        self.num_prompt_tokens = len(prompt)
        self.token_ids = array("I", prompt)
        self.stop_token: int | None = None
        """The stop token id that ended the sequence, if one of the request's own did."""
        self._language = language
        self._block_size = block_size
        self._salt = cache_salt
        self._ignore_eos = ignore_eos
        self._min_tokens = min_tokens
        self._stop_token_ids = stop_token_ids
        self._script = None if script is None else list(script)
        # Choices after the first of one prompt differ from it; the first is what a continuation repeats.
        self._hash = xxhash.xxh3_64(self.token_ids.tobytes(), seed=language.seed + choice)
        self._keys: list[bytes] = []

    @property
    def output(self) -> list[int]:
        """The tokens said so far."""
        return self.token_ids[self.num_prompt_tokens :].tolist()

    @property
    def last_token(self) -> int:
        """The token said last."""
        return self.token_ids[-1]

    def key(self, block: int) -> bytes:
        """vLLM's hash of full block number `block`."""
        size = self._block_size
        for number in range(len(self._keys), block + 1):
            parent = self._keys[-1] if number else ROOT_KEY
            extra = (("cache_salt", self._salt),) if self._salt and not number else None
            tokens = self.token_ids[number * size : (number + 1) * size].tolist()
            self._keys.append(chain_key(parent, tokens, extra))
        return self._keys[block]

    def block_tokens(self, first: int, count: int) -> list[int]:
        """Token ids of `count` blocks from number `first`."""
        return self.token_ids[first * self._block_size : (first + count) * self._block_size].tolist()

    def extra_keys(self, first: int, count: int) -> list[list[str] | None] | None:
        """What the hashes of these blocks cover beside tokens, as vLLM's events tell it."""
        if not self._salt:
            return None
        return [[self._salt] if number == 0 else None for number in range(first, first + count)]

    def extend(self) -> bool:
        """Say one more token; True if it ends the sequence."""
        said = len(self.token_ids) - self.num_prompt_tokens
        may_end = said >= self._min_tokens
        token = self._next(said, may_end and not self._ignore_eos)
        self.token_ids.append(token)
        self._hash.update(token.to_bytes(4, "little"))
        if may_end and token in self._stop_token_ids:
            self.stop_token = token
            return True
        return may_end and token == self._language.eos_token_id and not self._ignore_eos

    def _next(self, said: int, may_end: bool) -> int:
        if self._script is not None and said < len(self._script):
            return self._script[said]
        if self._script is not None and self._language.eos_token_id is not None:
            return self._language.eos_token_id
        tail = self.token_ids[-4:]
        return self._language.next_token(self._hash.intdigest(), tail, may_end=may_end)


def _is_text(token: str) -> bool:
    """Whether a token can be said by itself, to a person at a terminal too."""
    return bool(token) and "\ufffd" not in token and token.replace("\n", " ").isprintable()
