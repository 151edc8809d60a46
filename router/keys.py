"""API keys: made here, kept as hashes, found in the headers of a request.

A key is 256 bits of chance. So its plain SHA-256 tells nothing of it: nobody can try them all, and the slow,
salted hashes that passwords need would only cost time. A key is looked up by its hash. How long that takes
may depend on the hash, which whoever guesses cannot choose, so it does not lead closer to a key.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
from collections.abc import Iterator
from hashlib import sha256
from typing import TYPE_CHECKING

from router.errors import Unauthorized

if TYPE_CHECKING:  # what it takes to read requests is not loaded for `herd status`
    from router.http.requests import Request

# What scanners for leaked secrets can look for, as with other services' keys.
PREFIX = "sk-herd-"
HASH = "sha256:"
# Where the command line finds the key of the admin ports that it opens and asks.
ADMIN_KEY = "HERD_ADMIN_KEY"


def new_key() -> str:
    """A key that nobody has had."""
    return PREFIX + secrets.token_urlsafe(32)


def new_secret() -> str:
    """What cache salts can be made of."""
    return secrets.token_hex(32)


def hash_of(key: str) -> str:
    """A key as it is kept."""
    return HASH + sha256(key.encode()).hexdigest()


def digest_in(key_hash: str) -> bytes:
    """What `digest` makes of the key that has this hash."""
    return bytes.fromhex(key_hash.removeprefix(HASH))


def digest(key: bytes) -> bytes:
    """The SHA-256 of a key."""
    return sha256(key).digest()


def sent_with(request: Request) -> Iterator[bytes]:
    """The keys that a request carries: as OpenAI's clients send one, and as Anthropic's do."""
    authorization = request.header(b"authorization")
    if authorization is not None:
        scheme, _, credentials = authorization.partition(b" ")
        if scheme.lower() == b"bearer":
            yield credentials.strip()
    if (key := request.header(b"x-api-key")) is not None:
        yield key


class Guard:
    """Lets those in who have the one key; everybody where there is none.

    Browsers ask their user for a password where the challenge is Basic: it is the key, for any user.
    """

    def __init__(self, key_hash: str | None) -> None:
        self._digest = digest_in(key_hash) if key_hash is not None else None

    def check(self, request: Request) -> None:
        """Raises Unauthorized."""
        if self._digest is None:
            return
        for key in (*sent_with(request), *_password(request)):
            if hmac.compare_digest(digest(key), self._digest):
                return
        raise Unauthorized(f"The admin port asks for its key ({ADMIN_KEY})", b'Bearer, Basic realm="herd"')


def _password(request: Request) -> Iterator[bytes]:
    scheme, _, credentials = (request.header(b"authorization") or b"").partition(b" ")
    if scheme.lower() == b"basic":
        try:
            yield base64.b64decode(credentials, validate=True).partition(b":")[2]
        except binascii.Error:
            return
