"""The text of one output as it grows: whole characters only, and nothing that may become a stop string."""

from collections.abc import Callable, Sequence


class TextStream:
    """Turns token ids into text that can be sent, as vLLM's incremental detokenizer does.

    While stop strings are set and to be left out, the last len(longest) - 1 characters are held back, so
    that a match can always still be cut off.
    """

    def __init__(
        self,
        decode: Callable[[int], str],
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.text = ""
        self._decode = decode
        self._stop = stop
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._held_back = 0 if include_stop else max((len(s) for s in stop), default=1) - 1
        self._tokens = 0
        self._sent = 0

    def push(self, token_id: int, *, ends: bool = False) -> str | None:
        """Add a token; the stop string it completes, if any. A token that ends the text is not part of it."""
        self._tokens += 1
        if ends and not self._include_stop:
            return None
        new = self._decode(token_id)
        self.text += new
        if not self._stop or self._tokens <= self._min_tokens:
            return None
        return self._cut_at_stop(len(new))

    def take(self, *, finished: bool) -> str:
        """The text that may be sent and was not yet."""
        end = len(self.text) if finished else len(self.text) - self._held_back
        if end <= self._sent:
            return ""
        start, self._sent = self._sent, end
        return self.text[start:end]

    def _cut_at_stop(self, new: int) -> str | None:
        for stop in self._stop:
            # Only a match that the new characters complete: older ones were looked for before.
            found = self.text.find(stop, max(0, len(self.text) - new - len(stop) + 1))
            if found >= 0:
                self.text = self.text[: found + len(stop) if self._include_stop else found]
                return stop
        return None
