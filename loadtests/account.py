"""What engines and routers tell of a run: what they count, what Herd trusts and how it decided."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

# As many as Herd's admin port tells at once.
MOST_DECISIONS = 1000
SENT = "sent"


async def counted(urls: Iterable[str]) -> Counter[str]:
    """All samples of these servers' /metrics, summed by name, and by name and label: `name{label="x"}`."""
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        replies = await asyncio.gather(*(client.get(f"{url}/metrics") for url in urls))
    total: Counter[str] = Counter()
    for reply in replies:
        for family in text_string_to_metric_families(reply.raise_for_status().text):
            for sample in family.samples:
                total[sample.name] += sample.value
                for label, value in sample.labels.items():
                    total[f'{sample.name}{{{label}="{value}"}}'] += sample.value
    return total


async def tries(admin: str, last: int) -> list[list[dict[str, Any]]]:
    """How Herd placed its last requests, or the last 1,000 of more, with each try; the newest first."""
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        reply = await client.get(f"{admin}/decisions", params={"last": min(last, MOST_DECISIONS)})
    return [told["attempts"] for told in reply.raise_for_status().json()]


async def decisions(admin: str, last: int) -> list[dict[str, Any]]:
    """The last try of each of these."""
    return [attempts[-1] for attempts in await tries(admin, last)]


async def untrusted(admin: str) -> list[str]:
    """Why Herd does not know some replicas' caches exactly, a reason for each."""
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        replicas = (await client.get(f"{admin}/fleet")).raise_for_status().json()["replicas"]
    return [replica["trust_reason"] for replica in replicas if replica["trust"] != "exact"]


def token_ids(decided: Iterable[dict[str, Any]]) -> Counter[str]:
    """Requests by what became of their token ids: SENT, or why they were not."""
    return Counter(decision["token_ids"] for decision in decided)


def came_true(decided: Iterable[dict[str, Any]]) -> list[bool]:
    """Of each request whether the engine reported the very number of cached tokens that was predicted."""
    pairs = [(told["predicted"]["cached_tokens"], told["observed"]["cached_tokens"]) for told in decided]
    return [predicted == observed for predicted, observed in pairs if None not in (predicted, observed)]
