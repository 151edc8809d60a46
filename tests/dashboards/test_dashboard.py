"""The dashboard and the alert rules against a real Prometheus that scrapes a real router and its engines."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from support import (
    HERD,
    ROOT,
    Server,
    Start,
    eventually,
    free_port,
    free_ports,
    get,
    processes,
    router,
    simulated_engine,
    states,
    wait_for,
)

DASHBOARD = json.loads((ROOT / "dashboards" / "herd.json").read_text())
PROMETHEUS = ROOT / "deploy" / "prometheus"
ALERTS = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
QUERIES = [
    pytest.param(target["expr"], id=f"{panel['title']}-{target['legendFormat']}".replace(" ", "_"))
    for panel in PANELS
    for target in panel["targets"]
]
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
# So many that each of the three replicas gets one, however they are placed.
MOST_STREAMS = 12
METRIC = re.compile(r"\b(?:herd_|vllm:|process_|up\b)[a-z0-9_]*")

needs_prometheus = pytest.mark.debian


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip("the Debian package prometheus is not here")
    return path


def substituted(expression: str, model: str = "All", replica: str = "All") -> str:
    """A query as Grafana sends it: variables with nothing chosen, or with one value."""
    values = {"model": model, "replica": replica}
    for name, value in values.items():
        regex = VARIABLES[name]["allValue"] if value == "All" else re.escape(value).replace("\\", "\\\\")
        expression = expression.replace(f"${name}", regex)
    return expression.replace("$interval", VARIABLES["interval"]["current"]["value"])


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Prometheus, set up as it ships, over a fleet that had traffic and every trouble."""
    binary = program("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    with processes(folder) as start:
        engines = [simulated_engine(start) for _ in range(3)]
        front = router(start, *engines)
        url = start_prometheus(start, binary, folder, front.admin.removeprefix("http://"))
        eventually(lambda: len(query(url, 'up{job="herd-engines"} == 1')) == len(engines), timeout=30)
        trouble(front, engines)
        yield url


def start_prometheus(start: Start, binary: str, folder: Path, front: str, key: str | None = None) -> str:
    """Prometheus with the configuration that ships, but for the admin port of the router and the pace."""
    text = (PROMETHEUS / "prometheus.yml").read_text()
    text = text.replace("127.0.0.1:8001", front).replace("interval: 5s", "interval: 1s")
    if key is not None:
        assert text.count("# authorization: ") == 3
        text = text.replace("# authorization: ", "authorization: ")
        (folder / "herd-admin-key").write_text(f"{key}\n")
    (folder / "prometheus.yml").write_text(text)
    shutil.copy(PROMETHEUS / "alerts.yml", folder)
    listen = f"127.0.0.1:{free_port()}"
    files = (f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data")
    running = start(binary, *files, f"--web.listen-address={listen}")
    wait_for(running, f"http://{listen}/-/ready")
    return f"http://{listen}"


def trouble(front: Server, engines: list[Server]) -> None:
    """Everything that a panel can show: answers, a client that leaves, a broken stream, a dead replica."""
    model = get(f"{front.url}/v1/models").json()["data"][0]["id"]
    for _ in range(4):
        assert b"[DONE]" in chat(front, model, max_tokens=8)
    with stream(front, model, max_tokens=300) as leaving:
        next(leaving.iter_lines())
    with ThreadPoolExecutor(MOST_STREAMS) as pool:
        streams: list[Future[bytes]] = []

        def all_stream() -> bool:
            # Each of another herd: the same prompt would go where it is cached, and so to one replica. With a
            # seed no stream goes on elsewhere.
            if len(streams) < MOST_STREAMS:
                n = len(streams)
                streams.append(pool.submit(chat, front, model, 1000, f"of herd {n}", seed=n))
            return streaming(front)

        eventually(all_stream)
        engines[0].running.kill()
        assert any(b"[DONE]" not in s.result() for s in streams)
    eventually(lambda: states(front)[engines[0].url] == "down", timeout=30)
    engines[1].running.kill()
    for _ in range(3):
        assert b"[DONE]" in chat(front, model, max_tokens=8)


def chat(front: Server, model: str, max_tokens: int, which: str = "of ours", **more: Any) -> bytes:
    with stream(front, model, max_tokens, which, **more) as response:
        return response.read()


def stream(front: Server, model: str, max_tokens: int, which: str = "of ours", **more: Any) -> Any:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"Of the herd {which}: how many are sheep? " * 20}],
        "max_tokens": max_tokens,
        "stream": True,
        "ignore_eos": True,
        **more,
    }
    return httpx.stream("POST", f"{front.url}/v1/chat/completions", json=body, timeout=30, verify=False)


