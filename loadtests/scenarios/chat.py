"""People who chat."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from loadtests.scenarios.session import Ask, Load, Scenario, Session, around, say, setting
from loadtests.words import words


@dataclass(frozen=True)
class Chat(Scenario):
    """People who ask, read, think and ask on. Each turn sends all that was said before, as chat clients do;
    what all chats share is the system prompt.
    """

    name = "chat"
    load = Load(users=20)

    turns: int = setting(6, "Questions per chat", 1)
    system_tokens: int = setting(400, "Words of the system prompt that all share")
    prompt_tokens: int = setting(120, "Words of each question", 1)
    output_tokens: int = setting(80, "Longest answer, in tokens", 1)
    think_time: float = setting(1.0, "Mean seconds between an answer and the next question")

    def session(self, seed: str) -> Session:
        """One conversation."""
        chance = Random(seed)
        messages = [say("system", words(self.system_tokens, "system"))] if self.system_tokens else []
        for turn in range(self.turns):
            messages.append(say("user", words(self.prompt_tokens, f"{seed}/{turn}")))
            think = around(self.think_time, chance.random())
            said = yield Ask(tuple(messages), self.output_tokens, after=think)
            messages.append(say("assistant", said or ""))
