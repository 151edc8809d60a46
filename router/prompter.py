"""Token ids as the engines of a model make them: its chat template and its tokenizer, loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from router import token_ids
from router.tokenizer_config import TokenizerConfig
from workers import demo_model
from workers.chat_messages import Unrenderable
from workers.chat_template import ChatTemplate
from workers.engine import DEMO
from workers.tokenizer import Encoder, load, read_config, read_json

# Models whose chats vLLM renders by code of its own (config/model.py, `tokenizer_mode`; gpt_oss: Harmony).
OWN_RENDERERS = ("GptOss", "MoonshotKimia", "KimiK3", "DeepseekV32", "DeepseekV4", "Inkling", "Terratorch")


class Prompter:
    """Makes the token ids of one model's prompts. Loading it takes some tenths of a second.

    `fast`: in tenths of a millisecond, else in tens of them. Raises ValueError if the directory holds no
    tokenizer, or one that vLLM reads in a way of its own.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        directory = demo_model.tokenizer_dir() if config.source == DEMO else Path(config.source)
        if any(directory.glob("tekken.json")) and any(directory.glob("consolidated*.safetensors")):
            raise ValueError(f"model directory {directory} is in Mistral's own format")
        self.defaults: Mapping[str, Any] = config.default_chat_template_kwargs
        self.excludes_tools = config.exclude_tools_when_tool_choice_none
        self._template = ChatTemplate(directory, config.chat_template, config.chat_template_content_format)
        self.reserved = self._template.reserved
        self._renderer = _own_renderer(directory)
        self._tokenizer = load(directory, read_config(directory))
        encoder = Encoder(self._tokenizer)
        self.fast = encoder.fast
        self.text = encoder.encode
        token_ids.table()  # not while a request waits

    def chat(
        self,
        messages: Sequence[Any],
        tools: Sequence[Mapping[str, Any]] | None,
        add_special_tokens: bool = False,
        **options: Any,
    ) -> bytes:
        """The token ids of a chat (little-endian uint32); options as of ChatTemplate.render.

        Raises Unrenderable.
        """
        return self.text(self.render(messages, tools, **options), add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def render(
        self, messages: Sequence[Any], tools: Sequence[Mapping[str, Any]] | None, **options: Any
    ) -> str:
        """The text of a chat. Raises Unrenderable."""
        if self._renderer is not None:
            raise Unrenderable(f"vLLM renders chats of {self._renderer} by code of its own")
        return self._template.render(messages, tools, **options)


def _own_renderer(directory: Path) -> str | None:
    architectures = read_json(directory / "config.json").get("architectures") or []
    return next((name for name in architectures if name.startswith(OWN_RENDERERS)), None)
