"""Text to token ids and back, as vLLM has it from the same model directory.

vLLM takes the tokenizer from transformers: that is `tokenizer.json`, and what `tokenizer_config.json` changes
of it (transformers 5, tokenization_utils_tokenizers.py). Some of its classes build a tokenizer of their own,
which may differ: whoever relies on the ids compares them with an engine's.
"""

import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken
from tokenizers.decoders import DecodeStream

# Texts on which fastokens must agree with tokenizers before its ids are trusted.
PROBES = (
    "The herd moves as one.",
    "  leading, trailing and   inner spaces \n\n\ttabs\r\n",
    "def f(x: int) -> str:\n    return f'{x:>08.3f}'  # 100% of 1_000_000",
    "I'll say: don't, won't, they'VE",
    "Grüße, naïve café, 日本語のテキスト, русский текст, العربية, 🐄🐑👩‍👩‍👧 e\u0301 \u200b\ufeff",
    "<|im_start|>user\nhello<|im_end|>\n<s></s><tool_call>{}</tool_call>",
    "",
)
# Of a model's added tokens so many are tried too; some models reserve hundreds.
PROBED_TOKENS = 64
# The first long text takes a tokenizer tens of milliseconds longer than the next ones.
LONG_PROBE = 128 * 1024

# What stands between added tokens is kept with its ids: some 1,000 conversations of 32 KB.
SEGMENT_CACHE_BYTES = 96 * 2**20

# Those that every tokenizer may have, in the order in which transformers adds what is missing.
USUAL_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))

# Enough tokens before the output for any decoder to know whether a space or half a character precedes it.
DECODE_CONTEXT = 16

Encode = Callable[[str, bool], bytes]


class Encoder:
    """Text to token ids. `fast`: by fastokens, in 0.2 ms for 32 KB; else by tokenizers, in 15 ms.

    Both release the GIL. A text that is no Unicode (lone surrogates) raises ValueError or TypeError.
    """

    def __init__(self, reference: tokenizers.Tokenizer) -> None:
        self.vocab_size = reference.get_vocab_size(with_added_tokens=True)
        encode = _fastokens(reference)
        self.fast = encode is not None
        self.encode = encode or _tokenizers(reference)
        """Ids as little-endian uint32, end to end; special tokens written in the text become ids."""


class Tokenizer:
    """The tokenizer of a model directory, both ways."""

    def __init__(self, directory: Path) -> None:
        config = read_config(directory)
        self._tokenizer = load(directory, config)
        self._encode = Encoder(self._tokenizer).encode
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.eos_token_id = self._token_id(special_tokens(directory, config).get("eos_token"))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; special tokens written in it become ids. Releases the GIL."""
        return ids_of(self._encode(text, add_special_tokens))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def decode_each(self, token_ids: Sequence[int]) -> list[str]:
        """The text of every id by itself."""
        return self._tokenizer.decode_batch([[i] for i in token_ids], skip_special_tokens=False)

    def pieces(self, token_ids: Sequence[int]) -> list[str | None]:
        """The vocabulary's own spelling of each id."""
        return [self._tokenizer.id_to_token(i) for i in token_ids]

    def special_ids(self) -> set[int]:
        """Ids of all added tokens, special or not."""
        return set(self._tokenizer.get_added_tokens_decoder())

    def stream_after(
        self, prompt: Sequence[int], *, skip_special_tokens: bool = True
    ) -> Callable[[int], str]:
        """A function from the next token id to the text it completes, empty inside a character."""
        context = list(prompt[-DECODE_CONTEXT:])
        stream = DecodeStream(ids=context, skip_special_tokens=skip_special_tokens)
        return lambda token_id: stream.step(self._tokenizer, token_id) or ""

    def _token_id(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)


def ids_of(encoded: bytes) -> list[int]:
    """Token ids as numbers."""
    return memoryview(encoded).cast("I").tolist()


def read_config(directory: Path) -> dict[str, Any]:
    """The model directory's tokenizer_config.json; empty if it has none."""
    return read_json(directory / "tokenizer_config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file; empty if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that have a name, by it: `bos_token`, `eos_token` and the like, the usual ones first."""
    named = dict.fromkeys(USUAL_TOKENS) | {name: config[name] for name in config if name.endswith("_token")}
    if isinstance(extra := config.get("extra_special_tokens"), Mapping):
        named |= extra
    if "added_tokens_decoder" not in config:  # then an older file counts too
        named |= read_json(directory / "special_tokens_map.json")
    contents = {name: _content(token) for name, token in named.items()}
    return {name: content for name, content in contents.items() if content is not None}


def load(directory: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of a model directory as transformers sets it up. ValueError if it has none that works.

    Holds the GIL: 0.1 s for a vocabulary of 50,000.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"model directory {directory} holds no tokenizer.json")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more exact
        raise ValueError(f"{path} is no tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _add_tokens(tokenizer, directory, config)
    return tokenizer


def _add_tokens(tokenizer: tokenizers.Tokenizer, directory: Path, config: Mapping[str, Any]) -> None:
    """What tokenizer_config.json adds to the vocabulary, or has with other flags."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    listed = {
        int(index): AddedToken(token["content"], **{flag: token[flag] for flag in flags if flag in token})
        for index, token in config.get("added_tokens_decoder", {}).items()
    }
    known = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens([token for _, token in sorted(listed.items()) if repr(token) not in known])
    there = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    nameless = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    contents = [_content(token) for token in nameless] if isinstance(nameless, list) else []
    special = [*special_tokens(directory, config).values(), *filter(None, contents)]
    tokenizer.add_special_tokens([token for token in special if token not in there])


def _tokenizers(reference: tokenizers.Tokenizer) -> Encode:
    def encode(text: str, add_special_tokens: bool) -> bytes:
        # `encode` of one text would hold the GIL.
        (encoding,) = reference.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return array("I", encoding.ids).tobytes()

    return encode


def _fastokens(reference: tokenizers.Tokenizer) -> Encode | None:
    """fastokens, if it gives the ids of `tokenizers` on every probe, from its cache too."""
    try:
        import fastokens  # type: ignore[import-untyped]

        fast = fastokens.Tokenizer.from_json_str(reference.to_str())
    except (ImportError, ValueError, NotImplementedError, RuntimeError):
        return None
    fast.enable_segment_cache(SEGMENT_CACHE_BYTES)

    def encode(text: str, add_special_tokens: bool) -> bytes:
        flat: bytes = fast.encode_batch_flat([text], add_special_tokens)[0]
        return flat

    expected = _tokenizers(reference)
    probes = [(text, special) for text in _probes(reference) for special in (False, True)]
    wanted = [expected(*probe) for probe in probes]
    for _ in ("cold", "cached"):
        if [encode(*probe) for probe in probes] != wanted:
            return None
    return encode


def _probes(reference: tokenizers.Tokenizer) -> list[str]:
    """Texts of every kind: alone, around each of the model's added tokens, and all together, long."""
    added = [token.content for token in reference.get_added_tokens_decoder().values()][:PROBED_TOKENS]
    mixed = "".join(f"a{token}b {token} c\n{token}\n{PROBES[i % 5]}" for i, token in enumerate(added))
    turns = "".join(f"{PROBES[i % 5]}{added[i % len(added)] if added else ''} " for i in range(64))
    once = "".join(PROBES) + turns
    return [*PROBES, mixed, turns, turns + turns, once * (LONG_PROBE // len(once.encode()))]


def _content(token: object) -> str | None:
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None
