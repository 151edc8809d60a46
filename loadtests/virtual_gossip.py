"""What routers in virtual time tell each other of their load, as router/gossip.py does in real time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from loadtests.timeline import Timeline
from router.core.fleet import Fleet, Load
from router.core.loads import Loads, Report
from router.gossip import COALESCE_S


class VirtualGossip:
    """One router among the others.

    Placements are told together after a moment, and everything in rounds, `period` seconds apart; each takes
    `delay` seconds to the others. `peers`: all of them; it joins them.
    """

    def __init__(
        self, fleet: Fleet, timeline: Timeline, period: float, delay: float, peers: list[VirtualGossip]
    ) -> None:
        self._fleet = fleet
        self._timeline = timeline
        self._period = period
        self._delay = delay
        self._peers = peers
        self._name = str(len(peers))
        self._inbox: deque[tuple[float, str, Report]] = deque()
        self._loads = Loads()
        self._sequence = 0
        self._placed: set[str] = set()
        self._in_rounds = False
        peers.append(self)

    def placed(self, replica_id: str) -> None:
        """A request was placed on this replica."""
        if len(self._peers) < 2:
            return
        if not self._placed:
            self._after(COALESCE_S, self._tell_placed)
        self._placed.add(replica_id)
        if not self._in_rounds:
            self._in_rounds = True
            self._after(self._period, self._round)

    def hear(self) -> None:
        """Takes in what has come until now; to be called before the fleet's loads matter."""
        now, inbox = self._timeline.now, self._inbox
        changed: set[str] = set()
        while inbox and inbox[0][0] <= now:
            _, sender, report = inbox.popleft()
            changed.update(self._loads.take(sender, report, now) or ())
        for replica_id in changed:
            self._fleet.elsewhere(replica_id, self._loads.at(replica_id))

    def _round(self) -> None:
        """While there is nothing to tell, nobody needs to be told so again."""
        told = self._fleet.loads(self._timeline.now)
        self._tell(told, whole=True)
        self._in_rounds = bool(told)
        if told:
            self._after(self._period, self._round)

    def _tell_placed(self) -> None:
        now, placed = self._timeline.now, map(self._fleet.get, self._placed)
        self._tell({standing.id: standing.own_load(now) for standing in placed if standing}, whole=False)
        self._placed.clear()

    def _tell(self, told: dict[str, Load], whole: bool) -> None:
        self._sequence += 1
        report = Report(self._sequence, whole, told)
        for peer in self._peers:
            if peer is not self:
                peer._inbox.append((self._timeline.now + self._delay, self._name, report))

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        self._timeline.at(self._timeline.now + seconds, act)
