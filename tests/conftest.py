"""What every test has at hand: processes that never outlive it, and no silent skips where CI forbids them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from support import Start, processes

pytest_plugins = ["pytester"]

# How long an example takes is the machine's affair. The parent is Hypothesis' own profile, for CI another.
settings.register_profile("herd", parent=settings(), deadline=None)
settings.load_profile("herd")

# Tests that need what a person's machine may lack; where CI is set, it has to be there.
OPTIONAL = ("debian", "vllm")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(*argv, env=None)`: processes that end with the test, each with a log in `tmp_path`."""
    with processes(tmp_path) as start:
        yield start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """With CI=true a skip of a test that is optional elsewhere is a failure."""
    report = yield
    marked = any(item.get_closest_marker(name) for name in OPTIONAL)
    if report.skipped and marked and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"CI=true forbids this skip. {report.longrepr[2]}"
    return report
