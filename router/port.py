"""Who listens on a port: the router processes of one fleet on this machine, as a folder per port tells it.

The folder holds a record of each process and a Unix socket on which it answers the others. Records are
changed under one lock and replaced whole, so that reading them takes none. A process is there as long as its
id and start time are in /proc: one that was killed needs no cleaning up.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec

from router.errors import ListenError
from router.run_directory import Process

LOCK_LOOK_S = 0.01  # the lock is held for milliseconds


class Contact(msgspec.Struct, frozen=True):
    """A router process to the others: where it listens, and the key (hex) of what it says.

    `direct`: where it takes requests that others pass on to it.
    """

    name: str
    host: str
    port: int
    key: str
    direct: int | None = None

    @property
    def url(self) -> str:
        """Where requests are passed on to it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.direct}"

    def sign(self, report: bytes) -> bytes:
        """Tells that a report is this process's."""
        return hashlib.blake2b(report, key=self.key.encode(), digest_size=16).digest()


class Member(msgspec.Struct, frozen=True):
    """One router process on the port, as it tells the others."""

    name: str
    process: Process
    fleet: str
    rank: int | None = None  # None: it is leaving
    admin_port: int | None = None
    contact: Contact | None = None
    listeners: tuple[int, ...] = ()  # the inodes of its listening sockets

    @property
    def open(self) -> bool:
        """It takes connections, and will go on."""
        return self.rank is not None and bool(self.listeners)

    @property
    def present(self) -> bool:
        """It takes connections, or will; one that only finishes its streams does not."""
        return self.rank is not None or bool(self.listeners)


class Port:
    """The folder of one port."""

    def __init__(self, number: int) -> None:
        # Who shares the folder need not share the port: containers may have one /tmp and several networks.
        network = os.stat("/proc/self/ns/net").st_ino
        self._user = Path(tempfile.gettempdir()) / f"herd-{os.getuid()}"
        self._path = self._user / f"{number}-{network}"

    def members(self) -> list[Member]:
        """Every process on the port by rank, then those that are leaving."""
        alive = [member for member in self._recorded() if member.process.alive]
        return sorted(alive, key=lambda m: (m.rank is None, m.rank, m.process.started))

    @asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Alone with the folder; it is there, and what the dead had in it is not. Raises ListenError."""
        lock = await self._lock()
        try:
            for member in self._recorded():
                if not member.process.alive:
                    self.forget(member.name)
            yield
            if not self._recorded():
                shutil.rmtree(self._path)
        finally:
            os.close(lock)

    def write(self, member: Member) -> None:
        """Replaces a process's record."""
        new = self._path / f"{member.name}.new"
        new.write_bytes(msgspec.json.encode(member))
        new.replace(self._path / f"{member.name}.json")

    def forget(self, name: str) -> None:
        """Removes all that is there of a process."""
        for suffix in ("json", "new", "sock"):
            (self._path / f"{name}.{suffix}").unlink(missing_ok=True)

    @contextmanager
    def address(self, name: str) -> Iterator[str]:
        """Where a process answers: a path of fewer than 108 characters, wherever the folder is (unix(7))."""
        folder = os.open(self._path, os.O_PATH | os.O_DIRECTORY)
        try:
            yield f"/proc/self/fd/{folder}/{name}.sock"
        finally:
            os.close(folder)

    async def _lock(self) -> int:
        """The descriptor that holds the lock of the folder as it is now: the last to leave removes it."""
        while True:
            for folder in (self._user, self._path):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                _refuse_unless_ours(folder)
            with contextlib.suppress(FileNotFoundError):
                lock = os.open(self._path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
                while not _flocked(lock):  # meanwhile others may need an answer from this process
                    await asyncio.sleep(LOCK_LOOK_S)
                if os.fstat(lock).st_nlink:
                    return lock
                os.close(lock)

    def _recorded(self) -> list[Member]:
        members = []
        for path in self._path.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # it left meanwhile
                members.append(_read(path))
        return members


def _read(record: Path) -> Member:
    """Raises ListenError: a process of another version may have been killed on this port, or be there."""
    try:
        return msgspec.json.decode(record.read_bytes(), type=Member)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        told = f"{record} cannot be read ({error}); remove it if no router has the port"
        raise ListenError(told) from None


def _refuse_unless_ours(folder: Path) -> None:
    """Anybody may make a folder in /tmp, and whoever owns it could hand out sockets of theirs."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ListenError(f"{folder} must be a folder of this user that nobody else may enter")


def _flocked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
