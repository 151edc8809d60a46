"""`herd status`: a running fleet as its run directory and its admin port tell it."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec

from router.run_directory import Record

COLUMNS = ("id", "models", "engine", "state", "in_flight", "url")
HEADINGS = ("REPLICA", "MODEL", "ENGINE", "STATE", "IN FLIGHT", "URL")


def fleet_of(record: Record) -> dict[str, Any] | None:
    """The fleet as the router sees it now; None while no router answers."""
    try:
        reply = httpx.get(f"{record.admin}/fleet", timeout=5, trust_env=False)
        reply.raise_for_status()
        return dict(reply.json())
    except httpx.HTTPError:
        return None


def as_json(record: Record, fleet: dict[str, Any] | None) -> bytes:
    """Both in one object; `fleet` is null while no router answers."""
    return msgspec.json.format(msgspec.json.encode({**msgspec.to_builtins(record), "fleet": fleet}))


def as_text(record: Record, fleet: dict[str, Any] | None) -> str:
    """The same for people."""
    lines = [
        f"endpoint   {record.endpoint}/v1",
        f"admin      {record.admin}",
        f"dashboard  {record.dashboard}",
        f"engine     {record.engine}",
        "",
    ]
    if fleet is None:
        return "\n".join(
            [*lines, "No router answers yet." if not record.ready else "The router does not answer."]
        )
    rows = [HEADINGS, *(_row(replica) for replica in fleet["replicas"])]
    return "\n".join([*lines, *_aligned(rows)])


def _row(replica: dict[str, Any]) -> tuple[str, ...]:
    cells = (replica[column] for column in COLUMNS)
    return tuple(", ".join(cell) if isinstance(cell, list) else str(cell) for cell in cells)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
