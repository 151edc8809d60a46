"""What a request asks to be prefilled: exactly, or by its text and why; and what may be sent in its place."""

from __future__ import annotations

import json
from array import array
from typing import Any

import pytest
from chats import CHATS, TEMPLATES, TEXTS, TOOLS, json_of
from hypothesis import given
from hypothesis import strategies as st

from router import prompts
from router.core.blocks import root_key
from router.openai_api import FAMILIES, parse
from router.prompter import Prompter
from router.prompts import INERT, READERS, Reading
from router.tokenizer_config import TokenizerConfig
from workers import demo_model
from workers.chat_messages import Unrenderable, tool_dicts
from workers.chat_template import ChatTemplate
from workers.tokenizer import Tokenizer, ids_of

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES, GENERATE = "/v1/messages", "/v1/responses", "/inference/v1/generate"
HELLO: Any = [{"role": "user", "content": "hello"}]
TOOL: Any = {"type": "function", "function": {"name": "f"}}
TEMPLATE = ChatTemplate(demo_model.tokenizer_dir())
PROMPTER = Prompter(TokenizerConfig(source="demo", exclude_tools_when_tool_choice_none=False))
TOKENIZER = Tokenizer(demo_model.tokenizer_dir())


def read(path: str, prompter: Prompter | None = PROMPTER, adapter: str | None = None, **body: Any) -> Reading:
    return prompts.read(parse(FAMILIES[path], json_of({"model": "m", **body})), prompter, adapter, "none yet")


def text_of(reading: Reading) -> str:
    assert reading.prompt is not None
    assert reading.prompt.token_ids is not None, reading.reason
    assert reading.prompt.num_tokens == len(ids_of(reading.prompt.token_ids))
    return TOKENIZER.decode(ids_of(reading.prompt.token_ids), skip_special_tokens=False)


def tokens(text: str, special: bool = False) -> bytes:
    return array("I", TOKENIZER.encode(text, add_special_tokens=special)).tobytes()


# -- chats

USER = "<|im_start|>user\nhello<|im_end|>\n"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, f"<|begin|>{USER}<|im_start|>assistant\n"),
        ({"add_generation_prompt": False}, f"<|begin|>{USER}"),
        ({"add_special_tokens": True}, f"<|begin|><|begin|>{USER}<|im_start|>assistant\n"),
        (
            {"add_generation_prompt": False, "continue_final_message": True},
            "<|begin|><|im_start|>user\nhello",
        ),
        ({"tools": None, "tool_choice": None, "temperature": 0.5}, f"<|begin|>{USER}<|im_start|>assistant\n"),
    ],
)
def test_a_chat_is_read_as_its_template_writes_it(body: dict[str, Any], text: str) -> None:
    reading = read(CHAT, messages=HELLO, **body)
    assert text_of(reading) == text
    assert reading.sendable


@given(chat=CHATS, tools=st.one_of(st.none(), TOOLS), prompt=st.booleans())
def test_ids_are_those_that_the_simulated_engine_makes(chat: Any, tools: Any, prompt: bool) -> None:
    """Of any chat at all; where its template refuses, the router knows no ids."""
    try:
        shown = None if tools is None else tool_dicts(tools)
        text = TEMPLATE.render(chat, shown, add_generation_prompt=prompt)
        expected = tokens(text)
    except Unrenderable:
        expected = None
    reading = read(CHAT, messages=chat, tools=tools, add_generation_prompt=prompt)
    assert reading.prompt is not None
    assert reading.prompt.token_ids == expected
    assert reading.sendable is (expected is not None)


