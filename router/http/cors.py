"""Which web pages may call the endpoint from a browser (the CORS protocol of the Fetch standard)."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from router.http import grammar
from router.http.headers import Headers
from router.http.requests import Request

ANY = "*"
# What the endpoint takes, on whatever path.
METHODS = b"GET, HEAD, POST, DELETE, OPTIONS"
# Browsers keep the answer to a preflight for so long; Starlette's default, and so vLLM's.
MAX_AGE_S = 600
# Of the headers that a page could not read otherwise, those that clients of the API live on.
EXPOSED = b"x-request-id, retry-after"

Token = Annotated[str, Field(pattern=rf"^{grammar.TOKEN_CHARACTER}+$")]


class Cors(BaseModel):
    """Named as vLLM's flags, and with its defaults: no page of another origin may call."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[Token, ...] = (ANY,)
    allowed_headers: tuple[Token, ...] = (ANY,)
    allow_credentials: bool = False

    @model_validator(mode="after")
    def _credentials_are_for_named_origins(self) -> Cors:
        if self.allow_credentials and ANY in self.allowed_origins:
            raise ValueError("allow_credentials: name the allowed_origins instead of '*'")
        return self

    def headers(self, request: Request, origin: bytes) -> Headers:
        """What a reply to a page of this origin carries; nothing if the page may not read it."""
        if not self._any_origin and origin not in self._origins:
            return [(b"vary", b"origin")] if self._origins else []
        said = [(b"access-control-allow-origin", ANY.encode() if self._any_origin else origin)]
        if not self._any_origin:
            said.append((b"vary", b"origin"))
        if self.allow_credentials:
            said.append((b"access-control-allow-credentials", b"true"))
        if is_preflight(request):
            return said + self._preflight(request)
        return [*said, (b"access-control-expose-headers", EXPOSED)]

    def _preflight(self, request: Request) -> Headers:
        """The answer to a browser that asks before it sends the page's request."""
        asked = request.header(b"access-control-request-headers")
        methods = METHODS if ANY in self.allowed_methods else ", ".join(self.allowed_methods).encode()
        said = [(b"access-control-allow-methods", methods), (b"access-control-max-age", b"%d" % MAX_AGE_S)]
        if ANY not in self.allowed_headers:
            said.append((b"access-control-allow-headers", ", ".join(self.allowed_headers).encode()))
        elif asked:  # `*` would leave out authorization
            said.append((b"access-control-allow-headers", asked))
        return said

    @cached_property
    def _origins(self) -> frozenset[bytes]:
        return frozenset(origin.encode("utf-8") for origin in self.allowed_origins)

    @cached_property
    def _any_origin(self) -> bool:
        return ANY in self.allowed_origins


def is_preflight(request: Request) -> bool:
    """Whether a browser asks for a page's sake."""
    return request.method == "OPTIONS" and b"access-control-request-method" in request.fields
