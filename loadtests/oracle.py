"""What simulated engines will say: the same for the same prompt, whoever asks and on whatever replica.

So a reply that came through a router proves that the engine got the very tokens of the client's prompt.
"""

from __future__ import annotations

from pathlib import Path

from loadtests.prompts import Messages
from workers.chat_template import ChatTemplate
from workers.simulated.language import Language, TokenSequence
from workers.simulated.text import TextStream
from workers.tokenizer import Tokenizer

# Blocks have no part in what is said.
BLOCK_SIZE = 16


class Oracle:
    """The language of simulated engines of one model directory."""

    def __init__(self, model: Path) -> None:
        self._tokenizer = Tokenizer(model)
        self._template = ChatTemplate(model)
        self._language = Language(self._tokenizer)

    def tokens(self, messages: Messages) -> list[int]:
        """The prompt of a chat."""
        return self._tokenizer.encode(self._template.render(messages), add_special_tokens=False)

    def says(self, messages: Messages, max_tokens: int) -> str:
        """The text of the reply."""
        prompt = self.tokens(messages)
        output = TokenSequence(self._language, prompt, block_size=BLOCK_SIZE)
        text = TextStream(self._tokenizer.stream_after(prompt))
        for _ in range(max_tokens):
            ended = output.extend()
            text.push(output.last_token, ends=ended)
            if ended:
                break
        return text.text
