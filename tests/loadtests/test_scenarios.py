"""What simulated users ask, scenario by scenario."""

from __future__ import annotations

import itertools
import json
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.arrivals import CONSTANT, moments
from loadtests.scenarios import SCENARIOS
from loadtests.scenarios.agent import TOOLS, Agent
from loadtests.scenarios.batch import Batch
from loadtests.scenarios.chat import Chat
from loadtests.scenarios.flash_crowd import FlashCrowd
from loadtests.scenarios.rag import Rag, zipf
from loadtests.scenarios.replay import Replay, prompt
from loadtests.scenarios.session import Ask, Fork, Message, Scenario, Session
from loadtests.scenarios.tenants import Tenants
from loadtests.trace import Arrival, write
from loadtests.words import WORDS, words
from workers import demo_model
from workers.chat_template import ChatTemplate
from workers.simulated.requests import ChatRequest
from workers.tokenizer import Tokenizer

# Where a scenario needs no more than its defaults.
ALONE = [scenario for scenario in SCENARIOS if scenario is not Replay]


def hold(session: Session) -> list[Ask]:
    """All that a session asks, its branches where they fork off; each answer is another."""
    asked: list[Ask] = []
    try:
        step = next(session)
        while True:
            if isinstance(step, Fork):
                for branch in step.branches:
                    asked += hold(branch)
                step = session.send(None)
            else:
                asked.append(step)
                step = session.send(f"answer {len(asked)}")
    except StopIteration:
        return asked


def text(ask: Ask) -> str:
    return "".join(message["content"] for message in ask.messages)


def begins_with(messages: Sequence[Message], beginning: Sequence[Message]) -> bool:
    return list(messages[: len(beginning)]) == list(beginning)


@pytest.mark.parametrize("scenario", ALONE, ids=lambda scenario: scenario.name)
def test_a_seed_decides_all_and_tells_one_session_from_another(scenario):
    made = scenario()
    assert hold(made.session("a")) == hold(made.session("a"))
    last = [text(hold(made.session(seed))[-1]) for seed in "abcdefgh"]
    assert len(set(last)) == len(last)


@pytest.mark.parametrize("scenario", ALONE, ids=lambda scenario: scenario.name)
def test_engines_take_what_is_asked_and_the_demo_model_has_room_for_it(scenario):
    root = demo_model.tokenizer_dir()
    template, tokenizer = ChatTemplate(root), Tokenizer(root)
    for ask in itertools.chain.from_iterable(hold(scenario().session(str(n))) for n in range(6)):
        body = {"messages": list(ask.messages), **({"tools": list(ask.tools)} if ask.tools else {})}
        ChatRequest.model_validate({"model": "m", "max_tokens": ask.output_tokens, **body})
        tokens = len(tokenizer.encode(template.render(**body), add_special_tokens=False))
        assert tokens + ask.output_tokens <= demo_model.CONTEXT


def test_a_chat_carries_all_that_was_said():
    asked = hold(Chat(turns=3, system_tokens=10, prompt_tokens=5).session("a"))
    assert [len(ask.messages) for ask in asked] == [2, 4, 6]
    for before, after in itertools.pairwise(asked):
        assert begins_with(after.messages, before.messages)
    roles = [message["role"] for message in asked[-1].messages]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [len(message["content"].split()) for message in asked[0].messages] == [10, 5]
    assert asked[-1].messages[2]["content"] == "answer 1"


def test_chats_share_the_system_prompt_alone():
    one, other = (hold(Chat(turns=2).session(seed))[-1].messages for seed in "ab")
    assert one[0] == other[0]
    assert len({message["content"] for message in (*one[1::2], *other[1::2])}) == 4


def test_a_chat_may_have_no_system_prompt():
    assert hold(Chat(turns=1, system_tokens=0).session("a"))[0].messages[0]["role"] == "user"


