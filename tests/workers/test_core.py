"""The simulated engine's core: scheduling, caching, preemption and time, without any clock."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.simulated.core import Engine, EngineConfig, Finish, Sequence, Step
from workers.simulated.kv_cache import Removed, Stored, Tier
from workers.simulated.step_time import PRESETS, StepTime, StepWork

SECOND = StepTime(step=1.0, prefill=0, sequence=0, context=0)


@dataclass
class Lengths:
    """A sequence known by its length and block keys alone, as a simulator has it."""

    num_prompt_tokens: int
    prefix: str = ""
    stop_after: int | None = None
    said: int = field(default=0)

    def key(self, block: int) -> object:
        return (self.prefix, block)

    def extend(self) -> bool:
        self.said += 1
        return self.said == self.stop_after


def engine(**config: Any) -> Engine:
    return Engine(EngineConfig(**{"step_time": SECOND, "num_gpu_blocks": 65, "block_size": 4, **config}))


def run(core: Engine, now: float = 0.0) -> list[Step]:
    """Every step until there is nothing left to do."""
    steps = []
    while core.has_work:
        step = core.step(now)
        assert step is not None
        now += step.duration
        steps.append(step)
        assert len(steps) < 10_000
    return steps


def test_prefills_in_chunks_and_then_decodes_one_token_a_step() -> None:
    core = engine(max_num_batched_tokens=8)
    core.add("a", Lengths(20), 3, 0.0)
    steps = run(core)
    assert [step.work.prefill_tokens for step in steps] == [8, 8, 4, 0, 0]
    assert [len(step.outputs) for step in steps] == [0, 0, 1, 1, 1]
    assert steps[-1].outputs[0].finish is Finish.LENGTH
    assert steps[-1].work == StepWork(decoding=1, context_tokens=22)


def test_decoding_comes_before_prefill() -> None:
    core = engine(max_num_batched_tokens=8)
    core.add("a", Lengths(4), 9, 0.0)
    core.step(0.0)
    core.add("b", Lengths(20), 1, 1.0)
    step = core.step(1.0)
    assert step is not None
    assert (step.work.decoding, step.work.prefill_tokens) == (1, 7)


def test_first_come_first_served_up_to_max_num_seqs() -> None:
    core = engine(max_num_seqs=2)
    for name in "abc":
        core.add(name, Lengths(4), 2, 0.0)
    step = core.step(0.0)
    assert step is not None
    assert [s.id for s in step.admitted] == ["a", "b"]
    assert (core.num_running, core.num_waiting) == (2, 1)
    assert [s.id for later in run(core) for s in later.admitted] == ["c"]


@pytest.mark.parametrize(("tokens", "cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (40, 36), (41, 40)])
def test_a_full_hit_computes_the_last_block_again(tokens: int, cached: int) -> None:
    core = engine()
    core.add("a", Lengths(tokens), 1, 0.0)
    run(core)
    again = core.add("b", Lengths(tokens), 1, 0.0)
    run(core)
    assert again.cached_tokens == cached == (tokens - 1) // 4 * 4


def test_output_blocks_are_stored_as_they_fill() -> None:
    core = engine()
    content = Lengths(6, "x")
    core.add("a", content, 7, 0.0)
    stored = [event for step in run(core) for event in step.events]
    # 12 of 13 tokens are computed: the last one is never an input.
    assert stored == [Stored(content, 0, 1), Stored(content, 1, 1), Stored(content, 2, 1)]


def test_without_prefix_caching_nothing_is_stored() -> None:
    core = engine(enable_prefix_caching=False)
    for name in "ab":
        core.add(name, Lengths(20), 4, 0.0)
        assert not [event for step in run(core) for event in step.events]
    assert core.cache.num_cached == 0


def test_the_latest_is_preempted_and_finishes_all_the_same() -> None:
    core = engine(num_gpu_blocks=9)  # 32 tokens
    early, late = (core.add(name, Lengths(12, name), 12, 0.0) for name in "ab")
    steps = run(core)
    assert sum(step.preempted for step in steps) >= 1
    assert (early.preemptions, late.preemptions >= 1) == (0, True)
    assert (early.num_outputs, late.num_outputs) == (12, 12)
    finished = [output.sequence.id for step in steps for output in step.outputs if output.finish]
    assert finished == ["a", "b"]


def test_abort_frees_waiting_and_running_at_once() -> None:
    core = engine(max_num_seqs=1)
    core.add("a", Lengths(8), 50, 0.0)
    core.add("b", Lengths(8), 50, 0.0)
    core.step(0.0)
    assert core.kv_usage > 0
    assert core.abort("b")
    assert core.abort("a")
    assert not core.abort("a")
    assert (core.has_work, core.kv_usage) == (False, 0.0)
    assert core.step(1.0) is None


def test_content_ends_a_sequence_before_its_limit() -> None:
    core = engine()
    core.add("a", Lengths(4, stop_after=3), 10, 0.0)
    (last,) = run(core)[-1].outputs
    assert (last.finish, last.sequence.num_outputs) == (Finish.STOP, 3)


@pytest.mark.parametrize(
    ("tokens", "limit", "message"), [(256, 2, "does not fit"), (4, 0, "at least 1"), (4, 1, "already here")]
)
def test_refuses_what_could_never_run(tokens: int, limit: int, message: str) -> None:
    core = engine()
    core.add("taken", Lengths(4), 1, 0.0)
    with pytest.raises(ValueError, match=message):
        core.add("taken" if message == "already here" else "new", Lengths(tokens), limit, 0.0)


def test_step_time_is_the_documented_sum() -> None:
    time = StepTime(step=1.0, prefill=0.1, sequence=0.01, context=0.001, attention=0.0001)
    work = StepWork(prefill_tokens=5, attention=7, decoding=3, context_tokens=11)
    assert time.seconds(work) == pytest.approx(1 + 0.5 + 0.03 + 0.011 + 0.0007)


def test_a_step_costs_what_it_computes() -> None:
    time = StepTime(step=1.0, prefill=0.1, sequence=0.01, context=0.001, attention=0.0001)
    core = engine(step_time=time, max_num_batched_tokens=8)
    core.add("a", Lengths(12), 2, 0.0)
    durations = [step.duration for step in run(core)]
    # chunks of 8 after 0 and of 4 after 8, then one token over 13
    attention = (8 * (0 + 4), 4 * (8 + 2))
    assert durations == pytest.approx(
        [1 + 0.8 + attention[0] * 1e-4, 1 + 0.4 + attention[1] * 1e-4, 1 + 0.01 + 0.013]
    )


def test_the_8b_preset_prefills_30_000_tokens_a_second() -> None:
    time = PRESETS["8b-h100"].step_time
    assert 8192 / time.seconds(StepWork(prefill_tokens=8192)) == pytest.approx(30_000, rel=0.05)


@pytest.mark.parametrize("bad", [{"block_size": 0}, {"max_num_seqs": 0}, {"max_num_batched_tokens": 0}])
def test_sizes_must_be_positive(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        engine(**bad)


@pytest.mark.parametrize(
    ("tokens", "limit", "steps"),
    [
        (5, 9, 2),  # the third would fill the block of tokens 5 to 8
        (4, 9, 0),  # the first would take a block
        (5, 3, 1),  # the second would end it
        (8, 1, 0),
    ],
)
def test_steps_are_quiet_until_a_block_or_a_sequence_ends(tokens: int, limit: int, steps: int) -> None:
    core = engine()
    sequence = core.add("a", Lengths(tokens), limit, 0.0)
    core.step(0.0)
    quiet = core.quiet(1.0)
    assert quiet == (steps, 1.0 + steps)
    core.skip(quiet.steps)
    assert sequence.num_outputs == 1 + steps
    step = core.step(quiet.ends)
    changed = step is not None and (step.events or step.outputs[0].finish)
    assert bool(changed) == (steps > 0)


def test_quiet_steps_begin_before_what_comes_next() -> None:
    core = engine(block_size=64)
    core.add("a", Lengths(5), 50, 0.0)
    core.step(0.0)
    assert core.quiet(1.0, until=1.0) == (0, 1.0)
    assert core.quiet(1.0, until=3.0) == (2, 3.0)
    assert core.quiet(1.0, until=3.5) == (3, 4.0)
    assert core.quiet(1.0) == (48, 49.0)


def test_who_waits_for_room_does_not_break_the_quiet() -> None:
    core = engine(max_num_seqs=1, block_size=64)
    core.add("a", Lengths(5), 50, 0.0)
    core.step(0.0)
    core.add("b", Lengths(5), 50, 0.0)
    assert core.quiet(1.0).steps == 0  # nobody has looked whether there is room
    core.step(1.0)
    assert core.quiet(2.0).steps == 47
    core.abort("a")
    assert core.quiet(2.0).steps == 0


# -- the CPU tier


def offloading(**config: Any) -> Engine:
    """Room for 32 tokens on the GPU and 80 on the CPU, of which one second loads ten."""
    time = replace(SECOND, loading=0.1)
    return engine(**{"step_time": time, "num_gpu_blocks": 9, "num_cpu_blocks": 20, **config})


def serve(core: Engine, name: str, tokens: int = 20, prefix: str = "", at: float = 0.0) -> Sequence:
    """One request from its arrival to its end."""
    sequence = core.add(name, Lengths(tokens, prefix), 1, at)
    run(core, at)
    return sequence


def test_what_the_gpu_gave_up_is_loaded_and_counts_as_cached() -> None:
    core = offloading()
    serve(core, "a", prefix="x")
    serve(core, "b", prefix="y", at=10.0)  # takes three free blocks and two of the first
    assert len(core.cache.longest_prefix([("x", n) for n in range(5)])) == 3
    again = core.add("c", Lengths(24, "x"), 2, 20.0)
    steps = run(core, 20.0)
    assert (again.cached_tokens, again.loaded_tokens) == (20, 8)
    stored = [event for step in steps for event in step.events if isinstance(event, Stored)]
    gpu, cpu = ([e for e in stored if e.tier is tier] for tier in (Tier.GPU, Tier.CPU))
    assert gpu[0] == Stored(again.content, 3, 2)
    assert [(e.first, e.count) for e in cpu] == [(5, 1)], "only what is new"
    # 8 tokens are loaded in 0.8 s, and the rest is computed in one step of a second, as is the second token.
    assert [step.duration for step in steps] == pytest.approx([0.8, 1.0, 1.0])
    assert [[s.id for s in step.admitted] for step in steps] == [[], ["c"], []]


def test_only_full_blocks_of_prompts_are_copied() -> None:
    core = offloading(num_gpu_blocks=65)
    core.add("a", Lengths(10, "x"), 30, 0.0)
    run(core)
    assert [len(core.cache.longest_prefix([("x", n)])) for n in range(3)] == [1, 1, 1]
    assert core.cpu.prefix(("x", n) for n in range(9)) == [("x", 0), ("x", 1)]


def test_a_hit_on_the_gpu_is_copied_again_where_the_copy_is_gone() -> None:
    core = offloading(num_gpu_blocks=65, num_cpu_blocks=3)
    serve(core, "a", 12, "x")
    serve(core, "b", 12, "y", at=10.0)
    assert not core.cpu.prefix([("x", 0)])
    serve(core, "c", 12, "x", at=20.0)
    assert len(core.cpu.prefix(("x", n) for n in range(3))) == 3


def test_others_are_computed_while_blocks_are_loaded() -> None:
    core = offloading(num_gpu_blocks=65)
    serve(core, "a", prefix="x")
    assert core.reset_prefix_cache()
    loading = core.add("b", Lengths(20, "x"), 1, 10.0)  # 16 tokens: until 11.6
    other = core.add("c", Lengths(20, "y"), 3, 10.0)
    first = core.step(10.0)
    assert first is not None
    assert [s.id for s in first.admitted] == ["c"]
    assert (core.num_waiting, core.num_running) == (1, 1)
    steps = [first, *run(core, 11.0)]
    assert [[o.sequence.id for o in step.outputs] for step in steps] == [["c"], ["c"], ["c", "b"]]
    assert (loading.scheduled, other.scheduled) == (12.0, 10.0)


def test_loads_take_turns_and_nobody_loads_what_another_does() -> None:
    core = offloading(num_gpu_blocks=65, max_num_seqs=9)
    serve(core, "a", 20, "x")
    serve(core, "b", 20, "y", at=10.0)
    core.reset_prefix_cache()
    one, two, same = (core.add(name, Lengths(20, name[0]), 1, 20.0) for name in ("x", "y", "x again"))
    steps = run(core, 20.0)
    assert [one.loaded_tokens, two.loaded_tokens, same.loaded_tokens] == [16, 16, 0]
    assert same.cached_tokens == 16
    assert [one.scheduled, two.scheduled] == pytest.approx([21.6, 23.2])
    assert sum(step.work.prefill_tokens for step in steps) == 12


def test_a_sequence_may_be_aborted_while_it_loads() -> None:
    core = offloading()
    serve(core, "a", prefix="x")
    core.reset_prefix_cache()
    core.add("b", Lengths(20, "x"), 1, 10.0)
    core.step(10.0)
    assert not core.reset_prefix_cache(external=True), "it holds blocks"
    assert core.abort("b")
    assert (core.has_work, core.kv_usage) == (False, 0.0)
    assert core.reset_prefix_cache(external=True)
    assert serve(core, "c", prefix="x", at=20.0).cached_tokens == 0


TIER = st.tuples(
    st.sampled_from([0, 0, 3, 12, 40]), st.sampled_from([0.0, 0.05, 0.7])
)  # blocks, a token's load
REQUEST = st.tuples(
    st.integers(1, 60),  # prompt tokens
    st.integers(1, 30),  # output tokens
    st.sampled_from("xyz"),  # prefix
    st.integers(0, 20),  # step of arrival
    st.one_of(st.none(), st.integers(1, 40)),  # step of abort
)


@settings(max_examples=150)
@given(
    st.lists(REQUEST, min_size=1, max_size=12),
    st.integers(24, 70),
    st.integers(1, 32),
    st.integers(1, 4),
    TIER,
)
def test_whatever_comes_is_served_exactly_and_leaks_nothing(
    requests: list[tuple[int, int, str, int, int | None]],
    blocks: int,
    budget: int,
    seqs: int,
    tier: tuple[int, float],
) -> None:
    core = engine(
        num_gpu_blocks=blocks,
        num_cpu_blocks=tier[0],
        step_time=replace(SECOND, loading=tier[1]),
        max_num_batched_tokens=budget,
        max_num_seqs=seqs,
    )
    sequences: dict[str, Sequence] = {}
    outputs: dict[str, int] = {}
    aborted = set()
    arrivals = max(request[3] for request in requests)
    cached: dict[tuple[Tier, object], int] = {}
    number = 0
    while core.has_work or number <= arrivals:
        for index, (prompt, output, prefix, arrival, abort) in enumerate(requests):
            if arrival == number:
                sequences[str(index)] = core.add(str(index), Lengths(prompt, prefix), output, number)
            if abort is not None and arrival + abort == number and core.abort(str(index)):
                aborted.add(str(index))
        step = core.step(number)
        number += 1
        assert number < 20_000
        for event in step.events if step else ():
            match event:
                case Stored(owner, first, count, tier):
                    for block in range(first, first + count):
                        cached[tier, owner.key(block)] = cached.get((tier, owner.key(block)), 0) + 1
                case Removed(key, tier):
                    cached[tier, key] -= 1
        for sequence, finish in step.outputs if step else ():
            outputs[sequence.id] = outputs.get(sequence.id, 0) + 1
            assert (finish is Finish.LENGTH) == (outputs[sequence.id] == sequence.max_tokens)
        if step:
            assert step.work.prefill_tokens + step.work.decoding <= budget
            assert core.num_running <= seqs
    for index, (prompt, output, *_) in enumerate(requests):
        sequence = sequences[str(index)]
        assert str(index) in aborted or outputs[str(index)] == output
        assert (sequence.cached_tokens or 0) <= (prompt - 1) // 4 * 4
    assert core.kv_usage == 0
    assert core.cache.num_free == core.cache.capacity
    # What the events say is cached is what a lookup finds: a follower loses nothing and invents nothing.
    assert sum(1 for copies in cached.values() if copies) == core.cache.num_cached + len(core.cpu)
    find = {Tier.GPU: core.cache.longest_prefix, Tier.CPU: core.cpu.prefix}
    assert all(bool(copies) == bool(find[tier]([key])) for (tier, key), copies in cached.items())
    assert not core.cpu.is_loading([key for _, key in cached])


@dataclass
class Told:
    """What an engine did: its steps with their times, and how often nothing but tokens came of one."""

    steps: list[tuple[float, StepWork, list[tuple[str, Finish | None]], list[object], list[str], int]]
    quiet: int = 0

    def add(self, now: float, step: Step) -> None:
        outputs = [(output.sequence.id, output.finish) for output in step.outputs]
        events = [
            [event.tier, *(event.owner.key(block) for block in range(event.first, event.first + event.count))]
            if isinstance(event, Stored)
            else event
            for event in step.events
        ]
        admitted = [sequence.id for sequence in step.admitted]
        self.steps.append((now, step.work, outputs, events, admitted, step.preempted))


def play(core: Engine, requests: list[tuple[int, int, str, int, int | None]], skipping: bool) -> Told:
    """Serve requests as they come and go, each step by itself or the quiet ones in one go."""
    told = Told([])
    coming = [(request[3], str(index), request) for index, request in enumerate(requests)]
    going = [(r[3] + r[4], str(index), None) for index, r in enumerate(requests) if r[4] is not None]
    plan = sorted([*coming, *going], key=lambda event: event[:2])
    now = 0.0
    while plan or core.has_work:
        if not core.has_work:
            now = max(now, plan[0][0])
        while plan and plan[0][0] <= now:
            _, id, request = plan.pop(0)
            if request is None:
                core.abort(id)
            else:
                core.add(id, Lengths(request[0], request[2]), request[1], now)
        if skipping and (quiet := core.quiet(now, plan[0][0] if plan else inf)).steps:
            core.skip(quiet.steps)
            told.quiet += quiet.steps
            now = quiet.ends
        elif step := core.step(now):
            told.add(now, step)
            now += step.duration
    return told


@settings(max_examples=300)
@given(
    st.lists(REQUEST, min_size=1, max_size=10),
    st.integers(24, 90),
    st.integers(1, 40),
    st.integers(1, 6),
    st.booleans(),
    TIER,
)
def test_skipped_steps_are_those_that_change_nothing_else(
    requests: list[tuple[int, int, str, int, int | None]],
    blocks: int,
    budget: int,
    seqs: int,
    caching: bool,
    tier: tuple[int, float],
) -> None:
    config = {
        "step_time": StepTime(0.31, 0.017, 0.0013, 0.0007, 0.00011, tier[1]),
        "num_gpu_blocks": blocks,
        "num_cpu_blocks": tier[0],
        "max_num_batched_tokens": budget,
        "max_num_seqs": seqs,
        "enable_prefix_caching": caching,
    }
    each = play(engine(**config), requests, skipping=False)
    some = play(engine(**config), requests, skipping=True)
    kept = iter(some.steps)
    last = next(kept, None)
    skipped = []
    for step in each.steps:
        if step == last:
            last = next(kept, None)
        else:
            skipped.append(step)
    assert last is None, "a step that single steps never did"
    assert len(skipped) == some.quiet
    for _, work, outputs, events, admitted, preempted in skipped:
        assert work.decoding == len(outputs)
        assert not (work.prefill_tokens or events or admitted or preempted)
        assert all(finish is None for _, finish in outputs)
