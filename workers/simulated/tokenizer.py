"""Text to token ids and back, and chats to prompts, exactly as vLLM does it for the same model directory."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers.decoders import DecodeStream

# Texts on which fastokens must agree with tokenizers before its ids are trusted.
PROBES = (
    "The herd moves as one.",
    "  leading, trailing and   inner spaces \n\n\ttabs\r\n",
    "def f(x: int) -> str:\n    return f'{x:>08.3f}'  # 100% of 1_000_000",
    "I'll say: don't, won't, they'VE",
    "Grüße, naïve café, 日本語のテキスト, русский текст, العربية, 🐄🐑👩‍👩‍👧 e\u0301 \u200b\ufeff",
    "<|im_start|>user\nhello<|im_end|>\n<s></s><tool_call>{}</tool_call>",
    "",
)

# Enough tokens before the output for any decoder to know whether a space or half a character precedes it.
DECODE_CONTEXT = 16


class TemplateError(ValueError):
    """The chat template refused the messages."""


class Tokenizer:
    """The tokenizer and chat template of a model directory (tokenizer.json, tokenizer_config.json).

    `template`: a file with another chat template.
    """

    def __init__(self, directory: Path, template: Path | None = None) -> None:
        if not (directory / "tokenizer.json").is_file():
            raise ValueError(f"model directory {directory} holds no tokenizer.json")
        self._tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._encode = _fastest_encoder(directory / "tokenizer.json", self._tokenizer)
        config = _read_json(directory / "tokenizer_config.json")
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.eos_token_id = self._token_id(config.get("eos_token"))
        self.max_position = _max_position(directory)
        self._special = {name: _content(config.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
        self._template = _read_template(directory, config, template)
        self._compiled = lru_cache(maxsize=32)(_template_environment().from_string)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; special tokens written in it become ids. Releases the GIL."""
        return self._encode(text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def decode_each(self, token_ids: Sequence[int]) -> list[str]:
        """The text of every id by itself."""
        return self._tokenizer.decode_batch([[i] for i in token_ids], skip_special_tokens=False)

    def pieces(self, token_ids: Sequence[int]) -> list[str | None]:
        """The vocabulary's own spelling of each id."""
        return [self._tokenizer.id_to_token(i) for i in token_ids]

    def special_ids(self) -> set[int]:
        """Ids of all added tokens, special or not."""
        return set(self._tokenizer.get_added_tokens_decoder())

    def stream_after(
        self, prompt: Sequence[int], *, skip_special_tokens: bool = True
    ) -> Callable[[int], str]:
        """A function from the next token id to the text it completes, empty inside a character."""
        context = list(prompt[-DECODE_CONTEXT:])
        stream = DecodeStream(ids=context, skip_special_tokens=skip_special_tokens)
        return lambda token_id: stream.step(self._tokenizer, token_id) or ""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt of a chat. TemplateError if there is no template or it refuses these messages."""
        source = template or self._template
        if source is None:
            raise TemplateError(
                "As of transformers v4.44, default chat template is no longer allowed, so you must provide a "
                "chat template if the tokenizer does not define one."
            )
        chat = [template_message(message) for message in messages]
        try:
            prompt = self._compiled(source).render(
                messages=chat,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **{**self._special, **variables},
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise TemplateError(str(error)) from error
        return _open_final_message(prompt, chat) if continue_final_message else prompt

    def _token_id(self, token: object) -> int | None:
        content = _content(token)
        return None if content is None else self._tokenizer.token_to_id(content)


def template_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates want it: text parts joined, tool arguments as objects."""
    result = {key: value for key, value in message.items() if value is not None or key == "content"}
    content = message.get("content")
    if isinstance(content, list):
        result["content"] = "\n".join(
            part if isinstance(part, str) else part.get("text", "") for part in content
        )
    if calls := message.get("tool_calls"):
        result["tool_calls"] = [_parsed_call(call) for call in calls]
    return result


def _parsed_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    if isinstance(arguments := function.get("arguments"), str):
        function["arguments"] = json.loads(arguments) if arguments.strip() else {}
    return {**call, "function": function}


def _open_final_message(prompt: str, chat: Sequence[Mapping[str, Any]]) -> str:
    """Cut whatever the template wrote after the last message's text."""
    final = str(chat[-1].get("content") or "").strip()
    end = prompt.rfind(final) + len(final)
    if not final or end < len(final):
        raise TemplateError(
            "continue_final_message is set, but the final message does not appear in the prompt."
        )
    return prompt[:end]


def _fastest_encoder(path: Path, reference: tokenizers.Tokenizer) -> Callable[[str, bool], list[int]]:
    """fastokens where it gives the ids of `tokenizers` on every probe, else `tokenizers`."""

    def encode_reference(text: str, special: bool) -> list[int]:
        return list(reference.encode(text, add_special_tokens=special).ids)

    try:
        import fastokens  # type: ignore[import-untyped]

        fast = fastokens.Tokenizer.from_file(str(path))
    except (ImportError, ValueError, NotImplementedError, RuntimeError):
        return encode_reference

    def encode_fast(text: str, special: bool) -> list[int]:
        return list(fast.encode(text, add_special_tokens=special).ids)

    probes = [(text, special) for text in PROBES for special in (False, True)]
    return encode_fast if all(encode_fast(*p) == encode_reference(*p) for p in probes) else encode_reference


def _template_environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _read_template(directory: Path, config: Mapping[str, Any], given: Path | None) -> str | None:
    if given is not None and not given.is_file():
        raise ValueError(f"chat template {given} is no file")
    if given is not None:
        return given.read_text(encoding="utf-8")
    if (path := directory / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _max_position(directory: Path) -> int | None:
    config = _read_json(directory / "config.json")
    return config.get("max_position_embeddings")


def _content(token: object) -> str | None:
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
