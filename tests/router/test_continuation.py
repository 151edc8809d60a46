"""Where a broken stream goes on: whatever was generated and wherever it is cut, the client reads the same."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.continuation import Seam, Stops, seam
from workers import demo_model
from workers.simulated.text import TextStream
from workers.tokenizer import Tokenizer

WORDS = ["a", "ab", "b\n", "\n\n", "c d", "日本語", "🐄🐑", "é", " the", "END", "EN", "D."]


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(demo_model.tokenizer_dir())


def said(prompt: list[int], ids: list[int], stops: Stops) -> tuple[str, int | None]:
    """What an engine has sent after these output tokens, and which of them ended the text."""
    decode = tokenizer().stream_after(prompt)
    text, sent = TextStream(decode, stop=stops.strings, include_stop=stops.shown), ""
    for place, token in enumerate(ids):
        stopped = text.push(token) is not None
        sent += text.take(finished=stopped)
        if stopped:
            return sent, place
    return sent, None


def finished(prompt: list[int], ids: list[int], stops: Stops) -> str:
    """All that it says of these tokens, the last one being the last."""
    decode = tokenizer().stream_after(prompt)
    text = TextStream(decode, stop=stops.strings, include_stop=stops.shown)
    for token in ids:
        if text.push(token) is not None:
            break
    return text.take(finished=True)


def decode(ids):
    return tokenizer().decode(list(ids))


outputs = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map("".join)
stop_strings = st.lists(
    st.sampled_from(["\n\n", "END", "ab", "b\n\n", "日本", "🐄", "d a"]), max_size=3, unique=True
)


@settings(max_examples=400, deadline=None)
@given(outputs, stop_strings, st.booleans(), st.data())
def test_the_client_reads_what_it_would_have_read(output, strings, shown, data):
    stops = Stops(tuple(strings), shown)
    prompt = tokenizer().encode("Say it:", add_special_tokens=False)
    ids = tokenizer().encode(output, add_special_tokens=False)
    whole = finished(prompt, ids, stops)
    cut = data.draw(st.integers(0, len(ids)))
    sent, stopped = said(prompt, ids[:cut], stops)
    if stopped is not None:
        return  # it had ended before it broke
    found = seam(ids[:cut], sent, decode, stops, most=cut)
    rest = finished(prompt + ids[: found.kept], ids[found.kept :], stops)
    assert rest.startswith(found.again) or cut == len(ids)
    assert sent + found.ahead + rest[len(found.again) :] == whole


@pytest.mark.parametrize(
    ("ids", "sent", "stops", "most", "expected"),
    [
        ("abc", "abc", Stops(), 3, Seam(3)),
        ("abc", "abc", Stops(), 2, Seam(2, again="c")),
        ("abc", "", Stops(), 3, Seam(0)),  # a parser has it: nothing that was generated is told
        ("abc", "b", Stops(), 3, Seam(0, again="b")),
        ("abcd", "abc", Stops(("xy",)), 4, Seam(4, ahead="d")),
        ("abcx", "abc", Stops(("xy",)), 4, Seam(3)),  # the stop string may have begun
        ("abxy", "ab", Stops(("xyz", "q")), 4, Seam(2)),
        ("abxyz", "ab", Stops(("xyz",)), 5, Seam(2)),  # it has been said, and its end was lost
        ("abx", "abx", Stops(("xy",), shown=True), 3, Seam(2, again="x")),
        ("ab\ufffd", "ab", Stops(), 3, Seam(2)),  # the first bytes of a character
        ("", "", Stops(), 0, Seam(0)),
    ],
)
def test_where_it_goes_on(ids, sent, stops, most, expected):
    assert seam(list(ids), sent, "".join, stops, most) == expected


def test_only_the_end_is_looked_through():
    looked = []

    def decode(ids):
        looked.append(len(ids))
        return "other"

    assert seam(list(range(10_000)), "text", decode, Stops(), 10_000) == Seam(0, again="text")
    assert len(looked) < 50
