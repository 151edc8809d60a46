"""Where tokenizers come from, as an operator writes it or as engines are started."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from workers.chat_messages import ContentFormat
from workers.engine import EngineSpec

# The name that stands for every model without a tokenizer of its own.
ANY = "*"
# Flags under which vLLM makes prompts in ways that are not followed here.
NOT_FOLLOWED = ("skip-tokenizer-init", "enable-prompt-embeds", "tokenizer-revision")
TOKENIZER_MODES = ("auto", "hf")


class TokenizerConfig(BaseModel):
    """Where a model's tokenizer and chat template are, and vLLM's flags that change what is made of them.

    `source`: a directory, or "demo". `exclude_tools_when_tool_choice_none`: null where the engine's flags are
    not known.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Annotated[str, Field(min_length=1)]
    chat_template: str | None = None
    chat_template_content_format: ContentFormat = "auto"
    default_chat_template_kwargs: dict[str, Any] = {}
    exclude_tools_when_tool_choice_none: bool | None = None

    @field_validator("default_chat_template_kwargs", mode="before")
    @classmethod
    def _as_on_the_command_line(cls, given: Any) -> Any:
        return json.loads(given) if isinstance(given, str) else given

    @classmethod
    def of_engine(cls, spec: EngineSpec) -> TokenizerConfig | None:
        """That of an engine that Herd starts; None if its flags ask for what is not followed here."""
        args = spec.engine_args
        mode = args.get("tokenizer-mode", "auto")
        if mode not in TOKENIZER_MODES or any(args.get(flag) for flag in NOT_FOLLOWED):
            return None
        given = {name: args[flag] for name in cls.model_fields if (flag := name.replace("_", "-")) in args}
        source = str(args.get("tokenizer", spec.source))
        return cls.model_validate({"exclude_tools_when_tool_choice_none": False, **given, "source": source})
