import pytest
from support import free_port

from router import keepers
from router.core.fleet import Fleet, Replica
from router.errors import BadRequest, NoCapacity, ResponseNotFound
from router.health import Endpoint, Watch
from router.keepers import Keepers
from router.metrics import Metrics
from router.openai_api import FAMILIES, STORED, Call, Kept
from router.responses_api import new_id

RESPONSES = FAMILIES["/v1/responses"]


def fleet_of(**models):
    fleet = Fleet()
    for replica_id, model in models.items():
        fleet.joined(Replica(id=replica_id, url=f"http://{replica_id}", models=(model,)), now=0.0)
    return fleet, Keepers(fleet, Watch(fleet, Metrics()))


def asks(about, model="m"):
    return Call(RESPONSES, model, kept=Kept(about))


def gets(about):
    return Call(STORED, "", kept=Kept(about))


def test_a_marked_id_leads_to_its_replica():
    _, kept = fleet_of(a="m", b="m")
    assert kept.of(asks(new_id("a"))) == kept.of(gets(new_id("a"))) == "a"
    assert kept.of(asks(new_id("b"))) == "b"
    assert kept.model_of(new_id("b")) == "m"


def test_what_a_replica_kept_is_lost_with_it():
    fleet, kept = fleet_of(a="m", b="m")
    kept.learn("mine", "a")
    fleet.left("a")
    for about in (new_id("a"), "mine"):
        with pytest.raises(ResponseNotFound, match="has left the fleet") as raised:
            kept.of(asks(about))
        assert (raised.value.param, raised.value.code) == (
            "previous_response_id",
            "previous_response_not_found",
        )
        with pytest.raises(ResponseNotFound, match="has left the fleet") as raised:
            kept.of(gets(about))
        assert (raised.value.param, raised.value.code) == ("response_id", "response_not_found")


def test_an_id_without_a_mark_is_learnt_and_else_may_be_anywhere():
    _, kept = fleet_of(a="m", b="m")
    assert kept.of(asks("resp_1")) is None
    kept.learn("resp_1", "b")
    assert kept.of(asks("resp_1")) == kept.of(gets("resp_1")) == "b"
    kept.learn("resp_1", "a")  # a client may use an id again
    assert kept.of(asks("resp_1")) == "a"
    assert kept.of(asks(None)) is None
    assert kept.of(Call(RESPONSES, "m", kept=Kept(None, nameless=True))) is None


def test_what_is_learnt_goes_before_a_mark_that_another_router_made():
    _, kept = fleet_of(a="m", b="m")
    foreign = new_id("a replica of a fleet before this one")
    kept.learn(foreign, "b")
    assert kept.of(asks(foreign)) == "b"


def test_only_so_many_ids_are_remembered_and_none_that_tells_its_keeper(monkeypatch):
    monkeypatch.setattr(keepers, "MAX_LEARNT", 2)
    _, kept = fleet_of(a="m", b="m")
    kept.learn("x", "a")
    kept.learn("y", "a")
    kept.learn("x", "a")
    kept.learn(new_id("a"), "a")
    kept.learn(None, "a")
    kept.learn("z", "a")
    assert [kept.of(asks(about)) for about in ("x", "y", "z")] == ["a", None, "a"]


def test_a_get_of_what_nobody_knows():
    _, one = fleet_of(a="m")
    assert one.of(gets("resp_1")) == "a"
    _, two = fleet_of(a="m", b="m")
    with pytest.raises(ResponseNotFound, match="No replica is known to keep"):
        two.of(gets("resp_1"))
    _, none = fleet_of()
    with pytest.raises(NoCapacity):
        none.of(gets("resp_1"))


async def test_a_replica_that_is_announced_is_not_lost():
    fleet, _ = fleet_of(a="m")
    watch = Watch(fleet, Metrics())
    kept = Keepers(fleet, watch)
    await watch.start()
    watch.follow(Endpoint("b", f"http://127.0.0.1:{free_port()}"))  # has not said yet what it serves
    try:
        assert kept.of(asks(new_id("b"))) == "b"
        with pytest.raises(NoCapacity) as raised:
            kept.place("b", "m")
        assert raised.value.retry_after
        with pytest.raises(NoCapacity):
            kept.model_of(new_id("b"))
    finally:
        await watch.stop()


def test_nothing_is_called_lost_before_a_replica_of_the_model_has_joined():
    _, kept = fleet_of(a="other")
    assert kept.of(asks(new_id("b"))) is None


def test_there_is_one_place_or_none():
    fleet, kept = fleet_of(a="m", b="m")
    assert kept.place("a", "m").standing.id == "a"
    with pytest.raises(BadRequest, match="does not serve 'other'") as wrong:
        kept.place("a", "other")
    assert wrong.value.param == "previous_response_id"
    fleet.failed("a", now=0.0)
    with pytest.raises(NoCapacity) as raised:
        kept.place("a", "m")
    assert raised.value.retry_after
