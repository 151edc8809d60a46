"""The waiting line: who goes next and where, who is refused, and that nobody is lost."""

from collections import Counter
from functools import partial
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.core.admission import AGAIN_S, ASKED_S, LOOK_AHEAD, Line, Ticket, start_by
from router.core.blocks import Prompt
from router.core.fleet import Fleet, Load, Replica
from router.core.placement import Placement, kv_aware, least_requests
from router.line import AdmissionConfig


class World:
    """Replicas and one router's line before them."""

    def __init__(self, replicas=1, tpot_s=inf, weights=(), **config):
        self.fleet = Fleet()
        for n in range(replicas):
            self.fleet.joined(Replica(f"r{n}", f"http://r{n}", ("m",)), now=0.0)
        self.line = Line(AdmissionConfig(**config), 0.0, tpot_s, dict(weights))
        self.now = 0.0
        self.flights = {}
        self.released = []

    def look(self, policy, prompt, now):
        view = self.fleet.view("m", now=now, prompt=prompt)
        return view, policy(view)

    def ticket(self, due=inf, policy=least_requests, num_tokens=0, **members):
        prompt = Prompt(num_tokens)
        look = partial(self.look, policy, prompt)
        return Ticket(self.now, due, look, members.pop("tokens", num_tokens), **members)

    def enter(self, **members):
        ticket = self.ticket(**members)
        assert self.line.enter(ticket, self.now) == []
        return ticket

    def go(self):
        """All that can go, where they go."""
        gone = []
        while (released := self.line.next(self.fleet.view("m", now=self.now).replicas, self.now)) is not None:
            self.start(released.ticket, released.placement.standing.id, released.view.num_tokens)
            gone.append(released.ticket)
        return gone

    def start(self, ticket, replica, num_tokens=0):
        self.flights[ticket] = self.fleet.started(replica, self.now, Prompt(num_tokens))
        self.released.append(ticket)

    def first_token(self, ticket):
        self.fleet.first_token(self.flights[ticket], self.now)

    def finish(self, ticket):
        self.fleet.finished(self.flights.pop(ticket), self.now)


def wants(replica):
    """A policy that takes this replica alone."""

    def policy(view):
        return next((Placement(s, "wanted") for s in view.replicas if s.id == replica), None)

    return policy


def served_one_by_one(world):
    """Whoever waits, in the order in which they go where one request is let in at a time."""
    order = []
    while world.line:
        (gone,) = world.go()
        order.append(gone)
        world.first_token(gone)
    return order


# -- when they wait


def test_nobody_waits_for_an_idle_fleet():
    world = World()
    ticket = world.ticket(num_tokens=100_000)
    _, placement = ticket.look(0.0)
    assert world.line.passes(ticket, placement, 0.0)


def test_who_comes_does_not_pass_who_waits():
    world = World()
    world.enter(policy=wants("r9"))
    ticket = world.ticket()
    assert not world.line.passes(ticket, ticket.look(0.0)[1], 0.0)


@pytest.mark.parametrize(
    ("load", "open_"),
    [
        (Load(), True),
        (Load(in_flight=300, prefill_s=0.4, decoding=290), True),
        (Load(in_flight=1, prefill_s=0.6), False),
        (Load(in_flight=15), True),
        (Load(in_flight=16), False),
        (Load(in_flight=40, decoding=25), True),
    ],
)
def test_a_replica_with_enough_to_do_is_given_no_more(load, open_):
    world = World(backlog_s=0.5, awaiting=16)
    world.fleet.elsewhere("r0", load)
    world.enter()
    assert len(world.go()) == open_


def test_prefill_that_is_done_makes_room():
    world = World(backlog_s=0.5)
    tickets = [world.enter(num_tokens=10_000) for _ in range(4)]  # 0.4 s each
    assert world.go() == tickets[:2]
    world.now = 0.25
    assert world.go() == []
    world.now = 0.3  # half a second is left of what both take
    assert world.go() == [tickets[2]]
    world.now = 0.4
    world.first_token(tickets[0])
    world.first_token(tickets[1])
    assert world.go() == [tickets[3]]


