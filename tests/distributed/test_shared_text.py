"""Two processes of a run tokenize a part of its text each, also where only the first one reads it in a stage."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.faults.workers import Workers, World

BOUND_S = 240
FILES = {".bin", ".bounds", ".bytes"}


@pytest.fixture(scope="module")
def slow_workers() -> Iterator[Workers]:
    with Workers(patches=["tests.faults.small_shards"]) as started:
        yield started


@pytest.fixture(scope="module")
def pruning(quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with a single stage, which the first process runs alone."""
    recipe = yaml.safe_load(quickstart.read_text())
    recipe["stages"] = {"prune": recipe["stages"]["prune"]}
    recipe["compute"]["silence_s"] = 3
    file = tmp_path_factory.mktemp("pruning") / "pruning.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def started(workers: Workers, recipe: Path, folder: Path, size: int, log: Path) -> World:
    more = ["--set", f"compute.devices={size}"] if size > 1 else []
    return workers.start(["run", str(recipe), "--run-dir", str(folder), *more], size=size, log=log)


def tokens(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "data").iterdir() if file.suffix in FILES}


def claims(folder: Path) -> list[list[str]]:
    file = folder / "data" / "claims.log"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module")
def alone(slow_workers: Workers, pruning: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    world = started(slow_workers, pruning, folder, 1, folder.with_suffix(".logs"))
    assert world.wait(BOUND_S) == [0], world.said()
    return folder


def test_the_other_process_tokenizes_a_part(slow_workers: Workers, pruning: Path, alone: Path, tmp_path: Path) -> None:
    world = started(slow_workers, pruning, tmp_path / "run", 2, tmp_path / "logs")
    assert world.wait(BOUND_S) == [0, 0], world.said()
    assert tokens(tmp_path / "run") == tokens(alone)
    taken = claims(tmp_path / "run")
    assert {rank for rank, _, _ in taken} == {"0", "1"}
    assert max(Counter((text, number) for _, text, number in taken).values()) == 1, "none twice"
    assert {(text, number) for _, text, number in taken} == {(text, number) for _, text, number in claims(alone)}


def test_a_killed_process_ends_the_other_and_its_shards_are_taken_up(
    slow_workers: Workers, pruning: Path, alone: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    world = started(slow_workers, pruning, folder, 2, tmp_path / "logs")
    until = time.monotonic() + BOUND_S
    while not any(rank == "1" for rank, _, _ in claims(folder)):
        assert world.running(), world.said()
        assert time.monotonic() < until, world.said()
        time.sleep(0.01)
    world.send(signal.SIGKILL, rank=1)
    assert world.wait(60) == [1, -signal.SIGKILL], world.said()
    assert "rank 1" in world.said()
    assert "has sent no heartbeat for 3 s" in world.said()
    before = {(text, number) for _, text, number in claims(folder)}
    (folder / "data" / "claims.log").unlink()
    again = started(slow_workers, pruning, folder, 1, tmp_path / "again")
    assert again.wait(BOUND_S) == [0], again.said()
    assert tokens(folder) == tokens(alone)
    taken = {(text, number) for _, text, number in claims(folder)}
    assert len(taken & before) <= 4, "but for shards that the killed processes were at"
