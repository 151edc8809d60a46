"""Work that nobody waits for."""

from __future__ import annotations

from dataclasses import dataclass

from loadtests.scenarios.session import Ask, Load, Scenario, Session, Slo, say, setting
from loadtests.words import words


@dataclass(frozen=True)
class Batch(Scenario):
    """Work that nobody waits for: one template filled in many times, whole answers instead of streams, behind
    everybody else. What counts is how much gets done.
    """

    name = "batch"
    load = Load(users=32)
    slo = Slo(ttft_p99_ms=None, tpot_p99_ms=None)

    template_tokens: int = setting(300, "Words of the template", 1)
    prompt_tokens: int = setting(200, "Words that it is filled with", 1)
    output_tokens: int = setting(128, "Longest answer, in tokens", 1)
    priority: int = setting(10, "Its class where requests wait; 0 is everybody else's")

    def session(self, seed: str) -> Session:
        """One piece of work."""
        template = say("system", words(self.template_tokens, "template"))
        piece = say("user", words(self.prompt_tokens, seed))
        yield Ask((template, piece), self.output_tokens, stream=False, priority=self.priority)
