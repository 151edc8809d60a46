"""Chats rendered by a model's template: what it gets, what it may do, and where its text ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chats import CHATS, TEMPLATES, TOOLS
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from workers import chat_template
from workers.chat_messages import Unrenderable, conversation, tool_dicts
from workers.chat_template import ChatTemplate, TemplateError

USER = {"role": "user", "content": "hi"}


def rendered(template: str, messages: Any = (USER,), **options: Any) -> str:
    return ChatTemplate(Path("/nonexistent"), "{# no file #}" + template).render(list(messages), **options)


def test_a_template_gets_what_vllm_gives_it() -> None:
    shown = "{{ [tools, documents, add_generation_prompt, x, y is defined] | tojson }}"
    assert json.loads(rendered(shown, variables={"x": 1})) == [None, None, True, 1, False]
    documents = [{"title": "t", "text": "x"}]
    options = {"tools": [], "documents": documents, "add_generation_prompt": False}
    assert json.loads(rendered(shown, variables={"x": 1}, **options)) == [[], documents, False, 1, False]


def test_json_is_written_as_transformers_writes_it() -> None:
    assert rendered("{{ {'b': '<é>', 'a': [1.0]} | tojson }}") == '{"b": "<é>", "a": [1.0]}'
    assert rendered("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 2,\n "b": 1\n}'
    assert rendered("{{ [1, 2] | tojson(separators=(',', ':')) }}") == "[1,2]"


def test_tools_are_printed_in_every_form_that_a_template_asks_for() -> None:
    tools = tool_dicts([{"function": {"name": "ä", "parameters": {"b": 1, "a": [2]}}}])
    prints = "{{ tools[0] | tojson }}\n{{ tools[0] | tojson(separators=[',', ':'], sort_keys=true) }}"
    expected = json.dumps(tools[0], ensure_ascii=False) + "\n"
    expected += json.dumps(tools[0], ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    for _ in range(2):  # the second time as it was printed before
        assert rendered(prints, tools=tools) == expected
    assert rendered("{{ tools | tojson }}", tools=tools) == json.dumps(tools, ensure_ascii=False)


def test_loop_controls_and_generation_marks_are_known() -> None:
    each = "{% for n in [1, 2, 3] %}{% if n == 2 %}{% continue %}{% endif %}{{ n }}{% endfor %}"
    assert rendered(each) == "13"
    assert rendered("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "ahib"


def test_special_tokens_have_their_names(tmp_path: Path) -> None:
    config = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "image_token": "<image>",
        "chat_template": "{{ bos_token }}{{ eos_token }}{{ image_token }}{{ pad_token }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate(tmp_path)
    assert template.render([USER]) == "<s></s><image>"
    assert {"bos_token", "image_token", "messages", "padding"} <= template.reserved
    assert "enable_thinking" not in template.reserved


def test_files_go_before_the_configuration_and_tools_have_their_own(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate(tmp_path).render([USER]) == "plain"
    assert ChatTemplate(tmp_path).render([USER], []) == "with tools"
    assert ChatTemplate(tmp_path, "tool_use").render([USER]) == "with tools"
    (tmp_path / "chat_template.jinja").write_text("a file")
    assert ChatTemplate(tmp_path).render([USER], []) == "a file"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("a file for tools")
    assert ChatTemplate(tmp_path).render([USER], []) == "a file for tools"


def test_a_processors_template_is_taken_where_there_is_no_other(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "a processor's"}))
    assert ChatTemplate(tmp_path).render([USER]) == "a processor's"


def test_another_template_may_be_a_file_or_the_template_itself(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("the model's")
    (tmp_path / "other.jinja").write_text("another")
    assert ChatTemplate(tmp_path, str(tmp_path / "other.jinja")).render([USER]) == "another"
    assert ChatTemplate(tmp_path, "{{ 'written out' }}").render([USER]) == "written out"
    with pytest.raises(ValueError, match="is no file"):
        ChatTemplate(tmp_path, "missing.jinja")


@pytest.mark.parametrize(
    ("content_format", "seen"),
    [("auto", "hi"), ("string", "hi"), ("openai", [{"type": "text", "text": "hi"}])],
)
def test_the_form_of_contents_may_be_chosen(content_format: Any, seen: Any) -> None:
    template = ChatTemplate(Path("/nonexistent"), "{{ messages[0].content | tojson }}", content_format)
    assert json.loads(template.render([USER])) == seen


# -- roles


SHOW = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("roles", "seen"),
    [
        ("du", "[system]0[user]1"),
        ("dsu", "[system]0\n\n1[user]2"),
        ("udsu", "[system]1\n\n2[user]0[user]3"),
        ("usu", "[user]0[system]1[user]2"),  # without a developer nobody is moved
    ],
)
def test_developers_are_the_system_of_templates_that_do_not_know_them(roles: str, seen: str) -> None:
    names = {"d": "developer", "s": "system", "u": "user"}
    messages = [{"role": names[role], "content": str(place)} for place, role in enumerate(roles)]
    assert rendered(SHOW, messages) == seen
    as_they_came = "".join(f"[{m['role']}]{m['content']}" for m in messages)
    assert rendered(SHOW + "{# 'developer' #}", messages) == as_they_came


# -- a final message that goes on

PARTS = "{% for part in messages[1].content %}{{ part.text }},{% endfor %}"


@pytest.mark.parametrize(
    ("content", "template", "prompt"),
    [
        ("Once upon", SHOW + "<end>", "[user]hi[assistant]Once upon"),
        (" a ", SHOW + "<end>", "[user]hi[assistant] a "),
        (" a ", "{{ messages[1].content | trim }}<end>", "a"),
        ("", SHOW + "<end>", "[user]hi[assistant]"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], PARTS, "a,b"),
    ],
)
def test_a_prompt_ends_where_the_final_message_does(content: Any, template: str, prompt: str) -> None:
    said = [USER, {"role": "assistant", "content": content}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    parts: Any = "openai" if isinstance(content, list) else "auto"
    model = ChatTemplate(Path("/nonexistent"), "{# no file #}" + template, parts)
    assert model.render(said, **options) == prompt


@pytest.mark.parametrize("template", ["{{ messages[0]['role'] }}", "{{ messages[0].content | upper }}", "x"])
def test_what_does_not_show_the_final_message_cannot_go_on_with_it(template: str) -> None:
    with pytest.raises(TemplateError, match="continue_final_message"):
        rendered(template, add_generation_prompt=False, continue_final_message=True)


def test_a_message_is_continued_or_a_new_one_begun() -> None:
    with pytest.raises(Unrenderable, match="not compatible"):
        rendered(SHOW, continue_final_message=True)


# -- templates of strangers


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no such thing') }}",
        "{{ nothing.at.all }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages.pop() }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{{ ''.__class__ }}{{ ''.__class__.mro() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[0]['content'].__init__.__globals__ }}",
        "{{ namespace(x=1).__class__.x }}",
    ],
)
def test_whatever_goes_wrong_in_a_template_is_a_template_error(template: str) -> None:
    with pytest.raises(TemplateError):
        rendered(template)


@pytest.mark.parametrize(
    "reach",
    [
        "{{ '{0.__class__}'.format(1) }}",
        "{{ namespace(x=1).__class__ }}",
        "{{ messages.append }}",
        "{% for m in messages %}{{ loop._iterable }}{{ loop.__class__ }}{% endfor %}",
    ],
)
def test_what_is_not_a_templates_affair_looks_empty(reach: str) -> None:
    assert rendered(reach) == ""


def test_what_is_no_template_is_said() -> None:
    with pytest.raises(TemplateError, match="the chat template is none"):
        rendered("{% if %}")
    with pytest.raises(TemplateError, match="no longer allowed"):
        ChatTemplate(Path("/nonexistent")).render([USER])


def test_what_clients_say_is_no_template() -> None:
    assert rendered(SHOW, [{"role": "user", "content": "{{ 1 + 1 }}"}]) == "[user]{{ 1 + 1 }}"


@given(st.sampled_from(sorted(TEMPLATES)), CHATS, st.one_of(st.none(), TOOLS), st.booleans(), st.booleans())
def test_the_sandbox_that_asks_less_renders_the_same(
    name: str, chat: Any, tools: Any, parts: bool, prompt: bool
) -> None:
    """Beside Jinja's own sandbox: the same text, or both refuse."""
    variables = {
        "messages": conversation(chat, parts),
        "tools": tools and tool_dicts(tools),
        "documents": None,
        "add_generation_prompt": prompt,
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    ours, plain = chat_template._environment(), _plain_sandbox()
    assert _outcome(ours, name, variables) == _outcome(plain, name, variables)


def _plain_sandbox() -> ImmutableSandboxedEnvironment:
    ours = chat_template._environment()
    plain = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[type(e) for e in ours.extensions.values()]
    )
    plain.filters["tojson"] = ours.filters["tojson"]
    plain.globals["raise_exception"] = ours.globals["raise_exception"]
    return plain


def _outcome(environment: ImmutableSandboxedEnvironment, name: str, variables: dict[str, Any]) -> str:
    try:
        return environment.from_string(TEMPLATES[name]).render(variables)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
