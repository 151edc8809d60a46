"""Long chats are what their sizes and seeds say."""

import json

import pytest

from loadtests import prompts
from loadtests.words import WORDS


@pytest.mark.parametrize("size", [0, 1, 40, 8192, 131_072])
def test_a_text_has_its_size_and_only_the_seed_decides_it(size: int) -> None:
    text = prompts.text(size, "a")
    assert len(text) == size
    prompts.text.cache_clear()
    assert prompts.text(size, "a") == text
    assert size < 2 or prompts.text(size, "b") != text


def test_three_words_in_ten_are_new() -> None:
    words = prompts.text(32_768, "a").split()[:-1]  # the last may be cut
    everyday = set(WORDS)
    assert sum(word not in everyday for word in words) / len(words) == pytest.approx(0.3, abs=0.01)


def test_chats_of_a_group_share_all_but_their_last_message() -> None:
    one, other = prompts.chat(10_000, "one", "group"), prompts.chat(10_000, "other", "group")
    assert [message["role"] for message in one][:3] == ["system", "user", "assistant"]
    assert len(one) == 10 and one[-1]["role"] == "user"
    assert one[:-1] == other[:-1] and one[-1] != other[-1]
    assert {len(message["content"]) for message in one} == {1000}
    assert prompts.chat(10_000, "one")[0] != one[0]


def test_a_body_is_a_chat_request() -> None:
    asked = json.loads(prompts.body("m", prompts.question("Rules.", "Why?"), 3, stream=True))
    assert asked["model"] == "m" and asked["max_tokens"] == 3 and asked["stream"] is True
    assert [message["content"] for message in asked["messages"]] == ["Rules.", "Why?"]
    assert "stream" not in json.loads(prompts.body("m", [], 3, stream=False))
