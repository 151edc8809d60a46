"""Text as it grows: whole characters, stop strings, and nothing lost or said twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.simulated.text import TextStream

PIECES = ["ab", "c", "abc", "", "d", "bca"]


def stream(*, stop: list[str] | None = None, **options: object) -> TextStream:
    return TextStream(PIECES.__getitem__, stop=stop or [], **options)  # type: ignore[arg-type]


def feed(text: TextStream, tokens: list[int]) -> tuple[list[str], str | None]:
    """The deltas up to the end or the stop string."""
    deltas = []
    for number, token in enumerate(tokens):
        stopped = text.push(token)
        deltas.append(text.take(finished=stopped is not None or number == len(tokens) - 1))
        if stopped is not None:
            return deltas, stopped
    return deltas, None


def test_holds_back_what_may_become_a_stop_string() -> None:
    assert feed(stream(stop=["xyz"]), [0, 1, 2, 4]) == (["", "a", "bca", "bcd"], None)


def test_cuts_at_the_stop_string() -> None:
    assert feed(stream(stop=["bd"]), [0, 1, 0, 4]) == (["a", "b", "ca", ""], "bd")


def test_includes_the_stop_string_if_told_to() -> None:
    assert feed(stream(stop=["bd"], include_stop=True), [0, 1, 0, 4]) == (["ab", "c", "ab", "d"], "bd")


def test_ignores_stop_strings_before_min_tokens() -> None:
    deltas, stopped = feed(stream(stop=["c"], min_tokens=2), [1, 1, 0, 1])
    assert ("".join(deltas), stopped) == ("ccab", "c")


def test_a_token_that_ends_the_text_is_not_part_of_it() -> None:
    text = stream()
    text.push(0)
    text.push(4, ends=True)
    assert text.take(finished=True) == "ab"


@given(
    st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=30),
    st.lists(st.text("abcd", min_size=1, max_size=4), max_size=3),
)
def test_deltas_are_the_text_before_the_first_stop(tokens: list[int], stops: list[str]) -> None:
    deltas, stopped = feed(stream(stop=stops), tokens)
    whole = "".join(PIECES[token] for token in tokens)
    if stopped is None:
        assert "".join(deltas) == whole
        assert not any(stop in whole for stop in stops)
    else:
        said = "".join(deltas)
        assert whole.startswith(said + stopped)
        complete = "".join(PIECES[token] for token in tokens[: len(deltas) - 1])
        assert not any(stop in complete for stop in stops)


@pytest.mark.parametrize("stop", ["a", "ab", "bcab"])
def test_nothing_of_a_stop_string_is_ever_sent(stop: str) -> None:
    deltas, stopped = feed(stream(stop=[stop]), [4, 0, 1, 0, 4])
    assert stopped == stop
    assert "".join(deltas) == "dabcabd"[: "dabcabd".index(stop)]