def test_variables_reach_the_template() -> None:
    prompter = Prompter(
        TokenizerConfig(
            source="demo",
            chat_template=TEMPLATES["macros"],
            default_chat_template_kwargs={"style": "plain", "enable_thinking": True},
        )
    )
    kwargs = {"enable_thinking": False, "style": None}
    assert "medium False plain" in text_of(read(CHAT, prompter, messages=HELLO, chat_template_kwargs=kwargs))
    assert "low True plain" in text_of(read(CHAT, prompter, messages=HELLO, reasoning_effort="low"))
    documents = [{"title": "t", "text": "x"}]
    assert json.dumps(documents) in text_of(read(CHAT, prompter, messages=HELLO, documents=documents))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"messages": True},
        {"add_generation_prompt": False},
        {"bos_token": "x"},
        {"tokenize": True},
        {"x": ["a", "list"]},
        {"x": {}},
        {"x": "long" * 100},
        {"x": 10**9},
        {"x": float("1e9")},
    ],
)
def test_what_a_client_sets_for_a_template_is_small_and_its_own(kwargs: dict[str, Any]) -> None:
    reading = read(CHAT, messages=HELLO, chat_template_kwargs=kwargs)
    assert reading.prompt is not None
    assert reading.prompt.token_ids is None
    assert "chat_template_kwargs" in reading.reason


@pytest.mark.parametrize(
    ("excludes", "shown", "sendable"), [(False, True, True), (True, False, True), (None, True, False)]
)
def test_tools_that_cannot_be_called(excludes: bool | None, shown: bool, sendable: bool) -> None:
    prompter = Prompter(TokenizerConfig(source="demo", exclude_tools_when_tool_choice_none=excludes))
    reading = read(CHAT, prompter, messages=HELLO, tools=[TOOL], tool_choice="none")
    assert ("<tools>" in text_of(reading)) is shown
    assert reading.sendable is sendable
    assert read(CHAT, prompter, messages=HELLO, tools=[TOOL], tool_choice="auto").sendable


@pytest.mark.parametrize("name", ["GptOssForCausalLM", "DeepseekV32ForCausalLM"])
def test_chats_that_vllm_renders_by_itself_are_left_to_it(name: str, tmp_path: Any) -> None:
    for path in demo_model.tokenizer_dir().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": [name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompter = Prompter(TokenizerConfig(source=str(tmp_path)))
    assert "code of its own" in read(CHAT, prompter, messages=HELLO).reason
    assert read(COMPLETION, prompter, prompt="hello").sendable


# -- completions and ids


@pytest.mark.parametrize(
    ("body", "ids", "sendable"),
    [
        ({"prompt": "hello"}, tokens("hello", special=True), True),
        ({"prompt": ["hello"]}, tokens("hello", special=True), True),
        ({"prompt": "hello", "add_special_tokens": False}, tokens("hello"), True),
        ({"prompt": [1, 2, 70000]}, array("I", [1, 2, 70000]).tobytes(), False),
        ({"prompt": [[1, 2]]}, array("I", [1, 2]).tobytes(), False),
        ({"prompt": "hello", "echo": True}, tokens("hello", special=True), False),
        ({"prompt": "hello", "echo": False, "suffix": None}, tokens("hello", special=True), True),
    ],
)
def test_completions(body: dict[str, Any], ids: bytes, sendable: bool) -> None:
    reading = read(COMPLETION, **body)
    assert reading.prompt is not None
    assert (reading.prompt.token_ids, reading.sendable) == (ids, sendable)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"prompt": ["a", "b"]}, "several prompts"),
        ({"prompt": [[1], [2]]}, "several prompts"),
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "empty"),
        ({}, "'prompt' is missing"),
        ({"prompt": 7}, "another type"),
        ({"prompt": [1.5]}, "cannot read"),
        ({"prompt": [-1]}, "cannot read"),
        ({"prompt": "a", "suffix": "b"}, "'suffix'"),
        ({"prompt": "a", "prompt_embeds": "b"}, "'prompt_embeds'"),
        ({"prompt": "a", "truncate_prompt_tokens": 3}, "'truncate_prompt_tokens'"),
        ({"prompt": "a", "add_special_tokens": "no"}, "'add_special_tokens' is of another type"),
    ],
)
def test_completions_that_are_known_by_their_text(body: dict[str, Any], reason: str) -> None:
    reading = read(COMPLETION, **body)
    assert reading.prompt is not None
    assert (reading.prompt.token_ids, reading.sendable) == (None, False)
    assert reason in reading.reason


def test_ids_that_the_client_has_made() -> None:
    reading = read(GENERATE, token_ids=[1, 2, 3], sampling_params={})
    assert reading.prompt is not None
    assert (reading.prompt.token_ids, reading.sendable) == (array("I", [1, 2, 3]).tobytes(), False)
    assert "not text alone" in read(GENERATE, token_ids=[1], features={"mm_hashes": {}}).reason


