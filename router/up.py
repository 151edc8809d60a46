"""`herd up`: a fleet in the foreground, from nothing to serving, and back to nothing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import yaml

from router.cluster import Cluster, is_free, joined_cluster, new_folder, own_cluster
from router.errors import HerdError, ListenError
from router.plan import Plan
from router.progress import Progress, Tale, outstanding
from router.run_directory import Record, RunDirectory, descendants, this_process
from router.serve_rest import ServeError, ServeRest, beside_others, sentence, without

# Each look costs the Serve controller some ten milliseconds.
LOOK_STARTING_S = 0.25
LOOK_RUNNING_S = 2.0
# Looks that may fail in a row before the fleet counts as lost: a busy controller misses one or two.
LOOKS_LOST = 5
# What streams and engines may take to end when the whole fleet does; what is left is then cut.
STOP_S = 20.0


class Interrupted(Exception):
    """Somebody asked for the end: Ctrl-C, SIGTERM, or a terminal that closed."""


@dataclass(frozen=True, slots=True)
class Up:
    """What to run, and where. Without `address` on a Ray cluster of our own."""

    plan: Plan
    directory: RunDirectory
    dashboard_port: int
    address: str | None = None


def run(up: Up, progress: Progress) -> None:
    """Brings the fleet up, watches it until it is asked to end or is lost, and takes all of it down again.

    Raises HerdError (one sentence) when the fleet cannot be had or kept, Interrupted during a start.
    """
    stop = StopSignals()
    with up.directory.claimed():
        if up.address is None:
            stop.install()  # a Ray that is half started must not be left; one that is half joined may
            _refuse_taken_ports(up.plan)
        up.plan.prepare(progress.waiting)
        record = _first_record(up)
        progress.waiting(f"Joining the Ray cluster at {up.address}" if up.address else "Ray is starting")
        with _cluster(up, record) as cluster, ServeRest(cluster.dashboard, cluster.token) as serve:
            stop.install()  # again: Ray took SIGTERM
            record.dashboard, record.ray_address = cluster.dashboard, cluster.address
            record.token_auth = cluster.token is not None
            Session(up, cluster, serve, record, stop, progress).run()


class StopSignals:
    """The first SIGINT, SIGTERM or SIGHUP asks for the end; later ones change nothing."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._raises = False

    def install(self) -> None:
        """Takes the signals."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._ask)

    def pause(self, seconds: float) -> None:
        """Waits; raises Interrupted as soon as the end is asked for."""
        if self.asked(seconds):
            raise Interrupted

    def asked(self, within_s: float) -> bool:
        """Whether the end is asked for within this time."""
        return self._asked.wait(within_s)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Meanwhile the end, asked for at any moment, raises Interrupted there and then.

        A terminal sends Ctrl-C to Ray's dashboard too, and a call to it can then hang until its time is out.
        """
        self._raises = True
        try:
            self.pause(0)
            yield
        finally:
            self._raises = False

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked.set()
        if self._raises:
            self._raises = False  # once: what follows cleans up
            raise Interrupted


