"""Where a stream that broke off goes on: behind which of its tokens, and what of the text comes twice or not.

An engine is behind with text: it holds back what may become a stop string, and the bytes of a character that
is not whole. So the client may lack text of tokens that were generated, and the next engine, which sees those
as its prompt, would never say it; nor would it find a stop string that began there. The seam is therefore
put where none of that can happen, if need be some tokens before the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# What a decoder makes of the first bytes of a character.
BROKEN = "\ufffd"
# So many tokens are looked back, and one for each character that may be held back. Four bytes are one
# character; what is further behind is not text that an engine is about to send.
LOOK_BACK, MOST_BACK = 16, 64


@dataclass(frozen=True, slots=True)
class Seam:
    """The stream goes on behind its first `kept` tokens.

    `ahead`: text of these that the client lacks. `again`: text behind them that it has, and that the next
    engine is going to say again.
    """

    kept: int
    ahead: str = ""
    again: str = ""


@dataclass(frozen=True, slots=True)
class Stops:
    """The stop strings of a request; `shown`: they are part of the output, so nothing is held back."""

    strings: tuple[str, ...] = ()
    shown: bool = False

    @property
    def longest(self) -> int:
        """Characters."""
        return max(map(len, self.strings), default=0)

    @property
    def held_back(self) -> int:
        """How many characters an engine is behind at most."""
        return 0 if self.shown else max(0, self.longest - 1)

    def begin_in(self, text: str, since: int) -> bool:
        """Whether a stop string stands in the text, or may be about to, from that character on."""
        return any(
            text.find(stop, since) >= 0 or any(text.endswith(stop[:n], since) for n in range(1, len(stop)))
            for stop in self.strings
        )


def seam(
    ids: Sequence[int], sent: str, decode: Callable[[Sequence[int]], str], stops: Stops, most: int
) -> Seam:
    """The last place of a stream where it can go on as if nothing had happened, in its first `most` tokens.

    `ids`: all that were generated. `sent`: the text that the client has. Where the text does not follow from
    the tokens (a parser took some of it), that is the very beginning.
    """
    since = max(0, len(sent) - stops.longest + 1) if stops.shown and stops.strings else len(sent)
    last = min(len(ids), most)
    for kept in range(last, max(0, last - min(MOST_BACK, LOOK_BACK + stops.longest)), -1):
        text = decode(ids[:kept])
        if text.endswith(BROKEN):
            continue
        if not (text.startswith(sent) or sent.startswith(text)):
            break
        if stops.begin_in(text, since):
            continue
        if text.startswith(sent) and len(text) - len(sent) <= stops.held_back:
            return Seam(kept, ahead=text[len(sent) :])
        if sent.startswith(text):
            return Seam(kept, again=sent[len(text) :])
    return Seam(0, again=sent)
