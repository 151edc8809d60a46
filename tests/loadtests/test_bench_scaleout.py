"""The scale-out benchmark: the same load for fleets of every size, and what is computed of it."""

from dataclasses import replace
from itertools import combinations

import pytest
from click.testing import CliRunner

from loadtests import bench_scaleout
from loadtests.bench_placement import course
from loadtests.bench_scaleout import Filled, Result, decision_report, fleets, gossip, main, twin_report, units
from loadtests.trace import Arrival

# Two requests a second of four blocks; five conversations that each begin with the same block.
ARRIVALS = [Arrival(n / 2, 2000, 20, [0, 1 + n % 5, 100 + 2 * n, 101 + 2 * n]) for n in range(400)]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(bench_scaleout, "WARM_UP_S", 5.0)
    monkeypatch.setattr(bench_scaleout, "LASTS_S", 25.0)


def blocks(part):
    return {id for arrival in part for id in arrival.hash_ids}


def test_copies_of_the_trace_share_no_blocks():
    load = units(ARRIVALS, 24, speed=2.0)
    copies = [blocks(arrival for part in load[n : n + 8] for arrival in part) for n in (0, 8, 16)]
    assert all(copies)
    assert all(a.isdisjoint(b) for a, b in combinations(copies, 2))


def test_a_conversation_is_whole_in_one_unit():
    parts = [{tuple(a.hash_ids[:2]) for a in part} for part in units(ARRIVALS, 8, speed=2.0)]
    assert all(a.isdisjoint(b) for a, b in combinations(parts, 2))
    assert max(map(len, parts)) <= 2, "five conversations, or ten where the trace starts over, for eight"


def test_every_copy_has_the_same_speed_in_order_of_arrival():
    load = units(ARRIVALS, 16, speed=2.0)
    for first in (0, 8):
        copy = load[first : first + 8]
        assert sum(map(len, copy)) == pytest.approx(100, abs=6), "25 s of 2 a second, twice as fast"
        assert max(a.at for part in copy for a in part) > 20
        assert all(part == sorted(part, key=lambda a: a.at) for part in copy)


def test_another_seed_is_another_load():
    assert units(ARRIVALS, 8, 2.0, seed=1) == units(ARRIVALS, 8, 2.0, seed=1)
    assert units(ARRIVALS, 8, 2.0, seed=1) != units(ARRIVALS, 8, 2.0, seed=2)


def test_fleets_of_every_size_serve_all_units():
    whole, load = course("conversation", quick=True), units(ARRIVALS, 16, speed=2.0)
    due = sum(5 <= a.at < 25 for part in load for a in part)
    results = [Result.of(whole, load, *size) for size in ((8, 1), (16, 1), (16, 2))]
    for result in results:
        assert result.attainment == 1
        assert result.goodput * 20 * 16 == pytest.approx(due)
        assert result.requests * 20 == pytest.approx(due, abs=10), "some began before, some end later"
        assert result.tokens == pytest.approx(20 * result.requests)
        assert result.decisions >= 1
    assert 0 < results[0].ttft_p50 <= results[0].ttft_p99


def cells(text):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_efficiency_is_goodput_per_replica_by_that_of_a_smaller_fleet():
    one = Result(1, 1, 10, 100, 0.6, 0.6, 0.2, 0.5, 5, 1)
    eight, most = replace(one, replicas=8, goodput=0.8), replace(one, replicas=64, goodput=0.76)
    rows = cells(twin_report([one, eight, most, replace(most, routers=4, goodput=0.72)]))
    assert [row["by that of 8"] for row in rows] == ["0.750", "1.000", "0.950", "0.900"]
    assert [row["by that of 1"] for row in rows] == ["1.000", "1.333", "1.267", "1.200"]
    assert [row["fleets"] for row in rows] == ["64", "8", "1", "1"]
    assert cells(twin_report([most]))[0]["by that of 8"] == "-"


def test_several_routers_come_with_the_largest_fleet():
    assert fleets(16) == [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (16, 2), (16, 4)]


def test_the_parts_of_a_decision_add_up():
    (row,) = cells(decision_report([4]))
    parts = [int(row[part]) for part in bench_scaleout.PARTS]
    assert sum(parts) == pytest.approx(int(row["all, us"]), abs=3)
    assert int(row["view"]) > 0


def test_the_decision_finds_what_is_cached():
    fleet = bench_scaleout.holding(bench_scaleout.busy_fleet(8))
    (prompt,) = bench_scaleout.prompts(1)
    cached = fleet.view("m", prompt=prompt).cached
    assert len(cached) == bench_scaleout.HOLDERS
    assert {had.tokens for had in cached.values()} == {bench_scaleout.CACHED_TOKENS // 16 * 16}


def test_an_index_keeps_what_it_is_told():
    filled = Filled.of(replicas=3, shards=1, blocks=200)
    assert (filled.told, filled.kept) == (600, 600)
    assert Filled.of(replicas=4, shards=2, blocks=200).told == 400


def test_gossip_costs_less_where_each_has_a_share():
    whole, share = gossip(64, 4, 1), gossip(64, 4, 4)
    assert 3 < whole[0] / share[0] < 4.5
    assert whole[1] > 0


def test_the_command_prints_the_part_asked_for(monkeypatch):
    monkeypatch.setattr(bench_scaleout, "GOSSIPS", ((4, 2, 1),))
    done = CliRunner().invoke(main, ["--only", "gossip"])
    assert done.exit_code == 0
    assert "| 4 | 2 | 1 |" in done.output
