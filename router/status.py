"""`herd status`: a running fleet, as its record and the admin ports of its router processes tell it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from router.admin_client import ask
from router.port import Port
from router.run_directory import Record

ROUTERS = {
    "ROUTER": "rank",
    "PID": "pid",
    "ADMIN PORT": "admin_port",
    "IN FLIGHT": "in_flight",
    "CONNECTIONS": "connections",
}
REPLICAS = {
    "REPLICA": "id",
    "MODEL": "models",
    "ENGINE": "engine",
    "STATE": "state",
    "IN FLIGHT": "in_flight",
    "URL": "url",
}
SCALING = {
    "SCALED MODEL": "model",
    "READY": "ready",
    "TARGET": "target",
    "RANGE": "range",
    "NEEDED": "needed",
    "BECAUSE": "reason",
    "ASKED OF REPLICAS": "asked",
}
# What every router process counts of a replica by itself.
COUNTED = ("in_flight", "awaiting_first_token", "finished", "failures")


@dataclass(frozen=True, slots=True)
class Status:
    """What there is to tell. `places` are the lines above the tables; without `fleet` no router answers."""

    places: dict[str, str | None]
    record: dict[str, Any]
    fleet: dict[str, Any] | None
    trouble: str

    def as_json(self) -> bytes:
        """For programs: the record with `fleet`, which is null while no router answers."""
        return msgspec.json.format(msgspec.json.encode({**self.record, "fleet": self.fleet}))

    def as_text(self) -> str:
        """The same for people."""
        lines = [*(f"{name:<9}  {value}" for name, value in self.places.items()), ""]
        if self.fleet is None:
            return "\n".join([*lines, self.trouble])
        tables = [_table(ROUTERS, self.fleet["processes"]), _table(REPLICAS, self.fleet["replicas"])]
        if self.fleet["scaling"]:
            tables.append(_table(SCALING, _scaled(self.fleet)))
        return "\n".join([*lines, *"\n\n".join("\n".join(rows) for rows in tables).split("\n")])


def admins_of_fleet(record: Record) -> list[str]:
    """The admin ports of what `herd up` runs, as URLs."""
    admin = urlsplit(record.admin)
    first = admin.port or 0
    return [f"http://{admin.hostname}:{port}" for port in range(first, first + record.routers)]


def admins_of_port(port: int) -> list[str]:
    """Those of what `herd route` runs on a port of this machine."""
    return [f"http://127.0.0.1:{m.admin_port}" for m in Port(port).members() if m.admin_port]


def of_fleet(record: Record) -> Status:
    """What `herd up` runs."""
    places = {
        "endpoint": f"{record.endpoint}/v1",
        "admin": record.admin,
        "dashboard": record.dashboard,
        "engine": record.engine,
    }
    trouble = "The router does not answer." if record.ready else "No router answers yet."
    fleet = _seen_by_all(admins_of_fleet(record))
    return Status(places, msgspec.to_builtins(record), fleet, trouble)


def of_port(port: int) -> Status | None:
    """What `herd route` runs on a port of this machine; None if there is nothing."""
    admins = admins_of_port(port)
    if not admins:
        return None
    where = {"endpoint": f"http://127.0.0.1:{port}", "admin": admins[0]}
    places = {**where, "endpoint": f"{where['endpoint']}/v1"}
    return Status(places, where, _seen_by_all(admins), "The router does not answer.")


def _seen_by_all(admins: Sequence[str]) -> dict[str, Any] | None:
    """The fleet as the first process that answers sees it, with what only the others know of their own."""
    seen = [fleet for admin in admins if (fleet := _seen_by_one(admin)) is not None]
    if not seen:
        return None
    fleet = seen[0]
    own = {each["process"]["pid"]: each["process"] for each in seen}
    fleet["processes"] = [{**process, **own.get(process["pid"], {})} for process in fleet["processes"]]
    del fleet["process"]
    views = [replica for each in seen for replica in each["replicas"]]
    fleet["replicas"] = [_summed(replica, views) for replica in fleet["replicas"]]
    return fleet


def _scaled(fleet: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each model whose replicas are not fixed in number: how many there are, are to be, and why."""
    ready = {model["name"]: model["ready"] for model in fleet["models"]}
    return [_scaled_model(name, told, ready[name]) for name, told in fleet["scaling"].items()]


def _scaled_model(name: str, told: dict[str, Any], ready: int) -> dict[str, Any]:
    last, between = told["last"], f"{told['min']} to {told['max']}"
    row = {"model": name, "ready": ready, "target": told["target"], "range": between}
    if last is None:
        return row
    demand = last["demand"]
    asked = (
        f"{demand['requests']:.1f} requests/s, {demand['prefill_s']:.2f} s prefill/s, "
        f"{demand['output']:.0f} tokens/s, {demand['waiting']} waiting"
    )
    reason = f"{last['reason']} (dry run)" if told["dry_run"] else last["reason"]
    return row | {"needed": last["needed"], "reason": reason, "asked": asked}


def _summed(replica: dict[str, Any], views: list[dict[str, Any]]) -> dict[str, Any]:
    same = [view for view in views if view["id"] == replica["id"]]
    return {**replica, **{count: sum(view[count] for view in same) for count in COUNTED}}


def _seen_by_one(admin: str) -> dict[str, Any] | None:
    reply = ask(f"{admin}/fleet")
    return dict(reply.json()) if reply is not None and reply.is_success else None


def _table(columns: dict[str, str], rows: list[dict[str, Any]]) -> list[str]:
    cells = [tuple(columns), *(tuple(_cell(row.get(key)) for key in columns.values()) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _cell(value: Any) -> str:
    if value is None:  # of a process that is leaving
        return "-"
    return ", ".join(value) if isinstance(value, list) else str(value)
