"""The tests' own ground: processes end with their test, and CI takes no skip for a pass."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from support import ROOT, Running, eventually

SKIPS = """
import pytest

@pytest.mark.debian
def test_needs_a_package():
    pytest.skip("no such package")

@pytest.mark.gpu
def test_needs_a_gpu():
    pytest.skip("no GPU")
"""
# A leader that ignores SIGTERM and has a child: the child's id is its only output.
STUBBORN = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"])
print(child.pid, flush=True)
child.wait()
signal.pause()
"""


@pytest.mark.parametrize(("ci", "outcome"), [("", {"skipped": 2}), ("true", {"skipped": 1, "failed": 1})])
def test_ci_forbids_skips_of_optional_tests(pytester, monkeypatch, ci, outcome):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers =\n    debian: d\n    gpu: g\n")
    pytester.makepyfile(SKIPS)
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(**outcome)
    if ci:
        result.stdout.fnmatch_lines(["*CI=true forbids this skip. Skipped: no such package"])


def test_a_stopped_process_leaves_no_child(tmp_path: Path):
    running = Running.start([sys.executable, "-c", STUBBORN], tmp_path / "log")
    child = int(eventually(lambda: running.output.strip()))
    os.kill(child, 0)
    running.kill()
    assert running.process.returncode == -signal.SIGKILL
    eventually(lambda: not is_running(child))


def is_running(pid: int) -> bool:
    """Whether a process is there and not a zombie that its new parent has yet to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_eventually_says_what_it_saw_last():
    with pytest.raises(AssertionError, match=r"not within 0 s; last seen: \[\]"):
        eventually(list, timeout=0)


def test_eventually_waits_through_errors_it_was_told_of(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        eventually((tmp_path / "absent").read_text)
    with pytest.raises(AssertionError, match="FileNotFoundError"):
        eventually((tmp_path / "absent").read_text, timeout=0, tolerate=OSError)
