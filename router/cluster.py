"""The Ray cluster under a fleet: one of our own for as long as we run, or one that others keep."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from router.errors import HerdError
from router.run_directory import Process, descendants

# Set before Ray is imported; its processes and ours inherit them.
ENVIRONMENT = {
    # Ray starts workers at nice 15: routers and engines would lose against anything else on the machine.
    "RAY_worker_niceness": "0",
    # In spite of its name: with this off, all of Ray stays on the loopback interface.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # How often Serve tries to start a replica is for each deployment to say (router/app.py).
    "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1000000",
}
# Nothing large passes through Ray's object store here. Ray takes no less than 75 MB.
OBJECT_STORE_BYTES = 100 * 2**20
# A Unix socket's path holds 107 characters (unix(7)); Ray adds 64 to its folder's and we 16 to the parent's.
PARENT_LENGTH = 27
# Without these two there is no cluster. Both are children of the process that called `ray.init`.
VITAL = ("raylet", "gcs_server")

# A cluster that is there takes a connection at once, wherever it is.
REACH_S = 5.0
# Where Ray keeps the token that it made for this user.
TOKEN = Path.home() / ".ray" / "auth_token"


class ClusterError(HerdError):
    """Ray cannot be started or reached, or is lost."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Ray cluster that this process has joined; our own cannot live without its `vital` processes."""

    address: str
    dashboard: str
    token: str | None
    vital: tuple[Process, ...] = ()

    def check(self) -> None:
        """Raises ClusterError when our own cluster is lost."""
        for process in self.vital:
            if not process.alive:
                raise ClusterError(
                    f"Ray's {process.name} (process {process.pid}) ended, and the fleet with it."
                )


def new_folder() -> Path:
    """An empty folder for Ray, with a path that its sockets fit in."""
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="herd-", dir=parent if len(parent) <= PARENT_LENGTH else "/tmp"))


@contextmanager
def own_cluster(folder: Path, dashboard_port: int) -> Iterator[Cluster]:
    """A cluster of this machine alone, in this folder, that ends with us."""
    # With it every worker would compile every module again, for seconds.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ.update(ENVIRONMENT)
    try:
        address, dashboard = _start_again(folder, _free_port(dashboard_port))
        vital = tuple(p for p in descendants(os.getpid()) if p.name in VITAL)
        yield Cluster(address, dashboard, _token(), vital)
    finally:
        _leave()


@contextmanager
def joined_cluster(address: str) -> Iterator[Cluster]:
    """A cluster that others keep: this process only joins and leaves it."""
    try:
        yield Cluster(*_join(address), _token())
    finally:
        _leave()


def is_free(host: str, port: int) -> bool:
    """Nobody listens on the port; listeners that would share it (SO_REUSEPORT) count too."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _free_port(wanted: int) -> int:
    while not is_free("127.0.0.1", wanted):
        wanted += 1
    return wanted


def _start_again(folder: Path, dashboard_port: int) -> tuple[str, str]:
    """A second try: Ray gives its node 30 s (a constant), which a busy machine can miss once."""
    try:
        return _start(folder, dashboard_port)
    except ClusterError:
        _leave()
        return _start(folder, dashboard_port)


def _start(folder: Path, dashboard_port: int) -> tuple[str, str]:
    import ray

    try:
        context = ray.init(
            address="local",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=dashboard_port,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=str(folder),
        )
    except Exception as error:  # for a node that does not come up Ray raises the bare class
        raise ClusterError(f"Ray did not start: {error}") from error
    return context.address_info["gcs_address"], f"http://{context.dashboard_url}"


def _join(address: str) -> tuple[str, str]:
    _prepare_to_join(address)
    import ray

    try:
        context = ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        raise ClusterError(f"No Ray cluster can be joined at {address}: {error}") from error
    if not context.dashboard_url:
        raise ClusterError(
            f"The Ray cluster at {address} has no dashboard, and Serve is deployed through it."
        )
    return context.address_info["gcs_address"], f"http://{context.dashboard_url}"


def _prepare_to_join(address: str) -> None:
    """Finds out in a moment what takes Ray minutes, and lets it reach a cluster like `own_cluster`."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # "auto" and other words of Ray's
    try:
        socket.create_connection((host, int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise ClusterError(f"No Ray cluster answers at {address}: {error.strerror or error}.") from None
    if host == "localhost" or host.startswith("127."):
        os.environ.update(ENVIRONMENT)
        if (
            TOKEN.is_file()
        ):  # Ray sends it to an explicit address only when told to; this one is our own machine
            os.environ.setdefault("RAY_AUTH_MODE", "token")


def _leave() -> None:
    import ray

    ray.shutdown()


def _token() -> str | None:
    # Knows every place a token can be in (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token). Ray's own
    # REST clients use it; it has no public name.
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    header = get_auth_headers_if_auth_enabled({}).get("authorization", "")
    return header.removeprefix("Bearer ") or None
