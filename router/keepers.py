"""Stored responses: which replica keeps one, so that requests about it go there and nowhere else."""

from __future__ import annotations

from collections import OrderedDict

from router.core.fleet import Fleet, State
from router.core.placement import Placement
from router.errors import BadRequest, NoCapacity, ResponseNotFound
from router.health import RETRY_AFTER_S, Watch
from router.openai_api import STORED, Call
from router.responses_api import mark, mark_in

# Ids that do not tell their keeper are rare: clients chose them, or an engine that takes none.
MAX_LEARNT = 10_000


class Keepers:
    """Finds the replica that keeps a response: by the mark in its id, or as learnt from replies."""

    def __init__(self, fleet: Fleet, watch: Watch) -> None:
        self._fleet = fleet
        self._watch = watch
        self._learnt: OrderedDict[str, str] = OrderedDict()

    def learn(self, response_id: str | None, replica_id: str) -> None:
        """A replica answered with this id; remembered unless the id tells as much."""
        if not response_id or mark_in(response_id) == mark(replica_id):
            return
        self._learnt[response_id] = replica_id
        self._learnt.move_to_end(response_id)
        if len(self._learnt) > MAX_LEARNT:
            self._learnt.popitem(last=False)

    def of(self, call: Call) -> str | None:
        """The replica that keeps what the call is about; None where any of its model may be asked.

        Raises ResponseNotFound if that replica has left.
        """
        response_id = call.kept.about if call.kept else None
        if response_id is None:
            return None
        if call.family is STORED:
            return self._only(response_id)
        if call.model not in self._fleet.models():
            return None  # none of its replicas has joined: it is too early to call one lost
        return self._keeper(response_id, self._members(), "previous_response_id")

    def model_of(self, response_id: str) -> str:
        """The model that made a response; raises ResponseNotFound, or NoCapacity if it cannot be told yet."""
        standing = self._fleet.get(self._only(response_id))
        if standing is None:
            raise _not_now()
        return standing.replica.models[0]

    def place(self, replica_id: str, model: str) -> Placement:
        """The one placement there is; raises what keeps the request from it."""
        standing = self._fleet.get(replica_id)
        if standing is None or standing.state is not State.READY:
            raise _not_now()
        if model not in standing.replica.models:
            told = f"The response is kept on a replica that does not serve {model!r}"
            raise BadRequest(told, param="previous_response_id")
        return Placement(standing, "keeps the response")

    def _only(self, response_id: str) -> str:
        """Where no model is told, a response that nothing is known of has no place but the one there is."""
        members = self._members()
        if not members:
            raise NoCapacity("No replica has joined the fleet yet", retry_after=RETRY_AFTER_S)
        found = self._keeper(response_id, members, "response_id")
        if found is None and len(members) > 1:
            told = f"No replica is known to keep the response {response_id!r}"
            raise ResponseNotFound(told, param="response_id")
        return found or members.pop()

    def _keeper(self, response_id: str, members: set[str], param: str) -> str | None:
        learnt, marked = self._learnt.get(response_id), mark_in(response_id)
        if learnt is None and marked is None:
            return None
        for member in members:
            if member == learnt or (learnt is None and mark(member) == marked):
                return member
        lost = f"The response {response_id!r} is lost: the replica that kept it has left the fleet"
        raise ResponseNotFound(lost, param=param)

    def _members(self) -> set[str]:
        """Every replica that is announced, whether or not it has answered yet."""
        return {*self._watch.followed, *(standing.id for standing in self._fleet)}


def _not_now() -> NoCapacity:
    told = "The replica that keeps the response cannot take requests now"
    return NoCapacity(told, retry_after=RETRY_AFTER_S)
