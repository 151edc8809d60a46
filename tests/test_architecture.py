"""The structure that reviews rely on, read from the source: who imports whom, and what is nowhere."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from support import ROOT

from router import config

PACKAGES = ("router", "workers", "loadtests")
# Ray is a part of the control plane only: these modules run in its processes ...
RAY_MODULES = {"router.app", "router.deployment", "router.membership", "workers.replica"}
# ... and these import it where they need it, so that `herd route` and `herd engine` run without.
RAY_CALLERS = {"router.cluster"}
# What a pure module may use beside its own kind and the standard library.
PURE_LIBRARIES = {"msgspec", "numpy", "xxhash"}
# Clocks, chance, files, sockets, threads and output: all that makes a decision more than a function.
IMPURE = {
    "asyncio", "concurrent", "datetime", "http", "io", "logging", "multiprocessing", "os", "pathlib",
    "random", "secrets", "select", "selectors", "signal", "socket", "ssl", "subprocess", "tempfile",
    "threading", "time", "urllib", "uuid", "warnings",
}  # fmt: skip
PURE_STDLIB = sys.stdlib_module_names - IMPURE
# Folders of one machine. A path in a container or a home folder in general is written with a variable.
MACHINE_PATH = re.compile(r"(?<![\w.*$}>-])/(?:work|opt|home|root|Users)/[\w.-]+")
# Hosts that pip, npm and the like fetch from: which one is used is the machine's own configuration.
REGISTRY = re.compile(
    r"(?:\bpypi|pythonhosted|registry\.npmjs|\bconda\b[\w.-]*|artifactory|devpi)\.(?:org|com|io)\b"
)
INDEX = re.compile(r"(?:index|index-url|find-links)[ =]+[\"']?https?://([\w.-]+)")
PYTORCH = "download.pytorch.org"  # the one place of CPU builds of torch


@cache
def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def pure_modules() -> list[str]:
    """All of router.core; of the simulated engine its core, and what that is made of."""
    pure = [name for name in modules() if name.startswith("router.core")]
    if "workers.simulated.core" in modules():
        pure += reachable("workers.simulated.core")
    return pure


@cache
def imports(module: str, top_level_only: bool = False) -> frozenset[str]:
    """The modules that one imports: those of the project by full name, others as written."""
    tree = ast.parse(modules()[module].read_text())
    return frozenset(name for node in statements(tree, top_level_only) for name in imported(module, node))


def statements(tree: ast.Module, top_level_only: bool) -> Iterator[ast.AST]:
    """Every node, or those that run when the module is imported; nothing under TYPE_CHECKING."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        stack.extend(ast.iter_child_nodes(node))


def imported(module: str, node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, f"{module}: relative import"
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            yield submodule if submodule in modules() else str(node.module)


def reachable(start: str) -> list[str]:
    """A module and every module of the project below it."""
    seen, open_ends = set(), [start]
    while open_ends:
        name = open_ends.pop()
        if name not in seen:
            seen.add(name)
            open_ends += [below for below in imports(name) if below in modules()]
    return sorted(seen)


def of(names: frozenset[str], package: str) -> set[str]:
    """Those of the names that are the package or lie in it."""
    return {name for name in names if name == package or name.startswith(f"{package}.")}


def tracked_files() -> list[Path]:
    """Every file that git has or would take."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("module", pure_modules())
def test_decisions_are_pure(module):
    own = "router.core" if module.startswith("router.core") else "workers.simulated"
    foreign = imports(module) - of(imports(module), own)
    refused = {name for name in foreign if name.partition(".")[0] not in PURE_STDLIB | PURE_LIBRARIES}
    assert not refused, f"{module} is pure and must not import {sorted(refused)}"


def test_the_data_plane_knows_only_bytes():
    for module in (name for name in modules() if name.startswith("router.http")):
        foreign = of(imports(module), "router") - of(imports(module), "router.http") - {"router.errors"}
        assert not foreign, f"{module} must not import {sorted(foreign)}"


def test_workers_never_import_the_router():
    for module in (name for name in modules() if name.startswith("workers")):
        assert not of(imports(module), "router"), f"{module} imports the router"


def test_the_two_pure_cores_meet_only_in_the_twin():
    for module in modules().keys() - {"loadtests.twin"}:
        met = of(imports(module), "router.core") and of(imports(module), "workers.simulated.core")
        assert not met, f"{module} imports both"


def test_ray_is_imported_only_where_it_is_the_host():
    for module in modules().keys() - RAY_MODULES:
        assert not of(imports(module, top_level_only=True), "ray"), (
            f"{module} imports ray when it is imported"
        )
        if module not in RAY_CALLERS:
            assert not of(imports(module), "ray"), f"{module} imports ray"


def test_no_ray_without_a_fleet_on_ray():
    """What `herd route` and `herd engine simulated` run loads no Ray, by whatever path."""
    names = [name for name in ("router.front", "router.cli", "workers.simulated.server") if name in modules()]
    program = f"import sys, {', '.join(names)}; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_imports_have_no_cycle():
    graph = {name: of_project(imports(name)) - {name} for name in modules()}
    graphlib.TopologicalSorter(graph).prepare()


def of_project(names: frozenset[str]) -> set[str]:
    return {name for name in names if name in modules()}


def test_modules_are_named_for_what_is_in_them():
    vague = {"utils", "util", "helpers", "common", "misc"}
    assert not [name for name in modules() if name.rpartition(".")[2] in vague]


def test_tests_are_no_package():
    """With an __init__.py below tests/, tests/router would shadow router."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("path", sorted((ROOT / "deploy").glob("*.yaml")), ids=lambda path: path.name)
def test_every_fleet_file_loads(path):
    config.load(path)


def test_files_name_no_machine_and_no_registry():
    found = [line for path in tracked_files() for line in foreign_places(path)]
    assert not found, "\n".join(found)


def foreign_places(path: Path) -> Iterator[str]:
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        return
    for number, line in enumerate(text.splitlines(), 1):
        hosts = [host for host in INDEX.findall(line) if host != PYTORCH]
        for place in [*MACHINE_PATH.findall(line), *REGISTRY.findall(line), *hosts]:
            yield f"{path.relative_to(ROOT)}:{number}: {place}"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("pip install -f /" + "opt/wheels", ["/" + "opt/wheels"]),
        ("log: /" + "home/ann/herd.log", ["/" + "home/ann"]),
        ("curl https://py" + "pi.org/simple", ["py" + "pi.org"]),
        ("--extra-index-" + "url https://mirror.example.com/simple", ["mirror.example.com"]),
        (f"--extra-index-url https://{PYTORCH}/whl/cpu", []),
        ("$HOME/opt/x ./work/x {root}/home/x /v1/models /tmp/herd", []),
    ],
)
def test_the_guard_sees(tmp_path, monkeypatch, line, found):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "file").write_text(line)
    assert list(foreign_places(tmp_path / "file")) == [f"file:1: {place}" for place in found]