class Session:
    """The application on the cluster: put there, waited for, announced, watched, withdrawn."""

    def __init__(
        self,
        up: Up,
        cluster: Cluster,
        serve: ServeRest,
        record: Record,
        stop: StopSignals,
        progress: Progress,
    ) -> None:
        self._plan = up.plan
        self._directory = up.directory
        self._cluster = cluster
        self._serve = serve
        self._record = record
        self._stop = stop
        self._progress = progress
        self._tale = Tale(progress)
        self._misses = 0

    def run(self) -> None:
        """Until it is asked to end. Raises Interrupted when that is before it serves."""
        try:
            with self._stop.interruptible():
                self._deploy()
                self._wait_until_serving()
            self._progress.announce(self._record)
            self._watch()
        finally:
            self._progress.waiting("Stopping: running requests end, then engines, then Ray")
            self._note()
            self._withdraw()

    def _deploy(self) -> None:
        """The way `serve deploy` does it, from the same file."""
        self._progress.waiting("Serve is starting")
        self._directory.serve_config.write_text(yaml.safe_dump(self._plan.document, sort_keys=False))
        self._serve.deploy(beside_others(self._plan.document, self._serve.applications()))

    def _wait_until_serving(self) -> None:
        while not self._serves(application := self._look()):
            if application.get("status") == "DEPLOY_FAILED":
                raise HerdError(self._directory.kept(_why_failed(application)))
            self._progress.waiting(outstanding(application))
            self._stop.pause(LOOK_STARTING_S)
        self._record.ready = True

    def _watch(self) -> None:
        """Tells of replicas that come and go."""
        while not self._stop.asked(LOOK_RUNNING_S):
            self._look()

    def _look(self) -> dict[str, Any]:
        """The application as it is; nothing where a busy Serve did not answer in time."""
        self._note()
        self._cluster.check()
        try:
            application = self._serve.applications().get(self._plan.name, {})
        except ServeError:
            self._misses += 1
            if self._misses == LOOKS_LOST:
                raise
            return {}
        self._misses = 0
        self._tale.tell(application)
        return application

    def _serves(self, application: dict[str, Any]) -> bool:
        if application.get("status") != "RUNNING":
            return False
        if self._record.ray_folder is None:  # the router is where Serve placed it
            host = application["deployments"]["Router"]["replicas"][0]["node_ip"]
            self._record.endpoint, self._record.admin = _urls(self._plan, host)
        try:
            return httpx.get(f"{self._record.endpoint}/ready", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def _note(self) -> None:
        """Every process below this one, engines too, and orphans among them: what `herd down` may end."""
        if self._record.ray_folder is not None:
            known = [p for p in self._record.processes if p.alive]
            current = {(p.pid, p.started): p for p in [*known, *descendants(self._record.herd.pid)]}
            self._record.processes = list(current.values())
        self._directory.write(self._record)

    def _withdraw(self) -> None:
        if self._record.ray_folder is not None and not self._record.ready:
            return  # nobody was served: there is nothing to wait for, and all of it ends with Ray
        try:
            self._cluster.check()
            if self._record.ray_folder is not None:
                self._serve.shut_down(STOP_S)
            else:
                self._serve.deploy(without(self._plan.name, self._plan.document, self._serve.applications()))
        except HerdError:
            # Lost, or slower than it may be. On a cluster of our own, what is left ends with Ray.
            if self._record.ray_folder is None:
                raise


def _cluster(up: Up, record: Record) -> AbstractContextManager[Cluster]:
    if record.ray_folder is None:
        return joined_cluster(str(up.address))
    return own_cluster(Path(record.ray_folder), up.dashboard_port)


def _refuse_taken_ports(plan: Plan) -> None:
    router = plan.fleet.router
    admin_ports = range(router.admin_port, router.admin_port + router.replicas)
    for host, port in ((router.host, router.port), *((router.admin_host, port) for port in admin_ports)):
        if not is_free(host, port):
            raise ListenError(f"Port {port} is taken: something already listens on it.")


def _first_record(up: Up) -> Record:
    """Written before anything is started: a start that is killed leaves a trace too."""
    endpoint, admin = _urls(up.plan, "127.0.0.1")
    record = Record(
        herd=this_process(),
        engine=up.plan.engine,
        models=[model.name for model in up.plan.fleet.models],
        endpoint=endpoint,
        admin=admin,
        routers=up.plan.fleet.router.replicas,
        keyed=up.plan.fleet.router.tenants.closed,
        run_directory=str(up.directory.path),
        ray_folder=str(new_folder()) if up.address is None else None,
    )
    up.directory.write(record)
    return record


def _urls(plan: Plan, host: str) -> tuple[str, str]:
    router = plan.fleet.router
    return f"http://{host}:{router.port}", f"http://{host}:{router.admin_port}"


def _why_failed(application: dict[str, Any]) -> str:
    messages = [d["message"] for d in application["deployments"].values() if d["message"]]
    return sentence("\n".join([application["message"], *messages]))
