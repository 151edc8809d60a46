"""Everything that can go wrong in the router, as one tree. On the front port `router.relay` makes an ApiError
a reply, on the admin port `router.admin`, and of what is no request to either of them `router.http.server`.

HerdError
  ConfigError              a setting is wrong; names the key
  ListenError              a port cannot be had
  AlreadyUp                a `herd up` runs in this run directory (router.run_directory)
  ClusterError             Ray cannot be started or reached, or is lost (router.cluster)
  ServeError               Serve refused or failed (router.serve_rest)
  EngineUnreachable        a worker URL gives no answer, or not that of a vLLM server
  UpstreamError            the exchange with a replica failed
    ConnectFailed          nothing was sent
    ReplyCut               the replica closed before its reply was whole
    ReplyFailed            the replica said that it failed
    Diverged               the rest of a stream does not fit to what its client has
  ApiError                 what a client is told, with status, type and code
    BadRequest             400
    Unauthorized           401
    NotIsolated            403
    UnknownModel           404
    UnknownRoute           404
    ResponseNotFound       404
    DecisionNotFound       404
    MethodNotAllowed       405
    ClientTimeout          408
    TooLarge               413
    TargetTooLong          414
    RateLimited            429
    Overloaded             429
    HeadTooLarge           431
    UpstreamBroken         502
    NoCapacity             503
"""

from __future__ import annotations


class HerdError(Exception):
    """Base of every error that Herd raises on purpose."""


class ConfigError(HerdError):
    """A setting is wrong. The message names the key."""


class ListenError(HerdError):
    """The port cannot be listened on; the message says who has it."""


class EngineUnreachable(HerdError):
    """A worker URL does not answer as a vLLM server does."""


class UpstreamError(HerdError):
    """The exchange with a replica failed."""


class ConnectFailed(UpstreamError):
    """No connection to the replica, or none that took the request: nothing was done there."""


class ReplyCut(UpstreamError):
    """The replica closed the connection before its reply was whole."""


class ReplyFailed(UpstreamError):
    """The replica answered that it cannot: with a status of 5xx, or with an error in its stream.

    `status`: of HTTP, as far as it told one. `event`: the one in its stream, as it came. `answer`: headers
    and body of its reply in one piece.
    """

    def __init__(
        self,
        message: str,
        status: int = 500,
        event: bytes | None = None,
        answer: tuple[list[tuple[bytes, bytes]], bytes] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.event = event
        self.answer = answer


class Diverged(UpstreamError):
    """The rest of a stream does not fit to what its client has; that is no fault of the replica."""


class ApiError(HerdError):
    """An error as the client is told it: an HTTP status and an OpenAI error body."""

    status = 500
    type = "internal_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """What the client is told beside the body."""
        return [] if self.retry_after is None else [(b"retry-after", b"%d" % self.retry_after)]


class BadRequest(ApiError):
    """The request cannot be read."""

    status = 400
    type = "invalid_request_error"


class Unauthorized(ApiError):
    """The request carries no key that is known; the client is told how to send one (RFC 9110, 15.5.2)."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def __init__(self, message: str, challenge: bytes = b"Bearer") -> None:
        super().__init__(message)
        self.challenge = challenge

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"www-authenticate", self.challenge)]


class NotIsolated(ApiError):
    """Engines would answer from a cache that other tenants share."""

    status = 403
    type = "invalid_request_error"
    code = "cache_not_isolated"


class UnknownModel(ApiError):
    """No replica serves this model."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class UnknownRoute(ApiError):
    """Nothing is served at this path."""

    status = 404
    type = "invalid_request_error"
    code = "unknown_url"


class ResponseNotFound(ApiError):
    """A stored response is gone. `param` says by which field it was asked for."""

    status = 404
    type = "invalid_request_error"

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message, param=param)
        self.code = f"{param.removesuffix('_id')}_not_found"  # OpenAI's: previous_response_not_found


class DecisionNotFound(ApiError):
    """A process keeps no decision on this request: it placed none, or that is too long ago."""

    status = 404
    type = "invalid_request_error"
    code = "decision_not_found"


class MethodNotAllowed(ApiError):
    """The path exists, the method does not; the client is told which do (RFC 9110, section 15.5.6)."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"

    def __init__(self, path: str, *allowed: str) -> None:
        super().__init__(f"{path} takes {', '.join(allowed)}")
        self.allowed = allowed

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"allow", ", ".join(self.allowed).encode("ascii"))]


class ClientTimeout(ApiError):
    """The client took too long to send its request."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class TooLarge(ApiError):
    """The body is over the limit."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class TargetTooLong(ApiError):
    """The request line is over the limit."""

    status = 414
    type = "invalid_request_error"
    code = "uri_too_long"


class RateLimited(ApiError):
    """A limit of the tenant is reached; `limits`: how it stands with those per minute."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: int, limits: list[tuple[bytes, bytes]]) -> None:
        super().__init__(message, retry_after=retry_after)
        self.limits = limits

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return [*super().headers, *self.limits]


class HeadTooLarge(ApiError):
    """The request line and headers are over the limit."""

    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class Overloaded(ApiError):
    """Others are before it in line: it is refused, and told when to come again."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"


class UpstreamBroken(ApiError):
    """Replicas took the request and broke before they answered."""

    status = 502
    type = "server_error"
    code = "upstream_error"


class NoCapacity(ApiError):
    """No replica can take the request now."""

    status = 503
    type = "server_error"
    code = "no_capacity"
