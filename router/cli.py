"""The `herd` command. Each command imports what it needs when it runs, so that help does not wait for Ray."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from router.core.placement import POLICIES
from router.errors import HerdError

if TYPE_CHECKING:
    from router.run_directory import RunDirectory
    from router.status import Status

PORT = 8000
ADMIN_PORT = 8001
DASHBOARD_PORT = 8265
# What `herd status` returns when there is no fleet, as systemctl's does for a unit that is not running.
NOT_RUNNING = 3
# How often `herd status --watch` looks.
WATCH_S = 1.0
# What a shell reports for a command that was interrupted (128 + SIGINT).
INTERRUPTED = 130

run_dir = click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where a fleet's record, Serve config and logs are.  [default: ~/.local/state/herd/PORT]",
)


api_keys = click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    metavar="KEY",
    envvar="HERD_API_KEY",
    help="Take requests with this key only; may be given several times. HERD_API_KEY holds keys too, and "
    "shows them to fewer eyes.",
)
api_keys_file = click.option(
    "--api-keys-file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True, resolve_path=True),
    help="Keys and limits of tenants (docs/tenants.md); read again when it changes.",
)
admin_key = click.option(
    "--admin-key",
    metavar="KEY",
    envvar="HERD_ADMIN_KEY",
    help="What admin ports ask for, as HERD_ADMIN_KEY better.  [default: nothing, on loopback]",
)


class Herd(click.Group):
    """Turns every error that Herd raises on purpose into one sentence and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except HerdError as error:
            raise click.ClickException(str(error)) from None


@click.group(cls=Herd, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="herd-fleet")
def main() -> None:
    """One OpenAI-compatible endpoint in front of many vLLM replicas."""


