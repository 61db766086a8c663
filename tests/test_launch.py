"""Processes that are started together end together, and whose fault it was is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import launch as launching
from distill.core import stop
from distill.core.errors import InputError, RankEnded
from distill.core.world import World
from distill.launch import check_world, launch, log_of, place_of, wanted_processes
from distill.training.spec import ComputeSpec


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Workers that run a line of Python instead of a recipe; ``rank`` and ``order`` are known to it."""

    def play(code: str) -> None:
        head = "import os, sys, json, time, signal; rank = int(os.environ['RANK']); order = json.loads(input()); "

        def start(rank: int, size: int, port: int, out: Any) -> Any:
            return subprocess.Popen(
                [sys.executable, "-c", head + code],
                env=dict(os.environ) | place_of(rank, size, port),
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                text=True,
                start_new_session=True,
            )

        monkeypatch.setattr(launching, "_start", start)
        monkeypatch.setattr(launching, "GRACE_S", 1.0)

    return play


def test_all_get_the_order_and_end_well(played: Any, tmp_path: Path) -> None:
    played("open(f\"{order['to']}/{rank}-{os.environ['WORLD_SIZE']}\", 'w')")
    launch(3, {"to": str(tmp_path)}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"0-3", "1-3", "2-3"}


@pytest.mark.parametrize(
    ("code", "line", "exit_code"),
    [
        ("sys.exit(2 if rank == 0 else time.sleep(60))", r"the recipe or the arguments are wrong \(see above\)", 2),
        ("time.sleep(0.5 * (rank == 0)); sys.exit(2)", r"the recipe or the arguments are wrong \(see above\)", 2),
        ("sys.exit(1 if rank == 0 else 0)", r"rank 0 ended with exit code 1 \(see above\)", 1),
        ("sys.exit('why') if rank == 1 else time.sleep(60)", r"rank 1 ended with exit code 1 \(its log is .*rank-1", 1),
        ("os.kill(os.getpid(), 9) if rank == 1 else time.sleep(60)", "rank 1 was killed by SIGKILL", 1),
        ("sys.exit(75)", "the same command goes on where this one was left", 75),
    ],
)
def test_the_first_that_fails_ends_all(played: Any, tmp_path: Path, code: str, line: str, exit_code: int) -> None:
    played(code)
    with pytest.raises(RankEnded, match=line) as ended:
        launch(2, {}, tmp_path)
    assert ended.value.exit_code == exit_code
    assert ended.value.is_told == (exit_code in (2, 75)), "the first has said it, and nobody is blamed for it"
    if "why" in code:
        assert "why" in log_of(tmp_path / "logs", 1).read_text()


def test_a_signal_behind_the_last_stage_is_no_stop(played: Any, tmp_path: Path) -> None:
    played("open(f\"{order['to']}/ended-{rank}\", 'w'); sys.exit(75 if rank else 0)")
    launch(2, {"to": str(tmp_path)}, tmp_path)
    assert {path.name for path in tmp_path.glob("ended-*")} == {"ended-0", "ended-1"}


def test_a_signal_reaches_every_worker(played: Any, tmp_path: Path) -> None:
    """Through the pipe by which it got its order, so that one which is only starting does not miss it."""
    played("open(f\"{order['to']}/{rank}\", 'w'); sys.exit(75 if int(input()) == signal.SIGTERM else 1)")

    def send() -> None:
        until = time.monotonic() + 30
        while not all((tmp_path / str(rank)).exists() for rank in range(2)) and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=send).start()
    with pytest.raises(RankEnded) as ended, stop.listening():
        launch(2, {"to": str(tmp_path)}, tmp_path)
    assert ended.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stop_of_one_is_passed_on(played: Any, tmp_path: Path) -> None:
    """By the scheduler, say, to the last process alone, while the others are at work that asks nobody."""
    played("""there = order['to'] + '/0'
if rank == 1:
    while not os.path.exists(there):
        time.sleep(0.01)
    sys.exit(75)
open(there, 'w').write('ready')
open(there, 'a').write(f' and told {input()}')
sys.exit(75)
""")
    with pytest.raises(RankEnded) as ended:
        launch(2, {"to": str(tmp_path)}, tmp_path)
    assert ended.value.exit_code == 75
    assert (tmp_path / "0").read_text() == f"ready and told {signal.SIGTERM:d}"


def test_how_many_processes_a_recipe_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wanted_processes(ComputeSpec(accelerator="cpu")) == 1
    assert wanted_processes(ComputeSpec(accelerator="cpu", devices=3)) == 3
    with pytest.raises(InputError, match=r"num_nodes: 2: start the same command on every machine by torchrun or srun"):
        wanted_processes(ComputeSpec(num_nodes=2))
    with pytest.raises(InputError, match=r"fsdp shares a model out among processes, and there is one"):
        wanted_processes(ComputeSpec(accelerator="cpu", strategy="fsdp"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert wanted_processes(ComputeSpec()) == 4
    assert wanted_processes(ComputeSpec(accelerator="cpu")) == 1
    with pytest.raises(InputError, match=r"compute.devices: 8: PyTorch sees 4 GPUs here"):
        wanted_processes(ComputeSpec(devices=8))
    assert wanted_processes(ComputeSpec(devices=1, teacher_device="cuda:1")) == 1
    one_each = ComputeSpec(devices=1, num_nodes=2, teacher_device="cuda:1")
    check_world(one_each, World(rank=0, size=2, local_size=1))
    with pytest.raises(InputError, match=r"teacher_device: cuda:1 would hold the teachers of all 4 .* devices: 1"):
        wanted_processes(ComputeSpec(teacher_device="cuda:1"))
    with pytest.raises(InputError, match=r"the teachers of all 2 processes"):
        check_world(ComputeSpec(num_nodes=2, teacher_device="cuda:1"), World(rank=0, size=4, local_size=2))
    with pytest.raises(ValueError, match=r"the teachers of all 2 processes"):
        ComputeSpec(devices=2, teacher_device="cuda:1")


def test_a_world_of_another_size_is_refused() -> None:
    check_world(ComputeSpec(), World(0, 16, 0, 8))
    check_world(ComputeSpec(devices=8, num_nodes=2), World(0, 16, 0, 8))
    with pytest.raises(InputError, match=r"devices \(8\) x num_nodes \(1\) is not the 16 processes"):
        check_world(ComputeSpec(devices=8), World(0, 16, 0, 8))
    with pytest.raises(InputError, match=r"is not the 1 processes"):
        check_world(ComputeSpec(devices=8), World())
    with pytest.raises(InputError, match=r"fsdp shares a model out among processes, and there is one"):
        check_world(ComputeSpec(strategy="fsdp"), World())
