"""Listening sockets: made, found in the kernel's tables, and passed from one process to another."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from router.errors import ListenError

BACKLOG = 4096  # connections the kernel holds while a burst is accepted
# The kernel takes 253 descriptors in one message (SCM_MAX_FD); no process has that many listening sockets.
MAX_PASSED = 64
LISTEN = "0A"  # the state as /proc/net/tcp writes it (net/tcp_states.h)


def listen(host: str, port: int, shared: bool = False) -> socket.socket:
    """A listening socket; `shared`, others of this user may listen on the port too (SO_REUSEPORT).

    Raises ListenError.
    """
    listener = bind(host, port, shared)
    try:
        # Linux lets two sockets bind with SO_REUSEADDR as long as none listens: only listening settles it.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _refused(host, port, error) from None
    listener.setblocking(False)
    return listener


def bind(host: str, port: int, shared: bool = False) -> socket.socket:
    """A socket that has the port and gets no connections. Raises ListenError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise _refused(host, port, error) from None
    return bound


def _refused(host: str, port: int, error: OSError) -> ListenError:
    return ListenError(f"cannot listen on {host}:{port}: {error.strerror}")


# -- what the kernel knows


def inode(listener: socket.socket) -> int:
    """What the kernel calls this socket; the same in every process that has it."""
    return os.fstat(listener.fileno()).st_ino


def listening(host: str, port: int) -> set[int]:
    """The inodes of all sockets of this network namespace that listen where this address does, too."""
    here = _address(host)
    return {number for there, number in _listeners(port) if _overlap(here, there)}


def holder(number: int) -> str:
    """Who has a socket, for people: its name and process id where /proc lets this user see them."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == f"socket:[{number}]":
                process = link.parent.parent
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
        except OSError:
            continue  # it ended, or it is another user's
    return "another process"


Address = IPv4Address | IPv6Address


def _address(host: str) -> Address:
    try:
        return ip_address(host)
    except ValueError:  # a name, such as localhost
        return ip_address(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])


def _overlap(a: Address, b: Address) -> bool:
    """`::` counts as every address of IPv4 too: whether it is (IPV6_V6ONLY) is not told."""
    if a.version == b.version:
        return a == b or a.is_unspecified or b.is_unspecified
    return (a if a.version == 6 else b).is_unspecified


def _listeners(port: int) -> Iterator[tuple[Address, int]]:
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except FileNotFoundError:  # a kernel without IPv6
            continue
        for fields in map(str.split, lines):
            address, _, number = fields[1].partition(":")
            if fields[3] == LISTEN and int(number, 16) == port:
                yield _unhex(address), int(fields[9])


def _unhex(address: str) -> Address:
    """Words of 32 bits, each in the machine's byte order."""
    words = bytes.fromhex(address)
    swapped = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
    return ip_address(swapped)


# -- between processes


def send(channel: socket.socket, message: bytes, listeners: Iterable[socket.socket] = ()) -> None:
    """A message to the process at the other end of a Unix socket, and these sockets with it."""
    socket.send_fds(channel, [message], [listener.fileno() for listener in listeners])


def receive(channel: socket.socket) -> tuple[bytes, list[socket.socket]]:
    """The next message and the sockets that came with it; nothing when the other end is closed."""
    message, descriptors, _, _ = socket.recv_fds(channel, 64, MAX_PASSED)
    listeners = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    for listener in listeners:
        listener.set_inheritable(False)  # Python 3.11 does not pass MSG_CMSG_CLOEXEC on
        listener.setblocking(False)  # a flag of the socket itself: whoever clears it stops its other holder
    return message, listeners