@pytest.mark.parametrize(("routers", "gone"), [(1, 16), (4, 4), (100, 1)])
def test_a_router_takes_no_more_than_its_share(routers, gone):
    world = World(awaiting=16)
    world.line.routers = routers
    for _ in range(20):
        world.enter()
    assert len(world.go()) == gone


@pytest.mark.parametrize("routers", [1, 4])
def test_many_at_once_are_spread_evenly(routers):
    """600 streams on 4 replicas: none gets more than its engine's queue is to have, then each its turn."""
    worlds = [World(replicas=4) for _ in range(routers)]
    for n in range(600):
        worlds[n % routers].enter()
    everywhere = Counter()
    for world in worlds:
        world.line.routers = routers
        for replica in "r0", "r1", "r2", "r3":
            world.fleet.elsewhere(replica, Load(in_flight=everywhere[replica]))
        world.go()
        everywhere.update(flight.standing.id for flight in world.flights.values())
    assert set(everywhere.values()) == {16}
    world = worlds[-1]
    while world.line:
        for ticket in list(world.flights):
            world.first_token(ticket)
            world.finish(ticket)
        assert world.go()
    counts = [standing.finished + standing.in_flight for standing in world.fleet]
    assert max(counts) - min(counts) <= 1


# -- streams are kept within their SLO


def busy_world(tpot_s):
    """A replica that prefilled for three quarters of the last seconds, and makes steps of 6 ms."""
    world = World(tpot_s=tpot_s)
    world.fleet.elsewhere("r0", Load(in_flight=1, decoding=1, recent_s=15.0))
    return world


@pytest.mark.parametrize(
    ("tpot_s", "goes"),
    [
        (inf, True),  # nobody said how often a token is due
        (0.06, True),
        (0.05, False),
        (0.006, True),  # to an engine that is too slow for one stream alone nobody would ever go
    ],
)
def test_slow_streams_are_spared(tpot_s, goes):
    world = busy_world(tpot_s)
    world.enter(due=10.0)
    assert bool(world.go()) == goes


def test_one_stream_with_so_long_a_context_that_it_is_too_slow_alone_keeps_nobody_out():
    world = busy_world(0.02)
    world.fleet.elsewhere("r0", Load(in_flight=1, decoding=1, context=300_000, recent_s=15.0))
    world.enter(due=10.0)
    assert world.go()


def test_who_cannot_wait_any_longer_is_let_in_sooner():
    world = busy_world(0.035)
    world.enter(due=10.0)
    assert world.go() == []
    world.now = 9.9
    world.line.expired(world.now)
    assert len(world.go()) == 1


def test_who_is_late_anyhow_spares_them_too():
    world = busy_world(0.035)
    world.enter(due=10.0)
    world.now = 10.1
    assert world.line.expired(world.now) == []
    assert world.go() == []


@pytest.mark.parametrize(
    ("better", "asked", "goes"),
    [
        (-1, ASKED_S - 1, False),
        (-1, ASKED_S + 1, True),  # it was long ago
        (1, ASKED_S - 1, True),  # it is a worse one
    ],
)
def test_some_room_is_left_to_a_better_class_that_asks(better, asked, goes):
    world = busy_world(0.06)
    premium = world.ticket(priority=better)
    assert world.line.passes(premium, premium.look(0.0)[1], world.now)
    world.now = asked
    usual = world.ticket(due=world.now + 10.0)
    assert world.line.passes(usual, usual.look(world.now)[1], world.now) == goes


def test_where_nobody_decodes_nobody_is_spared():
    world = World(tpot_s=0.03)
    world.fleet.elsewhere("r0", Load(recent_s=18.0))
    world.enter(due=10.0)
    assert len(world.go()) == 1


# -- in which order


