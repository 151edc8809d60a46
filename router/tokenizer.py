"""The tokenizers of all models: loaded when a model is first heard of, asked for every request.

What takes long happens beside the loop. Until the tokenizer of a model is there, and where there is none, its
requests are known by their text.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from router.core.blocks import Prompt
from router.core.fleet import Replica
from router.openai_api import Call
from router.prompter import Prompter
from router.prompts import Reading, read
from router.tokenizer_config import ANY, TokenizerConfig

log = logging.getLogger(__name__)

# What is longer is read beside the loop. Here it takes about a millisecond (`scripts/bench tokens`), most of
# it with the GIL: shorter ones would cost more by changing threads than the loop would gain.
LONG_BODY_BYTES = 160 * 1024
# With tokenizers instead of fastokens a millisecond is over here.
LONG_SLOW_BODY_BYTES = 2048
THREADS = 2


@dataclass(slots=True, eq=False)
class Entry:
    """The tokenizer of one model as far as it has come; `lacking`: why there is none."""

    config: TokenizerConfig
    prompter: Prompter | None = None
    lacking: str = "its tokenizer is being loaded"

    def is_long(self, call: Call) -> bool:
        """Whether the loop should not wait for this request to be read."""
        fast = self.prompter is None or self.prompter.fast
        return len(call.body) > (LONG_BODY_BYTES if fast else LONG_SLOW_BODY_BYTES)


class Tokenizers:
    """What requests ask for, in the tokens of their models.

    `configured`: by the names of models, or under `ANY`; they are loaded from the start. Other models are
    loaded from the directory that their engine names, if it is there.
    """

    def __init__(self, configured: Mapping[str, TokenizerConfig]) -> None:
        self._configured = configured
        self._entries: list[Entry] = []
        self._by_name: dict[str, Entry] = {}
        self._adapters: frozenset[str] = frozenset()
        self._loads: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(THREADS, "tokens")

    def start(self) -> None:
        """Begins to load what is configured."""
        # Both libraries would use all cores for one long text, in every router process of the machine.
        os.environ.setdefault("RAYON_NUM_THREADS", "1")
        for name, config in self._configured.items():
            self._by_name[name] = self._entry(config)

    async def settled(self) -> None:
        """Returns when all that is being loaded is there, or has failed."""
        while self._loads:
            await asyncio.wait(self._loads)

    async def stop(self) -> None:
        """Loads nothing any more."""
        for load in self._loads:
            load.cancel()
        await asyncio.gather(*self._loads, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def follow(self, replica: Replica) -> None:
        """A replica joined: its model is loaded if it is new. Its adapters are tokenised as the model is."""
        self._adapters |= replica.adapters
        for name in replica.models:
            if name not in self._by_name and (config := self._config(replica)) is not None:
                self._by_name[name] = self._entry(config)

    async def read(self, call: Call) -> Reading:
        """What a request asks to be prefilled. Never fails: at worst the prompt is known by its text."""
        entry = self._by_name.get(call.model)
        adapter = call.model if call.model in self._adapters else None
        if entry is None or entry.prompter is None:
            return read(call, None, adapter, entry.lacking if entry else "the model has no tokenizer here")
        if not entry.is_long(call):
            return read(call, entry.prompter, adapter)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, read, call, entry.prompter, adapter)

    async def prompt(self, call: Call) -> Prompt:
        """The prompt of a chat or completion."""
        prompt = (await self.read(call)).prompt
        assert prompt is not None
        return prompt

    def decoder(self, model: str) -> Callable[[Sequence[int], bool], str] | None:
        """What makes text of a model's token ids, as of Prompter.decode; None without a tokenizer."""
        entry = self._by_name.get(model)
        return entry.prompter.decode if entry is not None and entry.prompter is not None else None

    def lacking(self, model: str) -> str | None:
        """Why a model's requests are known by their text; None if they are known by their tokens."""
        entry = self._by_name.get(model)
        if entry is None:
            return "the model has no tokenizer here"
        return None if entry.prompter is not None else entry.lacking

    def _config(self, replica: Replica) -> TokenizerConfig | None:
        """The configured one of the model, else what its engine says."""
        for name in (*replica.models, ANY):
            if name in self._configured:
                return self._configured[name]
        if replica.root is not None and (Path(replica.root) / "tokenizer.json").is_file():
            return TokenizerConfig(source=replica.root)
        return None

    def _entry(self, config: TokenizerConfig) -> Entry:
        for entry in self._entries:
            if entry.config == config:
                return entry
        entry = Entry(config)
        self._entries.append(entry)
        load = asyncio.get_running_loop().create_task(self._load(entry))
        self._loads.add(load)
        load.add_done_callback(self._loads.discard)
        return entry

    async def _load(self, entry: Entry) -> None:
        source = entry.config.source
        try:
            entry.prompter = await asyncio.get_running_loop().run_in_executor(
                self._threads, Prompter, entry.config
            )
        except (ValueError, OSError) as error:
            entry.lacking = f"its tokenizer cannot be loaded: {error}"
            log.warning("tokenizer of %s: %s", source, error)
            return
        speed = "fastokens" if entry.prompter.fast else "tokenizers, since fastokens differs: slow"
        log.info("tokenizer of %s loaded (%s)", source, speed)
