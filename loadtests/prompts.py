"""Long chats for measuring routers: English-like, of a wanted size, seeded, so that every router gets alike.

Of the words 70 % are everyday words that every text repeats, and 30 % are made of random syllables, seldom
said twice: names, numbers and code of real prompts, which no tokenizer's memory of words helps with.
"""

from __future__ import annotations

from functools import lru_cache
from random import Random

import msgspec

from loadtests.words import WORDS

RANDOM_SHARE = 0.3
SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
PAIRS = [first + second for first in SYLLABLES for second in SYLLABLES]
# With its space a word has about so many characters.
WORD_SIZE = sum(map(len, WORDS)) / len(WORDS) * (1 - RANDOM_SHARE) + 6 * RANDOM_SHARE + 1
# Chats are of ten messages of equal size: with all but the last in common, two share 90 %.
MESSAGES = 10
ROLES = ("system", *("user", "assistant") * 4, "user")

Messages = list[dict[str, str]]


@lru_cache(maxsize=1024)  # what chats share
def text(size: int, seed: str) -> str:
    """So many characters that only the seed decides."""
    chance = Random(seed)
    count = int(1.1 * size / WORD_SIZE) + 10
    words = chance.choices(WORDS, k=count)
    made = int(RANDOM_SHARE * count)
    random = map(str.__add__, chance.choices(PAIRS, k=made), chance.choices(SYLLABLES, k=made))
    for place, word in zip(chance.sample(range(count), made), random, strict=True):
        words[place] = word
    return " ".join(words)[:size]


def chat(size: int, seed: str, shared: str | None = None) -> Messages:
    """A chat of `size` characters. Those with the same `shared` have all but the last message in common."""
    seeds = [f"{shared or seed}/{number}" for number in range(MESSAGES - 1)] + [f"{seed}/last"]
    return [
        {"role": role, "content": text(size // MESSAGES, own)} for role, own in zip(ROLES, seeds, strict=True)
    ]


def question(system: str, asked: str) -> Messages:
    """Rules, and one question."""
    return [{"role": "system", "content": system}, {"role": "user", "content": asked}]


def body(model: str, messages: Messages, max_tokens: int, stream: bool) -> bytes:
    """A chat request."""
    streamed = {"stream": True} if stream else {}
    return msgspec.json.encode(
        {"model": model, "messages": messages, "temperature": 0, "max_tokens": max_tokens, **streamed}
    )
