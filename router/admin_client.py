"""Admin ports as the command line asks them: with the key that stands in the environment."""

from __future__ import annotations

import os

import httpx

from router.errors import HerdError
from router.keys import ADMIN_KEY

TIMEOUT_S = 5.0


def ask(url: str, **params: int) -> httpx.Response | None:
    """What an admin port answers; None if nobody does. Raises HerdError where the key is another's."""
    key = os.environ.get(ADMIN_KEY)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        reply = httpx.get(url, params=params or None, headers=headers, timeout=TIMEOUT_S, trust_env=False)
    except httpx.TransportError:
        return None
    if reply.status_code == httpx.codes.UNAUTHORIZED:
        wrong = f"{ADMIN_KEY} is not its key" if key else f"{ADMIN_KEY} is not set"
        raise HerdError(f"The admin port of the router asks for a key, and {wrong}.")
    return reply
