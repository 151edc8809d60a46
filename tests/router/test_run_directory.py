"""What a fleet leaves on disk, and that exactly it is ended by it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import Start, eventually

from router.run_directory import (
    AlreadyUp,
    Process,
    Record,
    RunDirectory,
    default,
    descendants,
    end,
    this_process,
)

SLEEP = (sys.executable, "-c", "import time; time.sleep(600)")
STUBBORN = (
    sys.executable,
    "-c",
    "import signal, time; signal.signal(15, signal.SIG_IGN); print('on'); time.sleep(600)",
)
PARENT = (sys.executable, "-c", f"import subprocess; subprocess.run({list(SLEEP)!r})")
CLAIM = "import sys, time; from pathlib import Path; from router.run_directory import *"


def recorded(herd: Process, *processes: Process, folder: Path | None = None) -> Record:
    return Record(
        herd=herd,
        engine="simulated",
        models=["m"],
        endpoint="http://127.0.0.1:1",
        admin="http://127.0.0.1:2",
        run_directory="run",
        ray_folder=str(folder) if folder else None,
        processes=list(processes),
    )


def process(pid: int) -> Process:
    (found,) = (p for p in descendants(os.getpid()) if p.pid == pid)
    return found


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    assert directory.read() is None
    record = recorded(this_process(), Process(1, 2, "init"))
    directory.write(record)
    assert directory.read() == record


def test_a_process_with_the_same_id_and_another_start_is_left_alone(start: Start) -> None:
    running = start(*SLEEP)
    other = Process(running.process.pid, process(running.process.pid).started - 1)
    assert not other.alive
    end([other], grace_s=0)
    assert running.process.poll() is None


def test_what_does_not_end_by_itself_is_killed(start: Start) -> None:
    running = start(*STUBBORN)
    eventually(lambda: "on" in running.output)
    end([process(running.process.pid)], grace_s=0.2)
    assert running.process.wait(5) == -signal.SIGKILL


def test_descendants_are_found_at_any_depth(start: Start) -> None:
    running = start(*PARENT)
    below = eventually(lambda: descendants(running.process.pid))
    assert {p.pid for p in below} < {p.pid for p in descendants(os.getpid())}


def test_a_claimed_folder_is_refused_to_others(tmp_path: Path) -> None:
    with (
        RunDirectory(tmp_path).claimed(),
        pytest.raises(AlreadyUp, match="already up"),
        RunDirectory(tmp_path).claimed(),
    ):
        pass
    with RunDirectory(tmp_path).claimed():
        pass


def test_leftovers_of_a_killed_run_are_swept_when_the_folder_is_claimed(start: Start, tmp_path: Path) -> None:
    left, folder = start(*SLEEP), tmp_path / "ray"
    logs = folder / "session_latest" / "logs"
    logs.mkdir(parents=True)
    (logs / "engine-m-1.log").write_text("said")
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    directory.write(recorded(Process(1, 0), process(left.process.pid), folder=folder))
    with directory.claimed():
        assert left.process.wait(5) == -signal.SIGTERM
        assert directory.read() is None
        assert not folder.exists()
        assert (directory.logs / "engine-m-1.log").read_text() == "said"


def test_the_guard_sweeps_when_the_claiming_process_is_killed(start: Start, tmp_path: Path) -> None:
    left, directory = start(*SLEEP), RunDirectory(tmp_path)
    claim = f"{CLAIM}\nwith RunDirectory(Path(sys.argv[1])).claimed(): print('on'); time.sleep(600)"
    claimer = start(sys.executable, "-c", claim, tmp_path)
    eventually(lambda: "on" in claimer.output)
    directory.write(recorded(process(claimer.process.pid), process(left.process.pid)))
    os.kill(claimer.process.pid, signal.SIGKILL)
    assert left.process.wait(10) == -signal.SIGTERM
    eventually(lambda: directory.read() is None)


def test_paths_of_logs_are_told_as_they_are_kept(tmp_path: Path) -> None:
    told = RunDirectory(tmp_path).kept("why (its log: /tmp/herd-x/session_2026_1/logs/engine-m-1.log)")
    assert told == f"why (its log: {tmp_path}/logs/engine-m-1.log)"


def test_the_default_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert default(8000).path == tmp_path / "herd" / "8000"


def test_status_and_down_without_a_fleet_say_so_with_status_3(tmp_path: Path) -> None:
    herd = Path(sys.executable).with_name("herd")
    for command in ("status", "down"):
        done = subprocess.run([herd, command, "--run-dir", tmp_path], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (3, f"Error: No fleet is up here ({tmp_path}).\n")
