"""Words that a seed decides, so that two runs, and two routers, get the same requests."""

from __future__ import annotations

import random

# Short everyday words, one token each in most vocabularies.
WORDS = (
    "the", "a", "of", "to", "and", "in", "that", "it", "is", "was", "for", "on", "with", "as", "at", "by",
    "from", "this", "have", "not", "are", "but", "they", "all", "one", "can", "her", "out", "up", "about",
    "time", "some", "could", "these", "two", "may", "then", "do", "first", "any", "my", "now", "such",
    "like", "our", "over", "man", "me", "even", "most", "made", "after", "also", "did", "many", "before",
    "must", "through", "back", "years", "where", "much", "your", "way", "well", "down", "should", "because",
    "each", "just", "those", "people", "how", "too", "little", "state", "good", "very", "make", "world",
    "still", "own", "see", "men", "work", "long", "here", "get", "both", "between", "life", "being",
    "under", "never", "day", "same", "another", "know", "while", "last", "might", "us", "great", "old",
    "year", "off", "come", "since", "against", "go", "came", "right", "used", "take", "three",
)  # fmt: skip


def words(count: int, seed: str) -> str:
    """`count` words that only the seed decides."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))
