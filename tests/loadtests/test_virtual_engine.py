"""Engines in virtual time: what they do is what the same core does step by step."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.timeline import Timeline
from loadtests.virtual_engine import Report, VirtualEngine
from workers.simulated.core import Engine, EngineConfig, Finish, Step
from workers.simulated.step_time import StepTime

TIME = StepTime(0.31, 0.017, 0.0013, 0.0007, 0.00011)


@dataclass
class Lengths:
    """A sequence known by its length and its name alone."""

    num_prompt_tokens: int
    prefix: str

    def key(self, block: int) -> object:
        return (self.prefix, block)

    def extend(self) -> bool:
        return False


@dataclass(frozen=True)
class Coming:
    """A request: when it comes, its tokens, what it begins with."""

    at: float
    prompt: int
    output: int
    prefix: str

    def content(self) -> Lengths:
        return Lengths(self.prompt, self.prefix)


Moments = dict[tuple[str, str], float]


def note(moments: Moments, step: Step, now: float) -> None:
    for sequence, finish in step.outputs:
        moments.setdefault((sequence.id, "first"), now)
        if finish is Finish.LENGTH:
            moments[sequence.id, "last"] = now


def step_by_step(config: EngineConfig, coming: list[Coming]) -> Moments:
    """When first and last tokens come of an engine that does one step after the other."""
    core, moments, now = Engine(config), Moments(), -1.0
    waiting = sorted(enumerate(coming), key=lambda pair: pair[1].at)
    while waiting or core.has_work:
        idle = not core.has_work and waiting[0][1].at > now
        if idle:
            now = waiting[0][1].at
        while waiting and waiting[0][1].at <= now:
            number, request = waiting.pop(0)
            core.add(str(number), request.content(), request.output, now)
            if idle:
                break  # it begins with the first that comes
        step = core.step(now)
        if step is not None:
            now += step.duration
            note(moments, step, now)
    return moments


requests = st.builds(
    Coming,
    at=st.one_of(st.just(0.0), st.floats(0, 30)),
    prompt=st.integers(1, 60),
    output=st.integers(1, 60),
    prefix=st.sampled_from("xyz"),
)


@settings(max_examples=200)
@given(
    st.lists(requests, min_size=1, max_size=10),
    st.integers(9, 24),  # the longest request takes 8, and one is reserved
    st.sampled_from([8, 30, 100]),
    st.integers(1, 5),
)
def test_tokens_come_as_from_an_engine_that_skips_nothing(
    coming: list[Coming], blocks: int, budget: int, seqs: int
) -> None:
    config = EngineConfig(TIME, blocks, 16, seqs, budget)
    timeline, moments = Timeline(), Moments()
    virtual = VirtualEngine(config, timeline, 1.0, lambda step: note(moments, step, timeline.now))
    for number, request in sorted(enumerate(coming), key=lambda pair: pair[1].at):
        timeline.at(request.at, virtual.add, str(number), request.content(), request.output)
    timeline.run()
    assert moments == step_by_step(config, coming)


def test_steps_that_only_decode_are_not_delivered() -> None:
    timeline, steps = Timeline(), []
    virtual = VirtualEngine(EngineConfig(TIME, 9, 512), timeline, 1.0, steps.append)
    virtual.add("a", Lengths(5, "x"), 400)
    timeline.run()
    assert len(steps) == 2
    assert timeline.now > 400 * TIME.step


def test_a_report_is_what_the_last_scrape_saw() -> None:
    seen: list[tuple[float, Report]] = []
    timeline = Timeline()
    virtual = VirtualEngine(EngineConfig(TIME, 9, 16, max_num_seqs=1), timeline, 1.0, lambda step: None)
    for at in (0.5, 0.6):
        timeline.at(at, virtual.add, str(at), Lengths(20, "x"), 5)
    for at in (0.9, 1.0, 1.9, 2.9, 3.9, 9.9):
        timeline.at(at, lambda: seen.append((timeline.now, virtual.report())))
    timeline.run()
    one, two, none = Report(1, 1, 0.25), Report(0, 1, 0.25), Report(0, 0, 0.0)
    # The first is done after 0.7 s of prefill and 4 times 0.33 s of decoding, at 2.5.
    assert seen == [(0.9, none), (1.0, one), (1.9, one), (2.9, one), (3.9, two), (9.9, none)]
