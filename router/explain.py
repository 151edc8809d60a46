"""`herd explain`: why requests went where they did and what came of it, as the router processes keep it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from router.admin_client import ask
from router.errors import HerdError

Told = dict[str, Any]  # a request's decisions, as the admin port tells them

ARROW = "→"
WIDTH = 500  # no table gets so wide


def on(admins: Sequence[str], request_id: str) -> Told:
    """What is known of a request, by the process that placed it; the newest, where its id was used again.

    Raises HerdError with one sentence.
    """
    found = _asked(admins, f"/decisions/{quote(request_id, safe='')}")
    if not found:
        raise HerdError(f"No router process keeps a decision on request {request_id!r}.")
    return max(found, key=_placed_at)


def newest(admins: Sequence[str], count: int) -> list[Told]:
    """The last so many requests, of all processes, the newest first. Raises HerdError with one sentence."""
    found = [told for each in _asked(admins, f"/decisions?last={count}") for told in each]
    return sorted(found, key=_placed_at, reverse=True)[:count]


def _asked(admins: Sequence[str], path: str) -> list[Any]:
    """What those processes answer that have an answer."""
    replies = [reply for admin in admins if (reply := ask(f"{admin}{path}")) is not None]
    if not replies:
        raise HerdError("The router does not answer.")
    return [reply.raise_for_status().json() for reply in replies if reply.status_code != 404]


def _placed_at(told: Told) -> float:
    return float(told["attempts"][-1]["placed_at"])


# -- for people


def as_text(told: Told | list[Told]) -> RenderableType:
    """One request at length, or a list of them."""
    return _list(told) if isinstance(told, list) else _request(told)


def _request(told: Told) -> RenderableType:
    """From its placement to its end; each attempt, where several replicas were tried."""
    attempts = told["attempts"]
    parts: list[RenderableType] = [_heads(told)]
    for number, attempt in enumerate(attempts, 1):
        if len(attempts) > 1:
            heading = f"Attempt {number} of {len(attempts)}: {attempt['outcome']}"
            parts += ["", Text(heading, style="bold")]
        parts += ["", _candidates(attempt), "", _comparison(attempt)]
    return Group(*parts)


def _list(requests: Sequence[Told]) -> RenderableType:
    """One line a request; what was predicted stands before what came true."""
    table = _table(*LIST)
    for told in requests:
        attempt = told["attempts"][-1]
        table.add_row(*(_cell(tell(told, attempt)) for tell in LIST.values()))
    return table


def _heads(told: Told) -> RenderableType:
    last = told["attempts"][-1]
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("request", told["request_id"]),
        ("model", told["model"]),
        ("placed", f"{_when(last['placed_at'])} by {told['policy']} in router process {told['process']}"),
        ("replica", last["replica"]),
        ("because", last["reason"]),
        ("outcome", last["outcome"]),
        ("token ids", last["token_ids"]),
    ):
        table.add_row(name, Text(value))
    return table


def _candidates(attempt: Told) -> Table:
    """What there was to choose from, the best first where the policy counts costs."""
    table = _table("", *CANDIDATES)
    costs = [c for c in attempt["candidates"] if c["cost_s"] is not None]
    for candidate in sorted(costs, key=lambda c: float(c["cost_s"])) or attempt["candidates"]:
        style, mark = ("bold", ARROW) if candidate["chosen"] else ("", "")
        table.add_row(mark, *(_cell(tell(candidate)) for tell in CANDIDATES.values()), style=style)
    return table


def _comparison(attempt: Told) -> Table:
    """What was predicted beside what came true."""
    table = _table("", "PREDICTED", "OBSERVED", "")
    predicted, observed = attempt["predicted"], attempt["observed"]
    for name, key, tell in COMPARED:
        before, after = predicted.get(key), observed[key]
        table.add_row(name, _cell(tell(before)), _cell(tell(after)), _cell(_off(key, before, after)))
    return table


def _off(key: str, predicted: float | None, observed: float | None) -> str | None:
    """How far off a prediction was."""
    if predicted is None or observed is None or predicted == observed:
        return None
    if key.endswith("_s"):
        return f"{observed / predicted:.2f} times as long" if predicted else None
    return f"{observed - predicted:+,}"


def _table(*columns: str) -> Table:
    """Names and sentences begin at the left, numbers end at the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for column in columns:
        table.add_column(column, justify="left" if column in LEFT else "right", no_wrap=True)
    return table


def _cell(said: str | None) -> Text:
    return Text(said or "")


def _count(number: float | None) -> str | None:
    return None if number is None else f"{number:,}"


def _seconds(number: float | None) -> str | None:
    if number is None:
        return None
    return f"{number * 1e3:.0f} ms" if number < 1 else f"{number:.2f} s"


def _share(number: float | None) -> str | None:
    return None if number is None else f"{number:.0%}"


def _when(unix: float) -> str:
    return datetime.fromtimestamp(unix).astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def _pair(tell: Callable[[float | None], str | None], key: str) -> Callable[[Told, Told], str]:
    def told(_: Told, attempt: Told) -> str:
        before, after = tell(attempt["predicted"].get(key)), tell(attempt["observed"][key])
        return f"{before or '-'} / {after or '-'}"

    return told


LEFT = {"", "REPLICA", "TRUST", "PLACED", "REQUEST", "MODEL", "OUTCOME", "BECAUSE"}
CANDIDATES: dict[str, Callable[[Told], str | None]] = {
    "REPLICA": lambda c: str(c["replica"]),
    "TRUST": lambda c: str(c["trust"]),
    "CACHED": lambda c: _count(c["cached_tokens"]),
    "SLOWER": lambda c: _count(c["slower_tokens"]),
    "BACKLOG": lambda c: _seconds(c["backlog_s"]),
    "LOADING": lambda c: _seconds(c["loading_s"]) if c["slower_tokens"] else None,
    "PREFILL": lambda c: _seconds(c["prefill_s"]),
    "FIRST TOKEN": lambda c: _seconds(c["ttft_s"]),
    "STEP": lambda c: _seconds(c["step_s"]),
    "BUSY": lambda c: _share(c["busy"]),
    "COST": lambda c: _seconds(c["cost_s"]),
    "DECODING": lambda c: _count(c["decoding"]),
    "IN FLIGHT": lambda c: _count(c["in_flight"]),
}
COMPARED: tuple[tuple[str, str, Callable[[float | None], str | None]], ...] = (
    ("prompt tokens", "prompt_tokens", _count),
    ("cached tokens", "cached_tokens", _count),
    ("first token", "ttft_s", _seconds),
    ("output tokens", "output_tokens", _count),
    ("whole reply", "duration_s", _seconds),
)
LIST: dict[str, Callable[[Told, Told], str | None]] = {
    "PLACED": lambda _, attempt: _when(attempt["placed_at"])[11:],
    "REQUEST": lambda told, _: str(told["request_id"]),
    "MODEL": lambda told, _: str(told["model"]),
    "REPLICA": lambda _, attempt: str(attempt["replica"]),
    "PROMPT": lambda _, attempt: _count(attempt["observed"]["prompt_tokens"]),
    "CACHED": _pair(_count, "cached_tokens"),
    "FIRST TOKEN": _pair(_seconds, "ttft_s"),
    "OUTPUT": lambda _, attempt: _count(attempt["observed"]["output_tokens"]),
    "OUTCOME": lambda _, attempt: str(attempt["outcome"]),
    "BECAUSE": lambda _, attempt: str(attempt["reason"]),
}
