"""What users do, as values: a session is its requests one after the other, and where it forks."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import Field, dataclass, field, fields
from math import inf
from typing import Any, ClassVar, TypeAlias

from loadtests.arrivals import Piece

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ask:
    """One chat request.

    `after`: seconds since the answer before it, for thinking or running a tool. `tenant`: whose key it
    carries; its figures bear that name. `priority`: its class where requests wait; lower goes first.
    """

    messages: Sequence[Message]
    output_tokens: int
    after: float = 0.0
    tools: Sequence[dict[str, Any]] = ()
    stream: bool = True
    tenant: str = ""
    priority: int | None = None


@dataclass(frozen=True, slots=True)
class Fork:
    """Branches that run at once; the session goes on when all of them have ended."""

    branches: Sequence[Session]


# Yields what comes next and is sent what the model answered, or None after a fork. One whose answer broke off
# is not gone on with.
Session: TypeAlias = Generator[Ask | Fork, str | None, None]


@dataclass(frozen=True, slots=True)
class Load:
    """How much of a scenario there is if nothing else is said.

    Closed loop: `users` begin their next session when their last has ended. Open loop, where there is a
    `rate` or a trace: so many sessions a second begin, whatever became of those before. `duration` in s.
    """

    users: int = 1
    rate: float = 0.0
    arrivals: str = "poisson"
    duration: int = 60


@dataclass(frozen=True, slots=True)
class Slo:
    """What a run has to keep to pass: milliseconds, and the share of requests that may fail.

    None: not asked for. `tenant`: whom it is promised, if not everybody.
    """

    ttft_p99_ms: float | None = 2000.0
    tpot_p99_ms: float | None = 50.0
    failures: float = 0.0
    tenant: str = ""


def setting(default: Any, text: str, least: float = 0) -> Any:
    """A field of a scenario that is an option of its command, too."""
    return field(default=default, metadata={"help": text, "least": least})


@dataclass(frozen=True)
class Scenario:
    """What users do, and how much of it; fields are its settings. ValueError for one that is too small."""

    name: ClassVar[str]
    load: ClassVar[Load]
    slo: ClassVar[Slo] = Slo()
    # Whether it is still the same when its sessions wait for those before.
    closable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for known in fields(self):
            value, least = getattr(self, known.name), known.metadata["least"]
            if not isinstance(value, str) and value < least:
                raise ValueError(f"{known.name} must be at least {least}, not {value}")

    @classmethod
    def settings(cls) -> Sequence[Field[Any]]:
        """Its settings: name, default, and of the metadata `help` and `least`."""
        return fields(cls)

    @classmethod
    def of(cls, options: object) -> Scenario:
        """The one that a command line asks for; what it leaves open is as always."""
        given = ((known, getattr(options, known.name, None)) for known in cls.settings())
        return cls(**{k.name: type(k.default)(value) for k, value in given if value not in (None, "")})

    def session(self, seed: str) -> Session:
        """A session that only the seed and the answers decide."""
        raise NotImplementedError

    def starts(self, moments: Iterable[float], seed: str) -> Iterator[tuple[float, Session]]:
        """Sessions and when they begin, in seconds since the first could have."""
        for number, moment in enumerate(moments):
            yield moment, self.session(f"{seed}/{number}")

    def rates(self, rate: float, duration: float) -> Sequence[Piece]:
        """How many sessions a second begin, and for how long, in a run of so many seconds."""
        return [(inf, rate)]


def say(role: str, content: str) -> Message:
    """A message of plain text."""
    return {"role": role, "content": content}


def around(mean: float, chance: float) -> float:
    """Anything from half the mean to half above it; `chance` is from 0 to 1."""
    return mean * (0.5 + chance)
