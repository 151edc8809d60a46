"""What a prompt costs the router: milliseconds of CPU to read a chat exactly, to key it, to send its tokens.

Nothing else of the router runs. `read` is all that is done to know the tokens: decoding messages, rendering
the template, encoding its text. Distinct chats share nothing but words; those that share 90 % go on from one
that was read before. Run through `scripts/bench tokens`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import process_time

import click
import msgspec

from loadtests.report import table
from router.openai_api import FAMILIES, Call, parse
from router.prompter import Prompter
from router.prompts import read
from router.tokenizer_config import TokenizerConfig
from workers import demo_model

KIB = 1024
SIZES = (1, 32, 128)
TURNS = (512, 2048)  # bytes of a message
CHATS = 24
# Of the words so many are new, as names and numbers are; no cache of a tokenizer helps with those.
NEW_WORDS = 0.05
BLOCK = 16
HEAD = ["chat", "sharing", "messages", "tokens", "decode", "render", "encode", "read", "keys", "JSON"]

Messages = list[dict[str, str]]


@dataclass(slots=True)
class Author:
    """Writes chats, none like another."""

    words: Sequence[str]
    chance: Random

    def chat(self, size: int, turn: int) -> Messages:
        """Messages of `turn` bytes, `size` bytes in all."""
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": self.text(turn)} for i in range(max(1, size // turn))]

    def text(self, size: int) -> str:
        """So many bytes of words."""
        written: list[str] = []
        while size > 0:
            new = self.chance.random() < NEW_WORDS
            written.append(f"{self.chance.getrandbits(32):x}" if new else self.chance.choice(self.words))
            size -= len(written[-1].encode()) + 1
        return " ".join(written)


@click.command()
@click.option("--tokenizer", default="demo", show_default=True, help="A model's directory.")
def main(tokenizer: str) -> None:
    """Milliseconds of CPU for one request's prompt, the median over requests that come once each."""
    prompter = Prompter(TokenizerConfig(source=tokenizer))
    words = (Path(demo_model.__file__).parent / "demo_text.txt").read_text(encoding="utf-8").split()
    author = Author(words, Random(1))
    rows = [
        row(prompter, author, size * KIB, turn, share)
        for size in SIZES
        for turn in TURNS
        for share in ("nothing", "90 %")
    ]
    encoder = "fastokens" if prompter.fast else "tokenizers"
    print(f"{encoder}, template and vocabulary of {tokenizer}, keys of {BLOCK} tokens")
    print(table(HEAD, rows))


def row(prompter: Prompter, author: Author, size: int, turn: int, share: str) -> list[str]:
    chats = [author.chat(size, turn) for _ in range(2 * CHATS)]
    if share != "nothing":
        for chat in chats:  # as it was some turns ago
            read(call_of(chat[: len(chat) * 9 // 10]), prompter)
    calls = [call_of(chat) for chat in chats[:CHATS]]
    readings, reading_ms = timed(lambda call: read(call, prompter), calls)
    prompts = [reading.prompt for reading in readings if reading.prompt is not None]
    _, keys_ms = timed(lambda prompt: prompt.keys(BLOCK), prompts)
    _, json_ms = timed(lambda i: calls[i].upstream_body(prompt_ids=prompts[i].token_ids), range(CHATS))
    raws = [msgspec.json.encode(chat) for chat in chats[CHATS:]]
    decoded, decode_ms = timed(msgspec.json.decode, raws)
    texts, render_ms = timed(lambda messages: prompter.render(messages, None), decoded)
    _, encode_ms = timed(lambda text: prompter.text(text, False), texts)
    costs = (decode_ms, render_ms, encode_ms, reading_ms, keys_ms, json_ms)
    tokens = statistics.median(prompt.num_tokens for prompt in prompts)
    head = [f"{size // KIB} KiB", share, str(len(chats[0])), f"{tokens:.0f}"]
    return head + [f"{cost:.3f}" for cost in costs]


def call_of(messages: Messages) -> Call:
    body = msgspec.json.encode({"model": "m", "messages": messages, "stream": True, "max_tokens": 99})
    return parse(FAMILIES["/v1/chat/completions"], body)


def timed(run: Callable, each: Sequence) -> tuple[list, float]:
    """What came of each, and the median of the milliseconds of CPU."""
    results, costs = [], []
    for one in each:
        start = process_time()
        results.append(run(one))
        costs.append(1e3 * (process_time() - start))
    return results, statistics.median(costs)


if __name__ == "__main__":
    main()
