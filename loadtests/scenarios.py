"""What simulated users say: seeded, so that two runs, and two routers, get the same requests."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

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


@dataclass(frozen=True, slots=True)
class Shape:
    """How long a chat is. Lengths in words, which are about tokens; `system` is shared by all chats."""

    turns: int = 6
    system: int = 400
    prompt: int = 120
    output: int = 80

    def __post_init__(self) -> None:
        for name, least in (("turns", 1), ("system", 0), ("prompt", 1), ("output", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")


@dataclass(slots=True)
class Chat:
    """One conversation: each turn sends all that was said before, as chat clients do.

    `seed` tells this chat from all others; what the users of one run share is the system prompt alone.
    """

    shape: Shape
    seed: str
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.shape.system:
            self._say("system", words(self.shape.system, "system"))

    @property
    def turn(self) -> int:
        """How many questions have been answered."""
        return sum(message["role"] == "assistant" for message in self.messages)

    @property
    def over(self) -> bool:
        return self.turn >= self.shape.turns

    def ask(self) -> list[dict[str, str]]:
        """The next question, with everything before it."""
        self._say("user", words(self.shape.prompt, f"{self.seed}/{self.turn}"))
        return self.messages

    def answered(self, text: str) -> None:
        """What came back becomes a part of every later prompt."""
        self._say("assistant", text)

    def _say(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})


def words(count: int, seed: str) -> str:
    """`count` words that only the seed decides."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))
