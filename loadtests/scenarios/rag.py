"""Questions about documents."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from random import Random

from loadtests.scenarios.session import Ask, Load, Scenario, Session, say, setting
from loadtests.words import words


@dataclass(frozen=True)
class Rag(Scenario):
    """Questions about documents (retrieval-augmented generation): a few chunks of one document stand before
    each short question. Some documents are asked about far more often than others, as Zipf's law has it.
    """

    name = "rag"
    load = Load(rate=4.0)

    documents: int = setting(200, "Documents that there are", 1)
    zipf: float = setting(1.0, "How uneven: the nth is asked about 1 / n ** ZIPF as often as the first")
    chunks: int = setting(4, "Chunks of a document before its question", 1)
    chunk_tokens: int = setting(300, "Words of a chunk", 1)
    prompt_tokens: int = setting(24, "Words of a question", 1)
    output_tokens: int = setting(64, "Longest answer, in tokens", 1)

    def session(self, seed: str) -> Session:
        """One question."""
        document = zipf(Random(seed).random(), self.documents, self.zipf)
        found = "\n\n".join(words(self.chunk_tokens, f"document {document}/{n}") for n in range(self.chunks))
        question = words(self.prompt_tokens, seed)
        yield Ask((say("system", found), say("user", question)), self.output_tokens)


def zipf(chance: float, count: int, exponent: float) -> int:
    """Which of `count` things, the most popular first; `chance` is from 0 to 1."""
    sums = _sums(count, exponent)
    return bisect(sums, chance * sums[-1], hi=count - 1)


@lru_cache(maxsize=16)
def _sums(count: int, exponent: float) -> Sequence[float]:
    return list(accumulate((n + 1) ** -exponent for n in range(count)))
