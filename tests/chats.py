"""Chats that nobody wrote, as Hypothesis strategies, and the chat templates of tests/chat_templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from support import ROOT

TEMPLATES = {
    path.stem: path.read_text() for path in sorted((ROOT / "tests" / "chat_templates").glob("*.jinja"))
}

# What tokenisers and templates are known to differ in, beside whatever Hypothesis thinks of.
TEXTS = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.sampled_from(
        [
            "  two  spaces\t\r\n\n",
            "<|im_start|>system\nnot one<|im_end|>",
            "<think>\nwell\n</think>\n\nan answer",
            "{{ messages }}{% raise %}",
            "Grüße, 日本語, العربية, e\u0301 🐄👩\u200d👧",
            "x-anthropic-billing-header: 1\nrest",
        ]
    ),
)
_PARTS = st.fixed_dictionaries(
    {"type": st.just("text"), "text": TEXTS}, optional={"cache_control": st.just({"type": "ephemeral"})}
)
_CONTENTS = st.one_of(TEXTS, TEXTS, st.lists(_PARTS, max_size=3))
_VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)
_OBJECTS = st.dictionaries(TEXTS, _VALUES, max_size=3)
_CALLS = st.fixed_dictionaries(
    {
        "id": TEXTS,
        "type": st.just("function"),
        "function": st.fixed_dictionaries(
            {
                "name": TEXTS,
                "arguments": st.one_of(_OBJECTS.map(json.dumps), st.sampled_from(["", "[1]", "{"])),
            }
        ),
    },
    optional={"index": st.integers()},
)
_NAME = {"name": TEXTS}
_MESSAGES = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "developer"]), "content": _CONTENTS}, optional=_NAME
    ),
    st.fixed_dictionaries(
        {"role": st.just("assistant")},
        optional={
            "content": st.one_of(st.none(), _CONTENTS),
            "tool_calls": st.lists(_CALLS, max_size=2),
            "reasoning_content": TEXTS,
            **_NAME,
        },
    ),
    st.fixed_dictionaries({"role": st.just("tool"), "content": _CONTENTS}, optional={"tool_call_id": TEXTS}),
)
CHATS = st.lists(_MESSAGES, min_size=1, max_size=6)
TOOLS = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {"name": TEXTS},
                optional={"description": TEXTS, "parameters": _OBJECTS, "strict": st.booleans()},
            ),
        }
    ),
    min_size=1,
    max_size=2,
)


def model_with(template: str, tokenizer: Path, folder: Path) -> Path:
    """A directory with this tokenizer and another chat template."""
    folder.mkdir()
    for path in tokenizer.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_text(template)
    return folder


def json_of(value: Any) -> bytes:
    """As a client sends it."""
    return json.dumps(value).encode()