@pytest.mark.parametrize(
    ("entering", "order"),
    [
        ([{"due": 3}, {"due": 1}, {"due": 2}], [1, 2, 0]),
        ([{"due": 1}, {"due": 1}], [0, 1]),
        ([{"due": 1, "priority": 1}, {"due": 9}, {"due": 5, "priority": -1}], [2, 1, 0]),
        ([{"due": -1}, {"due": 9}, {"due": -2}], [1, 2, 0]),  # those that are late already come last
        ([{"due": -1, "priority": -1}, {"due": 9}], [0, 1]),  # in their class
        # Tenants take turns by tokens, whoever has more in line.
        ([{"tenant": t, "tokens": 5} for t in "aaabb"], [0, 3, 1, 4, 2]),
        ([{"tenant": "a", "tokens": 9}, *({"tenant": t, "tokens": 3} for t in "abbbb")], [0, 2, 3, 4, 1, 5]),
    ],
)
def test_the_order(entering, order):
    world = World(awaiting=1)
    tickets = [world.enter(**members) for members in entering]
    assert [tickets.index(ticket) for ticket in served_one_by_one(world)] == order


def test_weights_are_shares():
    world = World(awaiting=1, weights={"gold": 3.0})
    for _ in range(40):
        world.enter(tenant="gold", tokens=10)
        world.enter(tenant="iron", tokens=10)
    assert Counter(t.tenant for t in served_one_by_one(world)[:40]) == {"gold": 30, "iron": 10}


def test_who_was_away_has_saved_nothing_up():
    world = World(awaiting=1)
    for _ in range(10):
        world.enter(tenant="a", tokens=10)
    for _ in range(5):
        world.first_token(*world.go())
    for _ in range(5):
        world.enter(tenant="b", tokens=10)
    assert "".join(ticket.tenant for ticket in served_one_by_one(world)) in ("abababababb"[:10], "bababababa")


def test_who_becomes_late_goes_behind():
    world = World(awaiting=1)
    first, second = world.enter(due=1.0), world.enter(due=5.0)
    world.now = 2.0
    assert world.line.expired(world.now) == []
    assert served_one_by_one(world) == [second, first]


def test_those_behind_may_go_where_the_first_does_not_want_to():
    world = World(replicas=2, awaiting=1)
    world.fleet.elsewhere("r0", Load(in_flight=1))
    first, second = world.enter(policy=wants("r0"), due=1.0), world.enter(policy=wants("r1"), due=2.0)
    assert world.go() == [second]
    world.fleet.elsewhere("r0", Load())
    assert world.go() == [first]


def test_no_more_are_looked_at_than_a_few():
    world = World(replicas=2)
    world.fleet.elsewhere("r0", Load(in_flight=99))
    looked = []

    def policy(view):
        looked.append(view)
        return wants("r0")(view)

    for _ in range(100):
        world.enter(policy=policy)
    assert world.go() == []
    assert len(looked) == LOOK_AHEAD
    assert world.go() == []
    assert len(looked) == LOOK_AHEAD, "nor at the same ones again at once"
    world.now += AGAIN_S
    assert world.go() == []
    assert len(looked) == 2 * LOOK_AHEAD


def test_without_replicas_everybody_waits():
    world = World(replicas=0)
    world.enter()
    assert world.go() == []
    world.fleet.joined(Replica("r0", "http://r0", ("m",)), now=0.0)
    assert len(world.go()) == 1


# -- who is refused


@pytest.mark.parametrize(
    ("ttft_s", "unloaded_s", "backlog_s", "starts"),
    [
        (2.0, 0.5, 0.5, 1.0),  # the replica that it goes to may have as much to do first
        (2.0, 1.8, 0.5, 0.1),  # of little time to spare, half is for the line
        (0.1, 0.5, 0.5, -0.4),  # even at once it would be late
    ],
)
def test_when_a_request_has_to_start(ttft_s, unloaded_s, backlog_s, starts):
    assert start_by(10.0, ttft_s, unloaded_s, backlog_s) == pytest.approx(10.0 + starts)