def test_an_agents_turns_are_calls_and_their_results():
    asked = hold(Agent(forks=0).session("a"))
    assert 10 <= len(asked) <= 30
    for before, after in itertools.pairwise(asked):
        assert begins_with(after.messages, before.messages)
        said, result = after.messages[len(before.messages) :]
        (call,) = said["tool_calls"]
        assert (said["role"], result["role"]) == ("assistant", "tool")
        assert result["tool_call_id"] == call["id"]
        (tool,) = (tool for tool in TOOLS if tool["function"]["name"] == call["function"]["name"])
        arguments = json.loads(call["function"]["arguments"])
        assert list(arguments) == tool["function"]["parameters"]["required"]
    calls = [m["tool_calls"][0]["id"] for m in asked[-1].messages if "tool_calls" in m]
    assert len(set(calls)) == len(calls)


def test_an_agents_branches_share_its_history():
    session = Agent(forks=3).session("a")
    before: Ask | None = None
    step = next(session)
    while isinstance(step, Ask):
        before, step = step, session.send("so")
    assert before is not None
    branches = [hold(branch) for branch in step.branches]
    assert len(branches) == 3
    for branch in branches:
        assert begins_with(branch[0].messages, before.messages)
    assert len({text(branch[0]) for branch in branches}) == 3
    # The session goes on with its own history, not that of a branch.
    after = session.send(None)
    assert begins_with(branches[0][0].messages, after.messages)
    assert len(after.messages) + 1 == len(branches[0][0].messages)


def test_agents_have_instructions_and_tools_in_common():
    one, other = (hold(Agent().session(seed))[0] for seed in "ab")
    assert one.messages[0] == other.messages[0]
    assert one.tools == other.tools == TOOLS
    assert one.messages[1] != other.messages[1]


def test_some_documents_are_asked_about_more_than_others():
    asked = [hold(Rag(documents=50, zipf=1.0).session(str(n)))[0] for n in range(1500)]
    counts = [count for _, count in Counter(ask.messages[0]["content"] for ask in asked).most_common()]
    assert len(counts) == 50
    # By Zipf's law the first comes 4.5 times in 20, twice as often as the second.
    assert 0.19 < counts[0] / 1500 < 0.26
    assert 1.6 < counts[0] / counts[1] < 2.5


@given(st.floats(0, 1), st.integers(1, 40), st.floats(0, 3))
def test_zipf_always_finds_one_and_popular_ones_first(chance, count, exponent):
    found = zipf(chance, count, exponent)
    assert 0 <= found < count
    assert found <= zipf(1.0, count, exponent) == count - 1
    assert zipf(0.0, count, exponent) == 0


def test_a_batch_fills_in_one_template_and_waits_for_whole_answers():
    one, other = (hold(Batch().session(seed))[0] for seed in "ab")
    assert one.messages[0] == other.messages[0]
    assert one.messages[1] != other.messages[1]
    assert not one.stream
    assert one.priority == 10


def test_tenants_ask_each_in_their_own_way():
    asked = [hold(Tenants().session(str(n)))[0] for n in range(1000)]
    shares = Counter(ask.tenant for ask in asked)
    assert 0.55 < shares["noisy"] / 1000 < 0.65 and 0.15 < shares["quiet"] / 1000 < 0.25
    assert {ask.tenant: ask.priority for ask in asked} == {"quiet": None, "noisy": None, "nightly": 10}
    # Each has a system prompt of its own.
    assert len({(ask.tenant, ask.messages[0]["content"]) for ask in asked}) == 3
    louder = Counter(hold(Tenants(noise=9).session(str(n)))[0].tenant for n in range(1000))
    assert louder["quiet"] < shares["quiet"] / 2