# -- messages and responses


def test_messages_are_chats_whose_ids_are_not_sent() -> None:
    reading = read(
        MESSAGES, system="S", messages=HELLO, max_tokens=1, tools=[{"name": "f", "input_schema": {}}]
    )
    assert text_of(reading).startswith("<|begin|><|im_start|>system\nS\n\nYou may call")
    assert not reading.sendable
    assert "disabled" in read(MESSAGES, messages=HELLO, thinking={"type": "disabled"}).reason
    assert (
        read(MESSAGES, messages=HELLO, thinking={"type": "adaptive"}).prompt
        == read(CHAT, messages=HELLO).prompt
    )


def test_tools_that_messages_may_not_call_are_shown() -> None:
    tools = [{"name": "f", "input_schema": {}}]
    reading = read(MESSAGES, messages=HELLO, tools=tools, tool_choice={"type": "none"})
    assert "<tools>" in text_of(reading)


def test_responses_begin_with_what_vllm_begins_them_with() -> None:
    reading = read(RESPONSES, input="hello", instructions="S")
    assert text_of(reading).startswith("<|begin|><|begin|><|im_start|>system\nS<|im_end|>\n" + USER)
    assert not reading.sendable


@pytest.mark.parametrize(
    "body",
    [
        {"previous_response_id": "resp_1"},
        {"prompt": {"id": "pmpt_1"}},
        {"truncation": "auto"},
        {"input": [{"type": "item_reference", "id": "x"}]},
    ],
)
def test_responses_of_which_the_router_has_not_all(body: dict[str, Any]) -> None:
    reading = read(RESPONSES, **{"input": "hello", **body})
    assert reading.prompt is not None
    assert reading.prompt.token_ids is None


@pytest.mark.parametrize("path", ["/v1/embeddings", "/tokenize", "/v1/messages/count_tokens", "/v1/rerank"])
def test_families_without_a_prompt(path: str) -> None:
    assert read(path, input="hello").prompt is None


# -- what may be sent


@given(
    st.sampled_from([(CHAT, {"messages": HELLO}), (COMPLETION, {"prompt": "hello"})]),
    st.text(st.characters(codec="utf-8"), min_size=1),
    st.one_of(st.none(), st.booleans(), st.integers(-9, 9), TEXTS, st.just([]), st.just({"a": 1})),
)
def test_no_ids_are_sent_beside_a_member_that_is_not_known(family: Any, name: str, value: Any) -> None:
    path, body = family
    known = {*(READERS[path].harmless or ()), *prompts.IDLE, "kv_transfer_params"}
    if name in known:
        return
    reading = read(path, **body, **{name: value})
    assert not reading.sendable
    assert reading.reason.startswith(f"what {name!r} does"[: prompts.MAX_REASON_CHARS])


@pytest.mark.parametrize(("path", "body"), [(CHAT, {"messages": HELLO}), (COMPLETION, {"prompt": "hello"})])
@pytest.mark.parametrize("name", sorted(INERT - {"model", "stream", "stream_options", "return_token_ids"}))
def test_ids_are_sent_beside_members_that_leave_the_prompt_alone(path: str, body: Any, name: str) -> None:
    plain = read(path, **body)
    with_it = read(path, **body, **{name: "x"})
    assert with_it.sendable
    assert with_it.prompt is not None
    assert plain.prompt is not None
    assert with_it.prompt.token_ids == plain.prompt.token_ids


@pytest.mark.parametrize(
    ("body", "known"),
    [
        ({"echo": True}, True),
        ({"return_prompt_text": True}, True),
        ({"vllm_xargs": {"a": 1}}, True),
        ({"use_beam_search": True}, True),
        ({"chat_template": "{{ messages }}"}, False),
        ({"truncate_prompt_tokens": 5}, False),
        ({"mm_processor_kwargs": {"a": 1}}, False),
        ({"media_io_kwargs": {}}, False),
        ({"documents": ["x"]}, False),
        ({"reasoning_effort": 3}, False),
        ({"messages": []}, False),
        ({"messages": "hello"}, False),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            False,
        ),
        ({"messages": [[[[]]]]}, False),
        ({"tools": [{"type": "custom"}]}, False),
        ({"tools": "f"}, False),
        ({"continue_final_message": True}, False),
    ],
)
def test_chats_that_are_sent_as_text(body: dict[str, Any], known: bool) -> None:
    reading = read(CHAT, **{"messages": HELLO, **body})
    assert reading.prompt is not None
    assert (reading.prompt.token_ids is not None) is known
    assert not reading.sendable
    assert reading.reason