@pytest.mark.parametrize(
    ("entering", "refused"),
    [
        ([{}, {}, {}], [2]),
        ([{"due": 1}, {"due": 2}, {"due": 0.5}], [2]),  # of equals, who was there first stays
        ([{}, {"priority": 1}, {}], [1]),
        ([{}, {}, {"priority": 1}], [2]),
        ([{"due": -1}, {"due": -2}, {"due": 1}], [0]),  # who is late is worth less
        ([{"tenant": "a", "due": 1}, {"tenant": "a", "due": 2}, {"tenant": "b"}], [1]),
        ([{"tenant": "a", "tokens": 1}, {"tenant": "b", "tokens": 9}, {"tenant": "a"}], [1]),
    ],
)
def test_who_is_refused_when_the_line_is_full(entering, refused):
    world = World(max_waiting=2)
    tickets = [world.ticket(**members) for members in entering]
    told = [other for ticket in tickets for other in world.line.enter(ticket, 0.0)]
    assert [tickets.index(ticket) for ticket in told] == refused
    assert len(world.line) == 2


def test_a_prompt_that_would_never_fit_pushes_nobody_out():
    world = World(max_waiting_tokens=100)
    waiting = [world.enter(tokens=10, priority=10) for _ in range(9)]
    large = world.ticket(tokens=101, priority=0)
    assert world.line.enter(large, world.now) == [large]
    assert all(ticket in world.line for ticket in waiting)


def test_tokens_bound_the_line_too():
    world = World(max_waiting_tokens=100)
    small = [world.enter(tokens=20, tenant="a") for _ in range(5)]
    large = world.ticket(tokens=50, tenant="b")
    assert world.line.enter(large, 0.0) == small[:1:-1]
    assert world.line.enter(world.ticket(tokens=500, tenant="c"), 0.0)[-1].tokens == 500
    assert world.line.tokens <= 100


@pytest.mark.parametrize(
    ("config", "members", "ends"),
    [
        ({"max_wait_s": 30}, {"due": 5.0}, 30.0),
        ({"max_wait_s": 3}, {"due": 5.0}, 3.0),
        ({"max_wait_s": 30}, {"due": 5.0, "patience_s": 2.0}, 7.0),
        ({"max_wait_s": 30}, {"due": 5.0, "patience_s": 0.0}, 5.0),
        ({"max_wait_s": 30}, {"due": -1.0, "patience_s": 0.0}, 0.0),
    ],
)
def test_how_long_they_wait(config, members, ends):
    world = World(**config)
    ticket = world.enter(policy=wants("r9"), **members)
    if ends > 0:
        assert world.line.expired(ends - 0.01) == []
        assert ticket in world.line
    assert world.line.expired(ends) == [ticket]
    assert not world.line.leave(ticket)
    assert len(world.line) == 0


def test_who_is_refused_is_told_how_long_it_takes():
    world = World(awaiting=1, max_waiting=30)
    assert world.line.retry_after_s(0.0) == 1.0, "nobody waits"
    for _ in range(30):
        world.enter(tokens=100)
    assert world.line.retry_after_s(0.0) == 60.0, "nobody went yet"
    for second in range(20):
        world.now = float(second)
        world.first_token(*world.go())
    assert world.line.retry_after_s(world.now) == pytest.approx(10, rel=0.15)


# -- whatever happens

ENTERING = {
    "due": st.integers(-200, 2000).map(lambda hundredths: hundredths / 100),
    "tokens": st.integers(0, 300),
    "priority": st.sampled_from([-1, 0, 1]),
    "tenant": st.sampled_from("abc"),
    "patience_s": st.sampled_from([0.0, 1.0, inf]),
}