def streaming(front: Server) -> bool:
    """Every replica is in the middle of a stream. A request that got no token yet would only be retried."""
    fleet = get(f"{front.admin}/fleet").json()
    return all(r["in_flight"] > r["awaiting_first_token"] for r in fleet["replicas"])


def query(url: str, expression: str) -> list[Any]:
    reply = get(f"{url}/api/v1/query", query=expression).json()
    assert reply["status"] == "success", f"{expression}: {reply}"
    return reply["data"]["result"]


@needs_prometheus
@pytest.mark.parametrize("expression", QUERIES)
def test_every_panel_has_data(prometheus, expression):
    def values() -> list[str]:
        values = [series["value"][1] for series in query(prometheus, substituted(expression))]
        return [value for value in values if value != "NaN"]

    eventually(values, timeout=20)


@needs_prometheus
@pytest.mark.parametrize(("name", "panel"), [("model", "Stream events"), ("replica", "In flight")])
def test_a_variable_lists_what_is_there_and_narrows(prometheus, name, panel):
    listed = re.fullmatch(r"label_values\((.*), (\w+)\)", VARIABLES[name]["definition"])
    assert listed is not None
    values = {series["metric"][listed[2]] for series in query(prometheus, substituted(listed[1]))}
    assert len(values) == (1 if name == "model" else 3)
    expression = next(p for p in PANELS if p["title"] == panel)["targets"][0]["expr"]
    for value in values:
        shown = query(prometheus, substituted(expression, **{name: value}))
        assert [series["metric"][name] for series in shown] == [value]


@needs_prometheus
def test_an_admin_port_that_asks_for_a_key_gets_it_from_prometheus(start, tmp_path):
    engine, port, admin = simulated_engine(start), str(free_port()), free_ports(1)
    ports = ("--host", "127.0.0.1", "--port", port, "--admin-port", str(admin))
    running = start(*HERD, "route", *ports, "--worker-urls", engine.url, env={"HERD_ADMIN_KEY": "the key"})
    wait_for(running, f"http://127.0.0.1:{port}/ready")
    url = start_prometheus(start, program("prometheus"), tmp_path, f"127.0.0.1:{admin}", "the key")

    def seen() -> bool:
        return sorted(s["metric"]["job"] for s in query(url, "up == 1")) == ["herd-engines", "herd-router"]

    eventually(seen, timeout=30)


@needs_prometheus
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_reads_metrics_that_exist(prometheus, rule):
    """An alert is rightly silent while all is well, so what is looked for is what it compares."""
    query(prometheus, rule["expr"])
    for metric in METRIC.findall(rule["expr"]):
        eventually(lambda metric=metric: query(prometheus, metric), timeout=20)


@needs_prometheus
def test_alerts_see_the_trouble(prometheus):
    def raised() -> bool:
        alerts = get(f"{prometheus}/api/v1/alerts").json()["data"]["alerts"]
        names = {alert["labels"]["alertname"] for alert in alerts}
        # These engines publish no KV events.
        assert names == {"HerdReplicaDown", "HerdReplicaNotExact", "HerdStreamsTruncated"}
        return True

    eventually(raised, timeout=20, tolerate=AssertionError)


@needs_prometheus
@pytest.mark.parametrize(
    "check",
    [
        ("check", "config", PROMETHEUS / "prometheus.yml"),
        ("test", "rules", Path(__file__).with_name("alerts_test.yml")),
    ],
    ids=["config", "rules"],
)
def test_promtool(check):
    done = subprocess.run([program("promtool"), *check], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_queries_use_only_variables_that_are_there():
    text = json.dumps(DASHBOARD["panels"])
    used = set(re.findall(r"\$\{?(\w+)", text))
    assert used == VARIABLES.keys()


def test_panels_fill_the_grid_without_overlap():
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        xs, ys = (range(grid[at], grid[at] + grid[size]) for at, size in (("x", "w"), ("y", "h")))
        cells = {(x, y) for x in xs for y in ys}
        assert not cells & taken, panel["title"]
        assert max(xs) < 24, panel["title"]
        taken |= cells
    assert len(taken) == 24 * (1 + max(y for _, y in taken))


def test_ids_are_unique():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_grafana_is_provisioned_with_what_ships():
    provisioning = ROOT / "dashboards" / "provisioning"
    provider = yaml.safe_load((provisioning / "dashboards" / "herd.yml").read_text())["providers"][0]
    assert provider["options"]["path"] == "$__env{HERD_DASHBOARDS}"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    scrape = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrape
