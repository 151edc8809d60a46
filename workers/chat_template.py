"""A chat as the text that the model reads: the model's chat template, rendered as vLLM does it.

The template comes with the model, often from a stranger, and runs in Jinja's sandbox. What a client sends is
never one, unless the caller passes it as such.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from types import BuiltinMethodType, MappingProxyType, MethodType
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, missing

from workers.chat_messages import ContentFormat, Message, Tool, Unrenderable, conversation
from workers.content_format import wants_parts
from workers.tokenizer import read_config, read_json, special_tokens

DEFAULT, WITH_TOOLS = "default", "tool_use"
# What a request's chat_template_kwargs cannot set: the parameters of transformers' `apply_chat_template`.
RESERVED = frozenset(
    {
        "self", "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
        "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors",
        "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    }
)  # fmt: skip
NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})
# Appended to the final message that is to be continued, to find its end in what the template makes of it.
END_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


class TemplateError(Unrenderable):
    """The chat template refused the messages, or there is none."""


class ChatTemplate:
    """The chat template of a model directory, or another in its place.

    `given`: a file, or the template itself, as vLLM's --chat-template. `content_format` as vLLM's
    --chat-template-content-format.
    """

    def __init__(
        self, directory: Path, given: str | None = None, content_format: ContentFormat = "auto"
    ) -> None:
        config = read_config(directory)
        self._special = special_tokens(directory, config)
        named = _templates(directory, config)
        self._by_name = named if given is None else {DEFAULT: named.get(given) or _read(given)}
        self._content_format = content_format
        self._compiled = lru_cache(maxsize=32)(_Compiled)

    @property
    def reserved(self) -> frozenset[str]:
        """Names that a request's variables cannot have: they mean something else to the template."""
        return RESERVED | self._special.keys()

    def render(
        self,
        messages: Sequence[Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> str:
        """The prompt of the messages of a chat request. `tools` as `tool_dicts` makes them.

        Raises Unrenderable where vLLM would refuse the messages or read more than text, and its TemplateError
        where the template does or there is none.
        """
        if not messages:
            raise Unrenderable(
                "Cannot apply chat template to an empty conversation. Provide at least one message."
            )
        if continue_final_message and add_generation_prompt:
            raise Unrenderable("continue_final_message and add_generation_prompt are not compatible.")
        compiled = self._compiled(template or self._source(tools is not None))
        parts = self._content_format == "openai" or (self._content_format == "auto" and compiled.wants_parts)
        chat = compiled.with_known_roles(conversation(messages, parts))
        final = _marked(chat, compiled.source) if continue_final_message else None
        prompt = compiled.render(
            {
                **self._special,
                **variables,
                "messages": chat,
                "tools": tools,
                "documents": documents,
                "add_generation_prompt": add_generation_prompt,
            }
        )
        return prompt if final is None else _up_to_mark(prompt, final)

    def _source(self, with_tools: bool) -> str:
        names = (WITH_TOOLS, DEFAULT) if with_tools else (DEFAULT,)
        for name in names:
            if name in self._by_name:
                return self._by_name[name]
        raise TemplateError(
            "As of transformers v4.44, default chat template is no longer allowed, so you must provide a "
            "chat template if the tokenizer does not define one."
        )


class _Compiled:
    """A template ready to render, and what can be told from its source."""

    def __init__(self, source: str) -> None:
        self.source = source
        try:
            self._template = _environment().from_string(source)
            self.wants_parts = wants_parts(_environment().parse(source))
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template is none: {error}") from error
        # A ChainMap until here; it is copied for every rendering, which took more than half of its time.
        self._template.globals = dict(self._template.globals)
        self._knows_developers = any(f"{quote}developer{quote}" in source for quote in "\"'")

    def with_known_roles(self, chat: list[Message]) -> list[Message]:
        """Developers become the system where the template has not heard of them."""
        if self._knows_developers or all(message["role"] != "developer" for message in chat):
            return chat
        return _with_one_system(
            [
                {name: value for name, value in message.items() if name != "tools"} | {"role": "system"}
                if message["role"] == "developer"
                else message
                for message in chat
            ]
        )

    def render(self, variables: Mapping[str, Any]) -> str:
        """What the template writes; TemplateError whatever goes wrong in it, as it is a program of others."""
        try:
            return self._template.render(variables)
        except Exception as error:
            raise TemplateError(str(error) or type(error).__name__) from error


def _with_one_system(chat: list[Message]) -> list[Message]:
    """All that the system says, in the first message; as it is where it already stands there."""
    systems = [message for message in chat if message["role"] == "system"]
    if len(systems) == 1 and chat[0] is systems[0]:
        return chat
    said = [_joined(message["content"]) for message in systems]
    merged = {"role": "system", "content": "\n\n".join(filter(None, said))}
    return [merged, *(message for message in chat if message["role"] != "system")]


def _joined(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _marked(chat: list[Message], source: str) -> str:
    """Marks the end of the final message, and returns its text; transformers' `render_jinja_template`."""
    if "content" not in source:
        raise TemplateError("continue_final_message is set, but the template has no content")
    final = chat[-1]
    if isinstance(text := final["content"], str):
        chat[-1] = {**final, "content": text + END_MARK}
        return text
    if not text:
        raise TemplateError("continue_final_message is set, but the final message has no text")
    chat[-1] = {**final, "content": [*text[:-1], {**text[-1], "text": text[-1]["text"] + END_MARK}]}
    return str(text[-1]["text"])


def _up_to_mark(prompt: str, final: str) -> str:
    mark = END_MARK.strip()
    if final.strip() not in prompt or mark not in prompt:
        raise TemplateError(
            "continue_final_message is set, but the final message does not appear in the prompt."
        )
    end = prompt.rindex(mark)
    return prompt[:end] if prompt.startswith(END_MARK, end) else prompt[:end].rstrip()


def _templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The model's templates by name; files go before what stands in tokenizer_config.json."""
    files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (path := directory / "chat_template.jinja").is_file():
        files[DEFAULT] = path
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    found = config.get("chat_template") or read_json(directory / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        return {entry["name"]: entry["template"] for entry in found}
    return {DEFAULT: found} if isinstance(found, str) else {}


def _read(given: str) -> str:
    """A template named by its file, or the text of one."""
    if any(sign in given for sign in "{}\n"):
        return given
    if not Path(given).is_file():
        raise ValueError(f"chat template {given} is no file")
    return Path(given).read_text(encoding="utf-8")


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, but it asks less where the answer is known: more than half of a template's time.

    What every dict lacks as an attribute is an item, what loops and namespaces show is for templates, and
    macros are templates.
    """

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute` in a template."""
        kind = type(obj)
        if kind is dict and attribute not in _OF_EVERY_DICT:
            try:
                return obj[attribute]
            except KeyError:
                return self.undefined(obj=obj, name=attribute)
        if (kind is LoopContext or kind is Namespace) and not attribute.startswith("_"):
            value = getattr(obj, attribute, missing)
            if value is not missing and not isinstance(value, _METHODS):
                return value
        return super().getattr(obj, attribute)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """A call in a template."""
        if type(__obj) is Macro:
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            return __obj(__context.eval_ctx, *args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)


_OF_EVERY_DICT = frozenset(dir({}))
_METHODS = (MethodType, BuiltinMethodType)


class Generation(Extension):
    """`{% generation %}` marks for training what the model says; here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    """Jinja as transformers sets it up for chat templates."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would escape what is special in HTML. What was printed of a tool is printed again."""
    between = None if separators is None else tuple(separators)
    form = (ensure_ascii, indent, between, sort_keys)
    printed = value.printed if type(value) is Tool else {}
    if form not in printed:
        printed[form] = json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=between, sort_keys=sort_keys
        )
    return str(printed[form])
