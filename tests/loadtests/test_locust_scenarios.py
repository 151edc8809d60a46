"""The chats that simulated users hold."""

from __future__ import annotations

import itertools

import pytest

from loadtests.scenarios import WORDS, Chat, Shape, words


def hold(chat: Chat) -> list[list[dict[str, str]]]:
    """The whole conversation: the messages of each request."""
    requests = []
    while not chat.over:
        requests.append([dict(message) for message in chat.ask()])
        chat.answered(f"answer {chat.turn}")
    return requests


def test_each_request_carries_all_before_it():
    requests = hold(Chat(Shape(turns=3, system=10, prompt=5), "a"))
    assert [len(request) for request in requests] == [2, 4, 6]
    for before, after in itertools.pairwise(requests):
        assert after[: len(before)] == before
    roles = [message["role"] for message in requests[-1]]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [len(message["content"].split()) for message in requests[0]] == [10, 5]


def test_a_seed_tells_one_chat_from_all_others():
    shape = Shape(turns=2)
    assert hold(Chat(shape, "a")) == hold(Chat(shape, "a"))
    questions = [message["content"] for seed in "ab" for message in hold(Chat(shape, seed))[-1]]
    system, *asked = (text for text in questions if not text.startswith("answer"))
    assert asked.count(system) == 1  # that of the other chat: what all chats share
    asked.remove(system)
    assert len(set(asked)) == 4


def test_a_chat_may_have_no_system_prompt():
    assert hold(Chat(Shape(turns=1, system=0), "a"))[0][0]["role"] == "user"


def test_words_are_as_many_as_asked_for_and_of_many_kinds():
    text = words(2000, "seed").split()
    assert len(text) == 2000
    assert set(text) == set(WORDS)
    assert len(set(WORDS)) == len(WORDS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"turns": 0}, "turns must be at least 1, not 0"),
        ({"system": -1}, "system must be at least 0, not -1"),
    ],
)
def test_a_shape_that_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Shape(**wrong)
