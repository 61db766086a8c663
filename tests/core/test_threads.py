"""Threads are chosen before PyTorch is loaded, and a user's own setting wins."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distill import launch
from distill.core import threads

ROOT = Path(__file__).parents[2]
VARIABLES = (*threads.NUMBER, *threads.WAITING, threads.OURS)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not loaded PyTorch and whose user has set nothing; the environment is put back afterwards."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back, whatever the test leaves
        monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "affine", lambda: 8)
    monkeypatch.setattr(threads, "granted", lambda: math.inf)


def chosen() -> dict[str, str]:
    return {name: os.environ[name] for name in VARIABLES if name in os.environ and name != threads.OURS}


def test_an_idle_thread_sleeps_and_the_number_is_pytorchs(fresh: None) -> None:
    threads.choose()
    assert chosen() == {"OMP_WAIT_POLICY": "PASSIVE"}
    assert threads.described(8) == (
        "CPU threads: 8 (PyTorch's default); how an idle one waits: OMP_WAIT_POLICY=PASSIVE, chosen by distill"
    )


@pytest.mark.parametrize(("grant", "number"), [(2.0, "2"), (2.9, "2"), (0.5, "1"), (8.0, None), (math.inf, None)])
def test_a_container_gets_as_many_threads_as_it_has_cpus(
    fresh: None, monkeypatch: pytest.MonkeyPatch, grant: float, number: str | None
) -> None:
    monkeypatch.setattr(threads, "granted", lambda: grant)
    threads.choose()
    assert chosen().get("OMP_NUM_THREADS") == number


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OMP_WAIT_POLICY", "ACTIVE"),
        ("GOMP_SPINCOUNT", "1000"),
        ("KMP_BLOCKTIME", "200"),
        ("OMP_NUM_THREADS", "3"),
        ("MKL_NUM_THREADS", "3"),
    ],
)
def test_what_the_user_has_set_wins(fresh: None, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setattr(threads, "granted", lambda: 2.0)
    monkeypatch.setenv(name, value)
    threads.choose()
    kept = {"OMP_WAIT_POLICY": "PASSIVE"} if name in threads.NUMBER else {"OMP_NUM_THREADS": "2"}
    assert chosen() == {name: value} | kept
    assert f"{name}={value}, set by you" in threads.described(3)
    assert threads.shared(2) == {} or name not in threads.NUMBER


def test_nothing_is_chosen_when_it_is_too_late(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    threads.choose()
    assert chosen() == {}
    assert threads.described(8).endswith("by default, as PyTorch was loaded before distill could choose")


def test_processes_share_the_machine_and_know_whose_choice_it_was(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "granted", lambda: 6.0)
    threads.choose()
    assert chosen()["OMP_NUM_THREADS"] == "6"
    os.environ.update(threads.shared(4))
    threads.choose()  # the child's
    assert chosen() == {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    assert threads.users((*threads.NUMBER, *threads.WAITING)) == []
    with threads.withdrawn():
        assert chosen() == {}
        assert threads.OURS not in os.environ
    assert chosen() == {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}


def test_what_is_withdrawn_is_not_the_users(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    threads.choose()
    with threads.withdrawn():
        assert chosen() == {"OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize(
    ("groups", "files", "grant"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {}, math.inf),
        ("4:cpu,cpuacct:/docker/x\n", {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ("1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("2:cpuset:/\n", {"cpuset/cpu.max": "100000 100000\n"}, math.inf),
        ("0::/\n", {"cpu.max": "what is this\n"}, math.inf),
    ],
)
def test_time_that_control_groups_grant(groups: str, files: dict[str, str], grant: float, tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    assert threads.granted(tmp_path / "cgroup", tmp_path / "fs") == grant
    assert threads.granted(tmp_path / "no such file", tmp_path / "fs") == math.inf


def _environment(**more: str) -> dict[str, str]:
    """A user's, in which the OpenMP library prints what it has read when it is loaded."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "VERBOSE"} | more


def _read(said: str, name: str) -> str | None:
    found = re.search(rf"{name}\s*=\s*'([^']*)'", said)
    return found and found[1]


def _sleeps(said: str) -> bool:
    """GNU's library says PASSIVE by default too, but then spins a while first."""
    spins = _read(said, "GOMP_SPINCOUNT")
    return _read(said, "OMP_WAIT_POLICY") == "PASSIVE" and spins in ("0", None)


def test_the_command_line_chooses_before_openmp_reads_it_and_doctor_shows_it() -> None:
    command = [sys.executable, "-m", "distill", "doctor"]
    environment = _environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert _sleeps(done.stderr)
    assert _read(done.stderr, "OMP_NUM_THREADS") == "1"
    number, waiting = "1 (OMP_NUM_THREADS=1, set by you)", "OMP_WAIT_POLICY=PASSIVE, chosen by distill"
    assert f"CPU threads: {number}; how an idle one waits: {waiting}\n" in done.stdout


def test_a_worker_gets_its_part_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "environ", _environment())
    with (tmp_path / "log").open("w") as out:
        worker = launch._start(0, 2, 1, out)
        launch._tell(worker, {"recipe": "name: [", "run_dir": "", "only": None, "start": None, "command": None})
        assert worker.wait() == 2
    said = (tmp_path / "log").read_text()
    assert _sleeps(said)
    assert _read(said, "OMP_NUM_THREADS") == str(max(1, threads.available() // 2))


def test_from_python_a_run_chooses_and_an_import_does_not() -> None:
    code = (
        "import os, sys, distill; distill.Recipe; print('torch' in sys.modules, os.environ.get('OMP_WAIT_POLICY')); "
        "distill.run; print('torch' in sys.modules, os.environ.get('OMP_WAIT_POLICY'))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment())
    assert done.stdout.split() == ["False", "None", "True", "PASSIVE"]
    assert _sleeps(done.stderr)