@main.command()
@click.argument("fleet", required=False, type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option(
    "--engine",
    type=click.Choice(["auto", "vllm", "simulated"]),
    help="auto: vLLM where it can run.  [default: auto, or as FLEET says]",
)
@click.option("--model", help="A Hugging Face name or a folder.  [default: a small demo model]")
@click.option("--replicas", type=click.IntRange(min=1), help="How many engines.  [default: 2]")
@click.option(
    "--port", type=click.IntRange(0, 65535), help=f"The endpoint.  [default: {PORT}, or as FLEET says]"
)
@click.option(
    "--admin-port",
    type=click.IntRange(0, 65535),
    help=f"Metrics and state.  [default: {ADMIN_PORT}, or as FLEET says]",
)
@click.option(
    "--address", metavar="RAY_ADDRESS", help="Deploy on this Ray cluster instead of one of our own."
)
@click.option("--dashboard-port", default=DASHBOARD_PORT, show_default="8265 or the next free one")
@api_keys
@api_keys_file
@admin_key
@run_dir
def up(
    fleet: Path | None,
    engine: str | None,
    model: str | None,
    replicas: int | None,
    port: int | None,
    admin_port: int | None,
    address: str | None,
    dashboard_port: int,
    api_keys: tuple[str, ...],
    api_keys_file: Path | None,
    admin_key: str | None,
    run_dir: Path | None,
) -> None:
    """Start a fleet and keep it in the foreground; Ctrl-C ends all of it.

    FLEET is a Ray Serve config file with one Herd application, the one that `serve deploy` takes.
    """
    from router import plan, up
    from router.progress import Progress
    from workers.vllm_engine import where_can_run

    if fleet is None:
        planned = plan.from_flags(engine or "auto", model, replicas, where_can_run())
    elif model or replicas:
        raise click.UsageError("--model and --replicas describe a fleet; so does FLEET. Give one of both.")
    else:
        planned = plan.from_file(fleet, None if engine == "auto" else engine)
    planned = planned.on_ports(port, admin_port).for_tenants(
        _tenants(api_keys, api_keys_file), _hash(admin_key)
    )
    progress = Progress(f"Engine: {planned.engine}.")
    directory = _directory(run_dir, planned.fleet.router.port)
    try:
        up.run(up.Up(planned, directory, dashboard_port, address), progress)
        progress.line("The fleet is down.")
    except up.Interrupted:
        progress.line("Cut short: nothing was left running.")
        sys.exit(INTERRUPTED)
    finally:
        progress.quiet()


@main.command()
@click.option("--port", default=PORT, show_default=True, help="The endpoint's port.")
@run_dir
def down(port: int, run_dir: Path | None) -> None:
    """End the fleet on a port: gracefully, and nothing that its `herd up` did not start."""
    directory = _directory(run_dir, port)
    if not directory.down():
        raise _no_fleet(directory)
    click.echo("The fleet is down.")


@main.command()
@click.option("--port", default=PORT, show_default=True, help="The endpoint's port.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--watch", is_flag=True, help="Again every second, until Ctrl-C.")
@run_dir
def status(port: int, as_json: bool, watch: bool, run_dir: Path | None) -> None:
    """Show the fleet on a port: routers, replicas, where they are. Exit code 3 if there is none."""
    if watch and as_json:
        raise click.UsageError("--watch is for people, --json for programs. Give one of both.")
    directory = _directory(run_dir, port)
    if watch:
        _watch(lambda: _status(directory, port, given=run_dir is not None).as_text())
        return
    told = _status(directory, port, given=run_dir is not None)
    click.echo(told.as_json() if as_json else told.as_text())


def _status(directory: RunDirectory, port: int, given: bool) -> Status:
    """`given`: the directory was asked for, so nothing else will do."""
    from router import status

    record = directory.read()
    if record is not None and record.herd.alive:
        return status.of_fleet(record)
    if given or (told := status.of_port(port)) is None:
        raise _no_fleet(directory)
    return told


def _watch(tell: Callable[[], str]) -> None:
    """What there is to tell, again and again in the same place."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with (
        contextlib.suppress(KeyboardInterrupt),
        Live(console=Console(highlight=False), auto_refresh=False, screen=sys.stdout.isatty()) as live,
    ):
        while True:
            live.update(Text(tell(), no_wrap=True), refresh=True)
            time.sleep(WATCH_S)


@main.command()
@click.argument("request_id", required=False, metavar="ID")
@click.option("--last", type=click.IntRange(1, 1000), help="The last so many requests.  [default: 10]")
@click.option("--port", default=PORT, show_default=True, help="The endpoint's port.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@run_dir
def explain(request_id: str | None, last: int | None, port: int, as_json: bool, run_dir: Path | None) -> None:
    """Show why requests went where they did, what was predicted and what came true.

    ID is the x-request-id of a reply; without it the last requests are listed.
    """
    import msgspec
    from rich.console import Console

    from router import explain

    if request_id is not None and last is not None:
        raise click.UsageError("ID explains one request, --last lists several. Give one of both.")
    admins = _admins(run_dir, port)
    told = explain.on(admins, request_id) if request_id else explain.newest(admins, last or 10)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(told)))
    else:
        # A line too long for the terminal is folded by it; rich would cut every column, numbers too.
        Console(width=explain.WIDTH, highlight=False).print(explain.as_text(told))


@main.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--seconds", type=click.FloatRange(min=0), help="For how long.  [default: until Ctrl-C]")
@click.option("--port", default=PORT, show_default=True, help="The endpoint's port.")
@run_dir
def record(file: Path, seconds: float | None, port: int, run_dir: Path | None) -> None:
    """Record live traffic as a trace that can be replayed: when requests came, how long they were, what their
    prompts have in common; no text.

    FILE is in the form of Mooncake's traces, and compressed if it ends in .gz.
    """
    from router import record

    recorded = record.run(lambda: _admins(run_dir, port), file, seconds)
    click.echo(f"{recorded.requests} requests in {file}.")
    if recorded.blind:
        click.echo(f"The prompts of {recorded.blind} could not be read: they have nothing in common there.")


@main.command()
@click.option(
    "--worker-urls", required=True, multiple=True, metavar="URL...", help="vLLM servers that run already."
)
@click.argument("more_urls", nargs=-1, metavar="")
@click.option("--host", default="0.0.0.0", show_default=True)
@click.option("--port", default=PORT, show_default=True)
@click.option("--admin-host", default="127.0.0.1", show_default=True)
@click.option("--admin-port", default=ADMIN_PORT, show_default=True)
@api_keys
@api_keys_file
@admin_key
@click.option("--policy", help=f"How a replica is chosen: {', '.join(POLICIES)}.  [default: kv_aware]")
@click.option(
    "--model-alias",
    "aliases",
    multiple=True,
    metavar="ALIAS=MODEL",
    help="Another name for a model; may be given several times.",
)
@click.option(
    "--tokenizer",
    "sources",
    multiple=True,
    metavar="[MODEL=]DIR",
    help="Where a model has its tokenizer and chat template.  [default: as its engines say, if it is here]",
)
@click.option(
    "--continuation",
    type=click.Choice(["exact", "off"]),
    default="exact",
    show_default=True,
    help="Whether streams go on at another replica when theirs fails.",
)
@click.option(
    "--slo-ttft-ms",
    type=click.FloatRange(min=0, min_open=True),
    help="Within how long a first token is due, of a long prompt later: what cannot be is refused "
    "(docs/reliability.md).  [default: nothing is promised]",
)
@click.option(
    "--slo-tpot-ms",
    type=click.FloatRange(min=0, min_open=True),
    help="How often a stream's tokens are due: replicas are given no more than that allows.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Router processes that share the port; the nth has the nth admin port.",
)
@click.option(
    "--shards",
    default=1,
    show_default=True,
    help="Shares of the KV index: with 1 every process holds all of it.",
)
def route(
    worker_urls: tuple[str, ...],
    more_urls: tuple[str, ...],
    policy: str | None,
    aliases: tuple[str, ...],
    sources: tuple[str, ...],
    continuation: str,
    slo_ttft_ms: float | None,
    slo_tpot_ms: float | None,
    processes: int,
    api_keys: tuple[str, ...],
    api_keys_file: Path | None,
    admin_key: str | None,
    **listen: Any,
) -> None:
    """Route to vLLM servers that exist, without Ray.

    With several processes SIGHUP replaces them, one after the other, without losing a connection.
    """
    from router.route import promised, run, stands_for, tokenizers
    from router.tokenizer_config import ANY

    settings = {
        **listen,
        "replicas": processes,
        "aliases": stands_for(aliases),
        "tokenizers": tokenizers(sources),
        "continuation": {ANY: continuation},
        "slos": promised(slo_ttft_ms, slo_tpot_ms),
        "tenants": _tenants(api_keys, api_keys_file),
        "admin_key": _hash(admin_key),
    }
    if policy is not None:
        settings["policy"] = policy
    if processes == 1:
        run([*worker_urls, *more_urls], settings, say=click.echo)
    else:
        from router.processes import run as run_several

        sys.exit(run_several([*worker_urls, *more_urls], settings, say=click.echo))


@main.command()
@click.option(
    "--trace",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Requests to replay: Mooncake's JSONL, or that gzipped.",
)
@click.option(
    "--fleet",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A fleet file with one model on simulated engines, such as deploy/sim-8b.yaml.",
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="NAME",
    help="How a replica is chosen: a policy of Herd's, or of a peer (loadtests/baselines.py). "
    "Give several to compare them.  [default: the fleet's]",
)
@click.option(
    "--speed",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Replay the trace so many times as fast.",
)
@click.option("--seed", default=0, show_default=True, help="Another seed spreads and draws otherwise.")
@click.option("--routers", type=click.IntRange(min=1), help="Router processes.  [default: the fleet's]")
@click.option("--replicas", type=click.IntRange(min=1), help="How many engines.  [default: the fleet's]")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def simulate(
    trace: Path,
    fleet: Path,
    policies: tuple[str, ...],
    speed: float,
    seed: int,
    routers: int | None,
    replicas: int | None,
    as_json: bool,
) -> None:
    """Replay a trace of requests against a fleet in virtual time: half an hour of traffic in seconds.

    The router's own code places the requests, on engines whose cache and clock are modelled. The same seed
    gives the same result.
    """
    from rich.console import Console

    from loadtests import simulate as twin

    simulated = twin.fleet_of(fleet, replicas, routers)
    chosen = policies or (simulated.policy,)
    twin.check(chosen)
    arrivals = twin.arrivals_of(trace, speed, seed)
    results = []
    for name in chosen:
        with Console(stderr=True).status(f"{name} ..."):
            results.append(twin.Result.of(name, arrivals, simulated, seed))
    if as_json:
        click.echo(twin.as_json(trace.name, speed, seed, simulated, results))
        return
    # Nothing is folded where no terminal has to be fitted.
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 1000)
    out.print(twin.title(trace.name, speed, arrivals, simulated), end="\n\n")
    out.print(twin.report(results))
    out.print(f"\n{twin.NOTE}", style="dim")


class Scenarios(click.Group):
    """A command for each scenario."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names, in the order of the documentation."""
        from loadtests.loadtest import COMMANDS

        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """None if there is none of that name."""
        from loadtests.loadtest import COMMANDS

        return COMMANDS.get(name)


@main.group(cls=Scenarios, invoke_without_command=True, subcommand_metavar="SCENARIO [OPTIONS]")
@click.pass_context
def loadtest(ctx: click.Context) -> None:
    """Put load on an endpoint, and check what came of it: exit code 1 where a threshold was broken.

    `herd loadtest SCENARIO --help` shows what can be set.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@main.group()
def key() -> None:
    """Make keys: shown once, kept as hashes."""


@key.command()
@click.argument("tenant", metavar="TENANT")
def new(tenant: str) -> None:
    """A key for a tenant, and what the file of tenants says of it."""
    from router.keys import hash_of, new_key

    made = new_key()
    click.echo(f"# The key of {tenant}, shown this once: {made}", err=True)
    click.echo(f"  {tenant}:\n    keys: [{hash_of(made)}]")


@key.command()
def admin() -> None:
    """A key for admin ports, and what the router's settings say of it."""
    from router.keys import ADMIN_KEY, hash_of, new_key

    made = new_key()
    click.echo(f"# The key of admin ports, shown this once: {ADMIN_KEY}={made}", err=True)
    click.echo(f"admin_key: {hash_of(made)}")


@key.command()
def secret() -> None:
    """What a file of tenants needs to keep their caches apart."""
    from router.keys import new_secret

    click.echo(f"secret: {new_secret()}")


@main.group()
def engine() -> None:
    """Run one engine by itself."""


@engine.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []}, add_help_option=False
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def simulated(arguments: tuple[str, ...]) -> None:
    """A server that speaks as vLLM does, with a modelled clock and cache; --help lists its options."""
    from workers.simulated.server import main

    sys.exit(main(list(arguments)))