class AnyLine(RuleBasedStateMachine):
    """Requests come, go, leave and are served in any order."""

    def __init__(self):
        super().__init__()
        bounds = {"max_waiting": 12, "max_waiting_tokens": 1500, "max_wait_s": 9.0}
        self.world = World(replicas=2, awaiting=2, weights={"b": 2.0}, **bounds)
        self.waiting, self.others = set(), set()

    @rule(
        wanted=st.sampled_from(["r0", "r1", "r9", None]),
        due=ENTERING["due"],
        **{name: ENTERING[name] for name in ("tokens", "priority", "tenant", "patience_s")},
    )
    def enter(self, wanted, due, **members):
        policy = wants(wanted) if wanted else least_requests
        ticket = self.world.ticket(due=self.world.now + due, policy=policy, **members)
        self.waiting.add(ticket)
        self.part(self.world.line.enter(ticket, self.world.now))

    @rule(seconds=st.floats(0, 3))
    def time_passes(self, seconds):
        self.world.now += seconds
        self.part(self.world.line.expired(self.world.now))

    @rule()
    def go(self):
        self.part(self.world.go())

    @precondition(lambda self: self.world.flights)
    @rule(data=st.data(), ends=st.booleans())
    def progress(self, data, ends):
        flights = sorted(self.world.flights, key=lambda ticket: ticket.number)
        ticket = data.draw(st.sampled_from(flights))
        self.world.first_token(ticket)
        if ends:
            self.world.finish(ticket)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data):
        ticket = data.draw(st.sampled_from(sorted(self.waiting, key=lambda ticket: ticket.number)))
        assert self.world.line.leave(ticket)
        assert not self.world.line.leave(ticket)
        self.part([ticket])

    def part(self, tickets):
        """None of them comes out twice."""
        assert self.waiting.issuperset(tickets)
        assert len(set(tickets)) == len(tickets)
        self.waiting.difference_update(tickets)

    @invariant()
    def everyone_is_accounted_for(self):
        line = self.world.line
        assert all(ticket in line for ticket in self.waiting)
        assert len(line) == len(self.waiting) <= 12
        assert line.tokens == sum(ticket.cost for ticket in self.waiting) <= 1500
        assert all(standing.awaiting_first_token <= 2 for standing in self.world.fleet)
        assert 1 <= line.retry_after_s(self.world.now) <= 60

    def teardown(self):
        """All that want what there is get it in the end, if they are patient."""
        world = self.world
        for ticket in list(world.flights):
            world.finish(ticket)
        world.now += AGAIN_S
        wishes = {ticket: ticket.look(world.now)[1] for ticket in self.waiting}
        while world.go():
            for ticket in list(world.flights):
                world.finish(ticket)
            world.now += AGAIN_S / 100
        hopeless = sum(placement is None for placement in wishes.values())
        assert hopeless >= LOOK_AHEAD or len(world.line) == hopeless


TestAnyLine = AnyLine.TestCase

costs = st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 100)), min_size=2, max_size=40)


@given(costs, st.sampled_from([0.5, 1.0, 3.0]))
def test_while_both_wait_tenants_are_served_by_their_weights(costs, weight):
    """The bound of start-time fair queueing: no further apart than what each last had at once."""
    world = World(awaiting=1, weights={"a": weight})
    for tenant, tokens in costs:
        world.enter(tenant=tenant, tokens=tokens)
    left, had = Counter(tenant for tenant, _ in costs), Counter()
    most = {t: max((tokens for tenant, tokens in costs if tenant == t), default=0) for t in "ab"}
    for ticket in served_one_by_one(world):
        if not (left["a"] and left["b"]):
            break
        assert abs(had["a"] / weight - had["b"]) <= most["a"] / weight + most["b"]
        had[ticket.tenant] += ticket.tokens
        left[ticket.tenant] -= 1


@given(st.lists(st.tuples(st.integers(-2, 2), st.floats(-5, 5)), min_size=1, max_size=40))
def test_classes_are_strict_and_each_goes_by_slack(entering):
    world = World(awaiting=1)
    for priority, due in entering:
        world.enter(priority=priority, due=due)
    order = [(t.priority, t.due < 0, t.due) for t in served_one_by_one(world)]
    assert order == sorted(order)


@given(st.integers(1, 6), st.lists(st.integers(0, 20_000), min_size=1, max_size=60))
def test_kv_aware_fills_no_replica_beyond_its_bound(replicas, prompts):
    world = World(replicas=replicas)
    for num_tokens in prompts:
        world.enter(num_tokens=num_tokens, policy=kv_aware)
    world.go()
    for standing in world.fleet:
        *before, _ = [flight.forecast.prefill_s for flight in standing.prefills.values()] or [0.0]
        assert sum(before) <= 0.5
        assert len(before) < 16
