"""Which templates want contents as parts, as vLLM tells it from their loops."""

from __future__ import annotations

import pytest
from jinja2 import Environment
from support import ROOT

from workers.content_format import wants_parts

TEMPLATES = ROOT / "tests" / "chat_templates"


def loop(over: str, within: str = "messages") -> str:
    return f"{{% for m in {within} %}}{{% for part in {over} %}}{{{{ part }}}}{{% endfor %}}{{% endfor %}}"


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("{{ messages }}", False),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{% for k in m %}{{ k }}{% endfor %}{% endfor %}", False),
        (loop("m.content"), True),
        (loop("m['content']"), True),
        (loop("m['content'] | list"), True),
        (loop("m.content[1:]"), True),
        (loop("m.content", within="messages[1:]"), True),
        (loop("m.content", within="messages | list"), True),
        (loop("m.tool_calls"), False),
        (loop("m.content", within="others"), False),
        ("{% set rest = messages[1:] %}" + loop("m.content", within="rest"), True),
        ("{% set a = messages %}{% set b = a %}" + loop("m.content", within="b"), True),
        ("{% set a = b %}{% set b = a %}" + loop("m.content", within="b"), False),
        # A loop over a variable of that name counts outside macros, wherever it comes from.
        ("{% set content = 1 %}{% for part in content %}{% endfor %}", True),
        ("{% macro show(content) %}{% for part in content %}{% endfor %}{% endmacro %}", False),
        (
            "{% macro show(what) %}{% for part in what %}{% endfor %}{% endmacro %}"
            "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
            True,
        ),
        (
            "{% macro show(x, what) %}{% for part in what %}{% endfor %}{% endmacro %}"
            "{% for m in messages %}{{ show(1, what=m['content']) }}{% endfor %}",
            True,
        ),
        (
            "{% macro show(what) %}{% for part in what %}{% endfor %}{% endmacro %}"
            "{% for m in messages %}{{ show(m.role) }}{% endfor %}",
            False,
        ),
    ],
)
def test_loops_over_contents_want_parts(source: str, parts: bool) -> None:
    assert wants_parts(Environment().parse(source)) is parts


@pytest.mark.parametrize(
    ("name", "parts"),
    [("llama3", False), ("qwen3", False), ("mistral", True), ("macros", True), ("developer", False)],
)
def test_templates_in_the_style_of_models(name: str, parts: bool) -> None:
    environment = Environment(extensions=["jinja2.ext.loopcontrols", "workers.chat_template.Generation"])
    source = (TEMPLATES / f"{name}.jinja").read_text()
    assert wants_parts(environment.parse(source)) is parts