def _tenants(api_keys: Sequence[str], file: Path | None) -> dict[str, Any]:
    """`router.tenants`; of keys nothing but their hashes goes on from here.

    A key that is empty was meant to be one: without it anybody could ask.
    """
    from router.keys import hash_of

    if not all(api_keys) or ("HERD_API_KEY" in os.environ and not api_keys):
        raise click.UsageError("--api-key, or HERD_API_KEY, is empty.")
    return {
        **({"file": str(file)} if file is not None else {}),
        **({"keys": [hash_of(key) for key in api_keys]} if api_keys else {}),
    }


def _hash(key: str | None) -> str | None:
    from router.keys import hash_of

    return hash_of(key) if key else None


def _directory(given: Path | None, port: int) -> RunDirectory:
    from router import run_directory

    return run_directory.RunDirectory(given) if given is not None else run_directory.default(port)


def _admins(run_dir: Path | None, port: int) -> list[str]:
    """The admin ports of the fleet on a port, as URLs; exit code 3 if there is none."""
    from router import status

    directory = _directory(run_dir, port)
    record = directory.read()
    if record is not None and record.herd.alive:
        return status.admins_of_fleet(record)
    if run_dir is None and (found := status.admins_of_port(port)):
        return found
    raise _no_fleet(directory)


def _no_fleet(directory: RunDirectory) -> click.ClickException:
    error = click.ClickException(f"No fleet is up here ({directory.path}).")
    error.exit_code = NOT_RUNNING
    return error


if __name__ == "__main__":
    main()
