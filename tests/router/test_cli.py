"""The command line: quick where it can be, one sentence where it cannot."""

import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT

from router.core.placement import POLICIES
from router.tenants import load

TRACE, SIM_8B = (str(ROOT / name) for name in ("loadtests/traces/synthetic.jsonl.gz", "deploy/sim-8b.yaml"))
TWIN = ("--trace", TRACE, "--fleet", SIM_8B)
HERD = Path(sys.executable).with_name("herd")
# Ray alone takes a second to import, all of this a third of one; other tests share the cores.
QUICK_S = 1.0


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(HERD), *args], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("up",),
        ("down",),
        ("status",),
        ("explain",),
        ("record",),
        ("route",),
        ("simulate",),
        ("key",),
        ("engine",),
    ],
)
def test_help_lists_options_and_needs_neither_ray_nor_the_router(command: tuple[str, ...]) -> None:
    loaded = (
        "import sys; from router.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", loaded, *command, "--help"], capture_output=True, text=True, timeout=60
    )
    assert "--help" in done.stdout
    assert not {"ray", "uvloop", "pydantic", "httpx"} & set(done.stdout.split())


def test_every_policy_is_in_the_help() -> None:
    words = run("route", "--help").stdout.replace(",", " ").replace(".", " ").split()
    assert set(POLICIES) <= set(words)


def test_status_is_quick(tmp_path: Path) -> None:
    def once() -> float:
        began = time.monotonic()
        run("status", "--run-dir", str(tmp_path))
        return time.monotonic() - began

    assert min(once() for _ in range(3)) < QUICK_S


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("up", "fleet.yaml"), 2, "does not exist"),
        (("up", "--engine", "magic"), 2, "magic"),
        (("simulate",), 2, "--trace"),
        (("simulate", "--trace", "t", "--fleet", "f"), 2, "'t' does not exist"),
        (("simulate", *TWIN, "--speed", "0"), 2, "--speed"),
        (("simulate", *TWIN, "--policy", "magic"), 1, "policy: 'magic' is not a policy; known are kv_aware"),
        (("simulate", "--trace", SIM_8B, "--fleet", SIM_8B), 1, "sim-8b.yaml, line 1: "),
        (("simulate", "--trace", TRACE, "--fleet", TRACE), 1, "synthetic.jsonl.gz: "),
        (("route",), 2, "--worker-urls"),
        (("route", "--worker-urls", "http://h:1", "--api-keys-file", "none"), 2, "'none' does not exist"),
        (("route", "--worker-urls", "http://h:1", "--api-keys-file", SIM_8B), 1, "tenants: Field required"),
        (
            ("route", "--worker-urls", "http://h:1", "--admin-host", "0.0.0.0"),
            1,
            "admin_key: admin_host 0.0.0.0 can be reached from other machines",
        ),
        (("route", "--worker-urls", "localhost:8000"), 1, "--worker-urls: 'localhost:8000'"),
        (("route", "--worker-urls", "http://127.0.0.1:1", "--policy", "magic"), 1, "policy: 'magic' is not"),
        (
            ("route", "--worker-urls", "http://127.0.0.1:1", "--admin-port", "70000"),
            1,
            "admin_port: Input should",
        ),
        (("route", "--worker-urls", "http://127.0.0.1:1", "--model-alias", "a"), 1, "'a' is not of the form"),
        (
            ("route", "--worker-urls", "http://h:1", "--model-alias", "a=b", "--model-alias", "a=c"),
            1,
            "--model-alias: 'a' is given twice",
        ),
        (("route", "--worker-urls", "http://h:1", "--tokenizer", "m="), 1, "--tokenizer: 'm=' is not of the"),
        (
            ("route", "--worker-urls", "http://h:1", "--tokenizer", "/a", "--tokenizer", "/b"),
            1,
            "--tokenizer: that of all models is given twice",
        ),
        (("route", "--worker-urls", "http://h:1", "--slo-ttft-ms", "0"), 2, "--slo-ttft-ms"),
        (
            ("route", "--worker-urls", "http://h:1", "--model-alias", "a=b", "--model-alias", "b=c"),
            1,
            "aliases: 'a' stands for 'b', which is an alias itself",
        ),
    ],
)
def test_wrong_arguments_are_named_in_one_line(args: tuple[str, ...], code: int, says: str) -> None:
    done = run(*args)
    assert done.returncode == code
    assert says in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("args", "env"), [(("--api-key", ""), {}), ((), {"HERD_API_KEY": ""})])
def test_an_empty_key_does_not_open_the_endpoint(args: tuple[str, ...], env: dict[str, str]) -> None:
    argv = [str(HERD), "route", "--worker-urls", "http://127.0.0.1:1", *args]
    done = subprocess.run(argv, env={**os.environ, **env}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "HERD_API_KEY, is empty" in done.stderr) == (2, True)


def test_a_new_key_is_shown_once_beside_what_is_kept_of_it() -> None:
    for args, name in ((("new", "acme"), "acme"), (("admin",), "HERD_ADMIN_KEY")):
        done = run("key", *args)
        (key,) = re.findall(r"sk-herd-[\w-]{43}", done.stderr)
        assert name in done.stderr
        assert f"sha256:{hashlib.sha256(key.encode()).hexdigest()}" in done.stdout
        assert key not in done.stdout


def test_what_is_made_for_a_file_of_tenants_makes_one(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    parts = [run("key", "secret").stdout, "tenants:\n", *(run("key", "new", name).stdout for name in "ab")]
    path.write_text("".join(parts))
    assert [len(tenant.keys) for tenant in load(path).tenants.values()] == [1, 1]


def test_a_fleet_file_and_flags_that_describe_a_fleet_exclude_each_other() -> None:
    file = Path(__file__).parents[2] / "deploy" / "simulated.yaml"
    done = run("up", str(file), "--replicas", "3")
    assert done.returncode == 2
    assert "Give one of both" in done.stderr
