"""A signal that reaches one process of two, or the one that started them, stops both, outside of training steps too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.chaos import Signal, as_on_a_terminal
from tests.faults.workers import Workers

BOUND_S = 240
DEVICES = ["--set", "compute.devices=2"]


def arguments(recipe: Path, folder: Path) -> list[str]:
    return ["run", str(recipe), "--run-dir", str(folder), *DEVICES]


@pytest.mark.parametrize(
    ("rank", "where"),
    [
        (1, "distill.training.ranks:Ranks.hear"),  # the first has not begun a stage yet
        # both are on their way to the training
        pytest.param(1, "distill.training.module:DistillationModule.__init__", marks=pytest.mark.exhaustive),
        (0, "distill.training.trainer:newest_valid"),  # the first looks for all, which wait for its answer
        # the others wait for the first
        pytest.param(0, "distill.runner:standing", marks=pytest.mark.exhaustive),
    ],
)
def test_a_signal_to_one_stops_both(rank: int, where: str, workers: Workers, chaos: Path, tmp_path: Path) -> None:
    kill = Signal(signal.SIGUSR1, where)
    world = workers.start(arguments(chaos, tmp_path / "run"), size=2, log=tmp_path / "log", kill=kill, victim=rank)
    assert world.wait(BOUND_S) == [75, 75], world.said()
    assert "Traceback" not in world.said()
    assert not (tmp_path / "run" / "train" / "DONE").exists()


def test_a_signal_to_a_whole_group_lets_the_step_be_finished(workers: Workers, chaos: Path, tmp_path: Path) -> None:
    """A scheduler signals all processes of a job, and so those too that read ahead."""
    options = ["--set", "compute.num_workers=1", "--set", "compute.devices=1"]
    world = workers.start([*arguments(chaos, tmp_path / "run"), *options], log=tmp_path / "log")
    until = time.monotonic() + BOUND_S
    while not any((tmp_path / "run" / "train" / "checkpoints").glob("step=*.ckpt")):
        assert world.running(), world.said()
        assert time.monotonic() < until, world.said()
        time.sleep(0.002)
    (process,) = world.processes
    reading = psutil.Process(process.pid).children(recursive=True)
    assert reading
    for child in reading:
        child.send_signal(signal.SIGTERM)
    world.send(signal.SIGTERM, rank=0)
    assert world.wait(BOUND_S) == [75], world.said()
    assert "of 24, which is saved" in world.said()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.exhaustive)]
)
def test_a_signal_to_the_launcher_stops_workers_that_are_only_starting(
    number: signal.Signals, code: int, chaos: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "distill", *arguments(chaos, tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment, text=True, preexec_fn=as_on_a_terminal, **pipes)
    until = time.monotonic() + BOUND_S
    while not (tmp_path / "run" / "logs" / "rank-1.log").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.001)
    process.send_signal(number)
    _, error = process.communicate(timeout=BOUND_S)
    assert process.returncode == code
    assert "Traceback" not in error
    assert "; the same command goes on" in error
