"""What the simulated model says is a function of all tokens before, and its text is whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers import demo_model
from workers.simulated.grammar import Arguments, CallOpened, ToolCall, ToolReader
from workers.simulated.kv_cache import block_keys
from workers.simulated.language import Language, TokenSequence
from workers.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def language() -> Language:
    return Language(Tokenizer(demo_model.tokenizer_dir()))


def say(language: Language, prompt: list[int], count: int, **options: object) -> list[int]:
    sequence = TokenSequence(language, prompt, block_size=4, **options)  # type: ignore[arg-type]
    for _ in range(count):
        if sequence.extend():
            break
    return sequence.output


PROMPT = st.lists(st.integers(3, 500), min_size=1, max_size=20)


@settings(max_examples=60)
@given(PROMPT, st.integers(0, 39))
def test_the_same_tokens_follow_whether_they_were_prompt_or_output(
    language: Language, prompt: list[int], cut: int
) -> None:
    whole = say(language, prompt, 40, ignore_eos=True)
    assert say(language, prompt + whole[:cut], 40 - cut, ignore_eos=True) == whole[cut:]


@settings(max_examples=60)
@given(st.text(st.characters(codec="ascii"), min_size=1))
def test_deltas_concatenate_to_the_decoded_text(language: Language, text_before: str) -> None:
    prompt = language.tokenizer.encode(text_before, add_special_tokens=False)
    output = say(language, prompt, 60, ignore_eos=True)
    decode = language.tokenizer.stream_after(prompt)
    text = "".join(decode(token) for token in output)
    whole = language.tokenizer.decode(output)
    assert whole.startswith(text)
    assert set(whole[len(text) :]) <= {"\ufffd"}  # the end may be inside a character


@settings(max_examples=40)
@given(PROMPT, st.integers(0, 30))
def test_keys_of_prompt_and_output_are_one_chain(language: Language, prompt: list[int], count: int) -> None:
    sequence = TokenSequence(language, prompt, block_size=4, ignore_eos=True)
    for _ in range(count):
        sequence.extend()
    tokens = prompt + sequence.output
    expected = block_keys(tokens, 4)
    assert [sequence.key(block) for block in range(len(tokens) // 4)] == expected


def test_ends_are_rare_and_wait_for_min_tokens(language: Language) -> None:
    lengths = [len(say(language, [n], 5000)) for n in range(3, 63)]
    assert 250 < sum(lengths) / len(lengths) < 1000
    assert all(len(say(language, [n], 800, min_tokens=700)) >= 700 for n in range(3, 13))


def test_a_stop_token_ends_the_sequence(language: Language) -> None:
    output = say(language, [9], 20, ignore_eos=True)
    sequence = TokenSequence(language, [9], block_size=4, stop_token_ids=frozenset({output[6]}))
    while not sequence.extend():
        pass
    assert sequence.output == output[: output.index(output[6]) + 1]
    assert sequence.stop_token == output[6]


def test_a_script_is_said_word_for_word_and_then_ends(language: Language) -> None:
    assert say(language, [1, 2], 99, script=[5, 6, 7]) == [5, 6, 7, language.eos_token_id]


def test_choices_and_seeds_differ(language: Language) -> None:
    other = Language(language.tokenizer, seed=1)
    texts = [say(language, [9], 20), say(language, [9], 20, choice=1), say(other, [9], 20)]
    assert len({tuple(text) for text in texts}) >= 2
    assert texts[0] != texts[1]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_a_tool_call_reads_the_same_however_it_is_cut(cuts: list[int]) -> None:
    call = ToolCall("weather", '{"town": "Höxter"}')
    reader, parts, start = ToolReader(call), [], 0
    for cut in [*cuts, len(call.text)]:
        parts += reader.read(call.text[start : start + cut])
        start += cut
    opened = [part for part in parts if isinstance(part, CallOpened)]
    arguments = "".join(part.text for part in parts if isinstance(part, Arguments))
    assert [part.name for part in opened] == ["weather"]
    assert isinstance(parts[0], CallOpened)
    assert arguments == call.arguments
    assert reader.whole_call == (opened[0].id, call)
