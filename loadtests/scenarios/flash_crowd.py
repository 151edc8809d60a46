"""A crowd that comes at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from random import Random

from loadtests.arrivals import Piece
from loadtests.scenarios.session import Ask, Load, Scenario, Session, say, setting
from loadtests.words import words


@dataclass(frozen=True)
class FlashCrowd(Scenario):
    """A crowd that comes at once: in the middle third of the run there is three times the load, and then it
    is as before. Most ask about the same thing, so most prompts begin alike.
    """

    name = "flash_crowd"
    load = Load(rate=6.0, duration=180)
    closable = False

    surge: float = setting(3.0, "So many times the rate in the middle third", 1)
    popular: float = setting(0.8, "Share of requests about what all talk of")
    shared_tokens: int = setting(800, "Words about it that stand before the question", 1)
    prompt_tokens: int = setting(60, "Words of a question", 1)
    output_tokens: int = setting(80, "Longest answer, in tokens", 1)

    def session(self, seed: str) -> Session:
        """One question."""
        about = "the news" if Random(seed).random() < self.popular else seed
        known = say("system", words(self.shared_tokens, f"about {about}"))
        yield Ask((known, say("user", words(self.prompt_tokens, seed))), self.output_tokens)

    def rates(self, rate: float, duration: float) -> Sequence[Piece]:
        """Base, crowd, base."""
        return [(duration / 3, rate), (duration / 3, rate * self.surge), (inf, rate)]
