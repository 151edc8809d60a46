"""What the other routers have at the replicas, from reports of which any may be lost, doubled or late.

A report says how things are, not what changed, so each is as good without those before it. One that is older
than what is known changes nothing; what that costs is healed by the next whole one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from router.core.demand import Scaled
from router.core.fleet import NO_LOAD, Load
from router.core.quotas import Use

# A router that says nothing for so long is gone; what it had at replicas ended with its connections.
SILENT_S = 1.0


class Report(msgspec.Struct, frozen=True, array_like=True):
    """What a router has at replicas, by their ids; `whole`: and nothing at any other.

    `sequence`: higher with each of its reports. `uses`: what some tenants use there, by their names.
    `scaled`: of each model whose replicas it decides on, by their names; None where nothing is said of that.
    """

    sequence: int
    whole: bool
    loads: dict[str, Load]
    uses: dict[str, Use] = {}
    scaled: dict[str, Scaled] | None = None


@dataclass(slots=True)
class Peer:
    """Another router, as it reported last."""

    sequence: int
    heard_at: float
    loads: dict[str, Load] = field(default_factory=dict)
    scaled: dict[str, Scaled] = field(default_factory=dict)


class Loads:
    """What every other router has at every replica."""

    def __init__(self) -> None:
        self.peers: dict[str, Peer] = {}

    def take(self, name: str, report: Report, now: float) -> set[str] | None:
        """The replicas that a router's report tells of; None if it is not newer than what is known."""
        peer = self.peers.get(name)
        if peer is None:
            peer = self.peers[name] = Peer(report.sequence, now)
        elif report.sequence <= peer.sequence:
            return None
        peer.sequence, peer.heard_at = report.sequence, now
        if report.scaled is not None:
            peer.scaled = report.scaled
        told = set(report.loads)
        if report.whole:
            told.update(peer.loads)
            peer.loads = report.loads
        else:
            peer.loads.update(report.loads)
        return told

    def forget_silent(self, now: float) -> set[str]:
        """Forgets the routers that are gone by now; the replicas where they had something."""
        freed: set[str] = set()
        for name, peer in list(self.peers.items()):
            if now - peer.heard_at > SILENT_S:
                freed.update(self.peers.pop(name).loads)
        return freed

    def at(self, replica_id: str) -> Load:
        """What all of them have at a replica."""
        told = [load for peer in self.peers.values() if (load := peer.loads.get(replica_id)) is not None]
        return sum(told[1:], told[0]) if told else NO_LOAD
