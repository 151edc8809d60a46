"""The server that the public `vllm serve` runs, for CPUs: its engine process is forked instead of spawned.

Importing vLLM is nearly all of a small model's start, and a spawned engine imports it a second time. Run by
vLLM's own Python, as a file with -P: nothing of Herd is to be imported here, nor from the folder it lies in.
The CPU platform sets VLLM_WORKER_MULTIPROC_METHOD to spawn, whatever it was.
"""

import multiprocessing
import os
import signal
import socket
import stat

import vllm.v1.worker.cpu_worker  # noqa: F401  what the engine process imports, while it is still one process
from vllm.entrypoints.launchers.api_server import entry
from vllm.v1.engine import core, utils  # noqa: F401


def as_if_spawned() -> None:
    """Lets go of what belongs to the server: its signals, and the port, which would stay open after it."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
        if is_tcp(fd):
            # Not closed: a socket object still has the number, and would close whatever had it next.
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, fd, inheritable=False)
            os.close(null)


def is_tcp(fd: int) -> bool:
    """Whether this is a socket of a network."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return False
    except OSError:  # the listing's own
        return False
    opened = socket.socket(fileno=fd)
    opened.detach()
    return opened.family in (socket.AF_INET, socket.AF_INET6)


# Worker processes of several ranks are spawned, and import this file.
if __name__ == "__main__":
    os.register_at_fork(after_in_child=as_if_spawned)
    utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    entry.main()
