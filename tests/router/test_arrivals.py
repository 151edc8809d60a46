"""What is kept of live traffic for a recorder: lengths and keys, for as long as somebody asks."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.arrivals import BLOCK_TOKENS, LEASE_S, MOST, Arrivals, block_keys
from router.core.blocks import Prompt, root_key
from router.http.sse import Usage

lengths = st.integers(1, 3 * BLOCK_TOKENS)


def prompt_of(shared, own, which):
    """A prompt that begins with `shared` tokens and has `own` of its own."""
    ids = [*range(shared), *[10**6 + which] * own]
    return Prompt(len(ids), array("I", ids).tobytes()), len(ids)


@given(lengths, lengths)
def test_prompts_share_the_keys_of_the_blocks_that_they_share(shared, own):
    one, other = (block_keys(*prompt_of(shared, own, which)) for which in (1, 2))
    assert len(one) == len(other) == -(-(shared + own) // BLOCK_TOKENS)
    full = shared // BLOCK_TOKENS
    assert one[:full] == other[:full]
    assert not set(one[full:]) & set(other[full:])
    assert one == block_keys(*prompt_of(shared, own, 1))


def test_prompts_of_two_adapters_share_nothing():
    prompt, length = prompt_of(2000, 1, 0)
    prompt.root = root_key("lora")
    assert not set(block_keys(prompt, length)) & set(block_keys(*prompt_of(2000, 1, 0)))


@pytest.mark.parametrize(
    ("prompt", "input_length", "known"),
    [
        (None, 1025, [False, False, False]),
        (Prompt(600, text=b"x" * 2400), 600, [True, True]),
        (Prompt(600, text=b"x" * 2400), 1600, [True, True, False, False]),  # fewer bytes a token
        (Prompt(600, text=b"x" * 2400), 400, [True]),  # more
    ],
)
def test_there_is_one_for_each_begun_block_that_was_computed(prompt, input_length, known):
    assert [key is not None for key in block_keys(prompt, input_length)] == known


def usage(number):
    return Usage(number, 1)


def lengths_of(batch):
    return [arrival.input_length for arrival in batch.arrivals]


def test_what_came_since_is_told_once():
    arrivals = Arrivals()
    first = arrivals.after(None, now=0.0)
    for number in (1, 2):
        arrivals.note(0.0, usage(number), None, None)
    second = arrivals.after(first.next, now=1.0)
    assert lengths_of(second) == [1, 2]
    arrivals.note(0.0, usage(3), None, None)
    assert lengths_of(arrivals.after(second.next, now=2.0)) == [3]
    assert lengths_of(arrivals.after(first.next, now=2.0)) == [1, 2, 3]  # another recorder


def test_a_recorder_that_knew_the_process_before_gets_all():
    arrivals = Arrivals()
    arrivals.after(None, now=0.0)
    arrivals.note(0.0, usage(1), None, None)
    assert lengths_of(arrivals.after(1000, now=0.0)) == [1]


def test_it_is_kept_as_long_as_somebody_asks():
    arrivals = Arrivals()
    assert not arrivals.wanted(0.0)
    arrivals.after(None, now=0.0)
    assert arrivals.wanted(LEASE_S - 1)
    assert not arrivals.wanted(LEASE_S + 1)
    arrivals.note(0.0, usage(1), None, None)
    assert lengths_of(arrivals.after(0, now=LEASE_S + 1)) == []


def test_no_more_are_kept_than_a_recorder_can_ask_for(monkeypatch):
    monkeypatch.setattr("router.arrivals.MOST", 3)
    arrivals = Arrivals()
    arrivals.after(None, now=0.0)
    for number in range(1, 6):
        arrivals.note(0.0, usage(number), None, None)
    assert lengths_of(arrivals.after(0, now=0.0)) == [3, 4, 5]
    assert lengths_of(arrivals.after(4, now=0.0)) == [5]
    assert MOST > 10_000


def test_only_what_can_be_replayed_is_kept():
    arrivals = Arrivals()
    arrivals.after(None, now=0.0)
    arrivals.note(0.0, Usage(5, 0), None, None)  # embeddings have no output
    assert arrivals.after(0, now=0.0).arrivals == []
