"""Runs one engine so that nothing of it outlives its owner: `python -I -S supervisor.py ARGV...`.

Standard input is a link to the owner. Its end means that the owner is gone, however it went, and that the
engine must go too. A kill -9 of the supervisor itself must not leave the engine behind either, so there are
two of them, one inside the other, and no single death goes unseen:

  owner ---link--- outer --- inner --- engine --- whatever the engine starts
  owner dies       both read the end of the link; each kills all below it
  outer dies       the kernel tells the inner (PDEATHSIG), which kills all below it
  inner dies       the kernel kills the engine; what the engine had started falls to the outer, which kills it
  engine ends      the inner kills what is left of it, then both end with the engine's status

Each has a session of its own, so that no signal to a group or a terminal reaches more than one. The engine's
process id goes up the link. Only the standard library is used, without site-packages, to start fast and stay
small.
"""

import ctypes
import os
import select
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
LINK = 0
PARENT_DIED = signal.SIGUSR2  # what the inner one asks the kernel for
PASSED_ON = (signal.SIGTERM, signal.SIGINT)
KILLED = 128 + signal.SIGKILL


def main(argv: list[str]) -> int:
    """The engine's exit status; 128 + n where signal n ended it, as a shell gives it."""

    def engine() -> None:
        execute(argv)

    def inner() -> None:
        os._exit(guard(engine, signal.SIGKILL))

    return guard(inner, PARENT_DIED)


def guard(run: Callable[[], None], on_parent_death: int) -> int:
    """Runs this in a child and gives its exit status, once nothing that it started is left."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    wake = catch_signals()
    child = start(run, on_parent_death)
    status = watch(child, wake)
    kill_descendants()
    return status


def catch_signals() -> int:
    """A descriptor that gives one byte, its number, for each signal that matters here."""
    wake, ring = os.pipe()
    os.set_blocking(ring, False)
    for number in (*PASSED_ON, PARENT_DIED, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(ring)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the parent may have blocked some
    return wake


def start(run: Callable[[], None], on_parent_death: int) -> int:
    """A child in a session of its own that gets this signal when its parent dies."""
    parent = os.getpid()
    # Until the child has handlers of its own, signals to it must wait: the parent's would swallow them.
    signal.pthread_sigmask(signal.SIG_BLOCK, (*PASSED_ON, PARENT_DIED))
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            prctl(PR_SET_PDEATHSIG, on_parent_death)
            if os.getppid() == parent:  # else it died before the kernel was asked
                run()
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(127)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    return child


def execute(argv: list[str]) -> None:
    """Becomes the engine, which gets no link; says in its log when there is no such program."""
    os.write(LINK, str(os.getpid()).encode())
    os.dup2(os.open(os.devnull, os.O_RDONLY), LINK)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        print(f"cannot run {argv[0]}: {error.strerror}", file=sys.stderr, flush=True)


def watch(child: int, wake: int) -> int:
    """Waits until the child ends, or must be ended because the owner or the parent did."""
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    poll.register(LINK, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if LINK in ready and not os.read(LINK, 1):
            return KILLED
        for number in os.read(wake, 64) if wake in ready else b"":
            if number == PARENT_DIED:
                return KILLED
            if number in PASSED_ON:
                os.kill(child, number)
        if (status := reap(child)) is not None:
            return status


def reap(child: int) -> int | None:
    """Takes in what has ended; the child's status if it was among it."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        if pid == 0:
            return None


def kill_descendants() -> None:
    """Kills children until there are none; orphans further down become children of this, their subreaper."""
    while True:
        for pid in children():
            os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def children() -> list[int]:
    """The processes whose parent this one is, ended ones too."""
    me = os.getpid()
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and parent_of(entry) == me]


def parent_of(pid: str) -> int | None:
    """The fourth field of its stat, counted from behind the name, which may hold anything."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return int(stat.read().rpartition(b")")[2].split()[1])
    except OSError:
        return None


def prctl(option: int, value: int) -> None:
    """Sets this for the process."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
