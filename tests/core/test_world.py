from __future__ import annotations

import os

import pytest

from distill.core.world import World

ALL = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*ALL, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")  # so that what the code sets is taken back too
        monkeypatch.delenv(name)


def test_a_process_by_itself_has_joined_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert World.joined() is None
    monkeypatch.setenv("SLURM_PROCID", "0")  # the shell of an sbatch file
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # a terminal on a node
    assert World.joined() is None


def test_torchrun_says_where_we_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(ALL, ("5", "8", "1", "4", "node1", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    world = World.joined()
    assert world == World(rank=5, size=8, local_rank=1, local_size=4)
    assert world.num_nodes == 2


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node[03-07,11]", "node03"), ("gpu-a", "gpu-a"), ("a1,a2", "a1"), ("rack[2,4]n1,other", "rack2n1")],
)
def test_slurm_says_where_we_are_and_where_all_meet(monkeypatch: pytest.MonkeyPatch, nodes: str, first: str) -> None:
    step = {"PROCID": "9", "STEP_NUM_TASKS": "16", "STEP_NUM_NODES": "2", "LOCALID": "1", "JOB_ID": "4711"}
    for name, value in (step | {"STEP_NODELIST": nodes}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert World.joined() == World(rank=9, size=16, local_rank=1, local_size=8)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == (first, "24711")