def test_what_is_longer_than_any_context_is_not_read() -> None:
    reading = read(COMPLETION, prompt="a " * prompts.MAX_BODY_BYTES)
    assert "longer than" in reading.reason
    assert reading.prompt is not None
    assert reading.prompt.num_tokens > 1_000_000


def test_reasons_tell_nothing_of_what_was_said() -> None:
    refusing = Prompter(
        TokenizerConfig(source="demo", chat_template="{{ raise_exception(messages[0].content) }}")
    )
    reading = read(CHAT, refusing, messages=[{"role": "user", "content": "my secret"}])
    assert reading.reason == "the chat template fails: TemplateError"
    assert len(read(CHAT, messages=HELLO, **{"x" * 10_000: 1}).reason) <= prompts.MAX_REASON_CHARS


def test_a_template_that_recurses_without_end_costs_a_request_nothing() -> None:
    endless = Prompter(
        TokenizerConfig(source="demo", chat_template="{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")
    )
    reading = read(CHAT, endless, messages=HELLO)
    assert reading.reason == "the chat template fails: RecursionError"


# -- what keys stand on


def test_salt_and_adapter_are_part_of_the_key() -> None:
    def root(adapter: str | None = None, **body: Any) -> int:
        reading = read(CHAT, adapter=adapter, messages=HELLO, **body)
        assert reading.prompt is not None
        return reading.prompt.root

    assert root() == root_key() == 0
    assert root(cache_salt="s") == root_key(None, "s")
    assert root("sql", cache_salt="s") == root_key("sql", "s")
    assert root(cache_salt=["no", "salt"]) == 0


# -- without a tokenizer


def text_key(path: str, **body: Any) -> bytes:
    reading = read(path, None, **body)
    assert reading.prompt is not None
    assert (reading.prompt.token_ids, reading.sendable, reading.reason) == (None, False, "none yet")
    return reading.prompt.text


@given(CHATS, CHATS, st.one_of(st.none(), TOOLS))
def test_the_text_of_a_chat_begins_that_of_its_next_turn(chat: Any, more: Any, tools: Any) -> None:
    given = {} if tools is None else {"tools": tools}
    text = text_key(CHAT, messages=chat, **given)
    assert text_key(CHAT, messages=chat + more, **given).startswith(text)
    assert text_key(RESPONSES, input=chat + more).startswith(text_key(RESPONSES, input=chat))
    turn = text_key(MESSAGES, system="S", messages=chat)
    assert text_key(MESSAGES, system="S", messages=chat + more).startswith(turn)


@given(TEXTS, TEXTS)
def test_the_text_of_a_prompt_begins_that_of_a_longer_one(begin: str, more: str) -> None:
    assert text_key(COMPLETION, prompt=begin + more).startswith(text_key(COMPLETION, prompt=begin))


def test_texts_of_other_prompts_part_where_they_do() -> None:
    assert not text_key(CHAT, messages=HELLO, tools=[TOOL]).startswith(text_key(CHAT, messages=HELLO))
    assert text_key(MESSAGES, system="S", messages=HELLO) != text_key(MESSAGES, system="T", messages=HELLO)


def test_the_number_of_tokens_is_estimated() -> None:
    text = "The herd moves as one. " * 100
    reading = read(COMPLETION, None, prompt=text)
    assert reading.prompt is not None
    assert reading.prompt.num_tokens == pytest.approx(len(text) / 4, rel=0.01)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000}}
    reading = read(CHAT, None, messages=[{"role": "user", "content": [image]}])
    assert reading.prompt is not None
    assert reading.prompt.num_tokens == 0  # not a token for every four letters of an image
