import os
import socket

import pytest

from router.errors import ListenError
from router.http import listener


@pytest.mark.parametrize(
    ("there", "here", "clash"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "0.0.0.0", True),
        ("0.0.0.0", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("::", "127.0.0.1", True),
        ("::1", "127.0.0.1", False),
        ("::1", "::", True),
        ("127.0.0.1", "::", True),
        ("127.0.0.1", "localhost", True),
    ],
)
def test_who_listens_where_an_address_does(there, here, clash):
    with listener.listen(there, 0, shared=True) as other:
        port = other.getsockname()[1]
        assert listener.listening(here, port) == ({listener.inode(other)} if clash else set())
        assert listener.listening(here, port + 1 if port < 65535 else 1) == set()


def test_a_bound_socket_does_not_listen():
    with listener.bind("127.0.0.1", 0, shared=True) as bound:
        assert listener.listening("127.0.0.1", bound.getsockname()[1]) == set()


def test_the_holder_of_a_socket_is_named():
    with listener.listen("127.0.0.1", 0) as ours:
        assert listener.holder(listener.inode(ours)).endswith(f"(process {os.getpid()})")
    assert listener.holder(0) == "another process"


def test_only_shared_sockets_share():
    with listener.listen("127.0.0.1", 0, shared=True) as first:
        port = first.getsockname()[1]
        listener.listen("127.0.0.1", port, shared=True).close()
        with pytest.raises(ListenError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            listener.listen("127.0.0.1", port)


def test_a_socket_passed_on_is_the_same_socket():
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right, listener.listen("127.0.0.1", 0) as ours:
        listener.send(left, b"take", [ours])
        message, (theirs,) = listener.receive(right)
        with theirs:
            assert (message, listener.inode(theirs)) == (b"take", listener.inode(ours))
            assert not theirs.getblocking()
            assert not theirs.get_inheritable()
        left.close()
        assert listener.receive(right) == (b"", [])
