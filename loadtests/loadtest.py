"""`herd loadtest SCENARIO`: Locust without its web page, against thresholds. One command per scenario."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path
from typing import Any, NoReturn

import click

from loadtests import arrivals
from loadtests.scenarios import SCENARIOS
from loadtests.scenarios.session import Scenario

HERE = Path(__file__).parent
LOCUSTFILES = (HERE / "locustfile.py", HERE / "judge.py")
# Locust warns above so many new users a second.
SPAWN_RATE = 100
ABOVE_0 = click.FloatRange(min=0, min_open=True)


def command(scenario: type[Scenario]) -> click.Command:
    """The command of a scenario; its own settings are options, too."""
    about = cleandoc(scenario.__doc__ or "")
    return click.Command(
        scenario.name,
        callback=lambda **given: run(scenario, **given),
        params=[*_to_whom(), *_how_much(scenario), *_own(scenario), *_good_enough(scenario)],
        help=f"{about}\n\n{_by_default(scenario)}",
        short_help=re.split("[:.]", about)[0] + ".",
    )


def _by_default(scenario: type[Scenario]) -> str:
    load = scenario.load
    if load.arrivals == arrivals.TRACE:
        much = "as the trace has it"
    elif load.rate:
        much = f"{load.rate:g} sessions a second, {load.arrivals}"
    else:
        much = f"{load.users} users"
    return f"By default {much}, for {load.duration} s."


def _option(flag: str, text: str, **more: Any) -> click.Option:
    shown = more.get("default") not in (None, "")
    return click.Option(flag.split(), help=text, show_default=shown, **more)


def _to_whom() -> Iterator[click.Option]:
    yield _option(
        "--port", "The endpoint's port on this machine.", type=click.IntRange(1, 65535), default=8000
    )
    yield _option("--host", "The endpoint, if it is elsewhere: http://gpu1:8000", metavar="URL")
    yield _option("--model", "Model to ask.  [default: the first there is]", metavar="NAME")
    yield _option("--api-key", "Sent with every request.", envvar="HERD_API_KEY", metavar="KEY")


def _how_much(scenario: type[Scenario]) -> Iterator[click.Option]:
    load = scenario.load
    if scenario.closable:
        text = "A closed loop: so many users, who begin a session when their last has ended."
        yield _option("--users", text, type=click.IntRange(min=1))
    text = "An open loop: so many sessions a second begin, whatever became of those before."
    yield _option("--rate", text, type=ABOVE_0)
    text = f"How they begin in an open loop.  [default: {load.arrivals}]"
    yield _option("--arrivals", text, type=click.Choice(arrivals.KINDS))
    if load.arrivals != arrivals.TRACE:
        file = click.Path(exists=True, dir_okay=False)
        yield _option("--trace", "With --arrivals trace: when its requests came.", type=file)
    yield _option("--speed", "With a trace's arrivals: so many times as fast.", type=ABOVE_0, default=1.0)
    text = "For how many seconds sessions begin."
    yield _option("--duration", text, type=click.IntRange(min=1), default=load.duration)
    text = "Then wait so many seconds for answers; what has not come by then fails."
    yield _option("--drain", text, type=click.IntRange(min=1), default=60)
    yield _option("--seed", "Another seed asks and draws otherwise.", default="herd")


def _own(scenario: type[Scenario]) -> Iterator[click.Option]:
    for setting in scenario.settings():
        flag, text = f"--{setting.name.replace('_', '-')}", f"{setting.metadata['help']}."
        yield _option(flag, text, type=type(setting.default), default=setting.default)


def _good_enough(scenario: type[Scenario]) -> Iterator[click.Option]:
    slo = scenario.slo
    if slo.ttft_p99_ms is not None:  # else nothing is streamed
        text = "Longest time to first token, of 99 % of requests."
        yield _option("--max-ttft-p99-ms", text, type=ABOVE_0, default=slo.ttft_p99_ms)
        text = "Longest time per token after it, of 99 % of requests."
        yield _option("--max-tpot-p99-ms", text, type=ABOVE_0, default=slo.tpot_p99_ms)
    text = "Share of requests that may fail, 0 to 1."
    yield _option("--max-failures", text, type=click.FloatRange(0, 1), default=slo.failures)
    report = Path(f"herd-loadtest-{scenario.name}.html")
    file = click.Path(dir_okay=False, path_type=Path)
    yield _option("--html", "Where the report goes.", type=file, default=report)
    yield _option("--json as_json", "For programs.", is_flag=True)


def run(
    scenario: type[Scenario],
    *,
    port: int,
    host: str | None,
    duration: int,
    drain: int,
    html: Path,
    as_json: bool,
    users: int | None = None,
    **given: Any,
) -> NoReturn:
    """Becomes Locust, whose import has to be a process's first: it makes every socket a cooperative one.

    Settings go by environment, where `ps` shows no keys.
    """
    users = users_of(scenario, users, given)
    url = (host or f"http://127.0.0.1:{port}").rstrip("/")
    if "://" not in url:
        raise click.UsageError(f"--host {host}: a URL is expected, such as http://{host}")
    settings = {
        **given,
        "api_key": next(iter((given["api_key"] or "").split()), ""),  # HERD_API_KEY may hold several
        "judged_tenant": scenario.slo.tenant,
        "summary": "json" if as_json else "text",
    }
    environment = {f"HERD_LOAD_{k.upper()}": str(v) for k, v in settings.items() if v not in (None, "")}
    user_class = f"{scenario.name.title().replace('_', '')}User"
    locust = ["--host", url, "-u", users, "-r", min(users, SPAWN_RATE), "-t", f"{duration}s"]
    report = ["--stop-timeout", drain, "--html", html, "--headless", "--only-summary", "--skip-log-setup"]
    files = ",".join(map(str, LOCUSTFILES))
    argv = [sys.executable, "-m", "locust", "-f", files, *locust, *report, user_class]
    click.echo(f"{scenario.name} at {url}, {duration} s", err=True)
    os.execve(sys.executable, list(map(str, argv)), {**os.environ, **environment})


def users_of(scenario: type[Scenario], users: int | None, given: dict[str, Any]) -> int:
    """How many users Locust needs: one for an open loop. Refuses what makes no sense.

    A closed loop of a scenario that is open otherwise becomes a rate of 0 in `given`.
    """
    try:
        scenario(**{setting.name: given[setting.name] for setting in scenario.settings()})
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    kind = given["arrivals"] or scenario.load.arrivals
    rate = given["rate"] or scenario.load.rate
    if given["trace"] and arrivals.TRACE not in (kind, scenario.load.arrivals):
        raise click.UsageError("--trace needs --arrivals trace.")
    if users is not None:
        if given["rate"] or given["arrivals"]:
            raise click.UsageError("--users makes a closed loop, --rate an open one. Give one of both.")
        given["rate"] = 0
        return users
    if kind == arrivals.TRACE and not given["trace"]:
        raise click.UsageError("--arrivals trace needs --trace FILE.")
    if given["arrivals"] and kind != arrivals.TRACE and not rate:
        raise click.UsageError(f"--arrivals {kind} needs --rate.")
    return 1 if rate or kind == arrivals.TRACE else scenario.load.users


COMMANDS = {scenario.name: command(scenario) for scenario in SCENARIOS}
