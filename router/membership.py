"""Membership, pushed: Serve request routers that route nothing and only listen.

Serve pushes the running replicas of a deployment, with what each published about itself, to every process
that holds a handle to it. These classes take that news to a `Roster`; requests never pass through the handle.
"""

from __future__ import annotations

from typing import Any

import msgspec
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from router import roster
from router.front import Endpoint
from router.port import Contact


class Listener(RequestRouter):
    """What both have in common."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All are alike to a handle call: only operators' own tools make one."""
        return [candidate_replicas]


class Directory(Listener):
    """The request router of every replica deployment."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's push: the whole membership of this deployment, at start and after each change."""
        super().update_replicas(replicas)
        endpoints = (endpoint(r.replica_id.unique_id, r.replica_metadata) for r in replicas)
        roster.ROSTER.announce(str(self._deployment_id), endpoints)


class Peers(Listener):
    """The request router of the router deployment, by which its processes know each other."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's push, as for `Directory`."""
        super().update_replicas(replicas)
        contacts = (msgspec.convert(r.replica_metadata, Contact) for r in replicas)
        roster.PEERS.announce(str(self._deployment_id), contacts)


def endpoint(replica_id: str, metadata: dict[str, Any]) -> Endpoint:
    """What a replica published by `record_replica_metadata`, as the router takes it."""
    return Endpoint(id=replica_id, url=metadata["url"], engine=metadata["engine"])