def test_a_crowd_comes_in_the_middle_third_and_asks_about_one_thing():
    crowd = FlashCrowd()
    came = list(itertools.takewhile(lambda at: at < 90, moments(CONSTANT, crowd.rates(10, 90), "a")))
    thirds = Counter(int(at // 30) for at in came)
    assert thirds[1] == pytest.approx(3 * thirds[0], rel=0.01)
    assert thirds[0] == pytest.approx(thirds[2], abs=2)
    asked = [hold(crowd.session(str(n)))[0].messages[0]["content"] for n in range(500)]
    assert 0.75 < Counter(asked).most_common(1)[0][1] / 500 < 0.85


def replay(tmp_path: Path, requests: Sequence[Arrival], **settings: int) -> Iterator[tuple[float, Ask]]:
    """What of a trace is asked, and when, if a session could begin every second."""
    write(tmp_path / "trace.jsonl", requests)
    starts = Replay(trace=str(tmp_path / "trace.jsonl"), **settings).starts(itertools.count(), "seed")
    return ((moment, hold(session)[0]) for moment, session in starts)


def test_a_trace_is_replayed_in_its_order_and_ends(tmp_path):
    requests = [Arrival(0.25, 1024, 64, [1, 2]), Arrival(0.5, 1500, 8, [1, 2, 3]), Arrival(0.75, 512, 9, [4])]
    replayed = list(replay(tmp_path, requests, shrink=4))
    assert [moment for moment, _ in replayed] == [0, 1, 2]
    prompts = [text(ask).split() for _, ask in replayed]
    assert [len(words) for words in prompts] == [256, 375, 128]
    assert [ask.output_tokens for _, ask in replayed] == [16, 2, 2]
    assert prompts[1][:256] == prompts[0]
    assert prompts[2][:10] != prompts[0][:10]


blocks = st.lists(st.integers(0, 3), min_size=1, max_size=4)


@given(blocks, blocks)
def test_prompts_of_a_trace_share_what_their_ids_share(one, other):
    texts = [prompt(Arrival(0, 512 * len(ids), 1, ids), 32).split() for ids in (one, other)]
    common = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))))
    shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))
    # Two blocks that differ may begin with the same few words.
    assert 16 * shared <= common < 16 * shared + 16 or one == other


@pytest.mark.parametrize(
    ("scenario", "wrong", "message"),
    [
        (Chat, {"turns": 0}, "turns must be at least 1, not 0"),
        (Chat, {"system_tokens": -1}, "system_tokens must be at least 0, not -1"),
        (FlashCrowd, {"surge": 0.5}, "surge must be at least 1, not 0.5"),
        (Tenants, {"keys": "loud=k"}, "no tenant of this scenario: loud"),
        (Replay, {}, "--trace FILE"),
        (Replay, {"trace": "x", "shrink": 513}, "shrink must be at most 512"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(scenario, wrong, message):
    with pytest.raises(ValueError, match=message):
        scenario(**wrong)


def test_a_scenario_takes_its_own_settings_from_a_command_line():
    # As the web page gives them: what had no value comes as text, or empty.
    options = Namespace(turns="3", system_tokens=None, think_time="", documents=7)
    assert Chat.of(options) == Chat(turns=3)
    assert Rag.of(options) == Rag(documents=7)


def test_every_scenario_says_how_much_and_how_good():
    assert [scenario.name for scenario in SCENARIOS] == [
        "chat", "agent", "rag", "batch", "tenants", "flash_crowd", "trace",
    ]  # fmt: skip
    for scenario in SCENARIOS:
        assert issubclass(scenario, Scenario)
        assert scenario.load.duration >= 60
        assert scenario.slo.failures == 0


def test_keys_of_tenants_are_read():
    assert Tenants(keys="quiet=a=b,noisy=c").key_of == {"quiet": "a=b", "noisy": "c"}
    assert Tenants().key_of == {}


def test_words_are_as_many_as_asked_for_and_of_many_kinds():
    made = words(2000, "seed").split()
    assert len(made) == 2000
    assert set(made) == set(WORDS)
    assert len(set(WORDS)) == len(WORDS)
