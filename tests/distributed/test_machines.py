"""Two machines of two processes each, as network namespaces with a cable between them that is cut."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.training.metrics import read_rows
from tests.faults.machines import Machines, refusal
from tests.faults.workers import Workers, World

SILENCE_S = 10
OPTIONS = ["--set", "stages.train.batch_size=4", "--set", "compute.checkpoint_every_steps=1"]
OPTIONS += ["--set", "compute.log_every_steps=1"]


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    if (why := refusal()) is not None:
        pytest.skip(why)
    with Machines() as made:
        yield made


def started(workers: Workers, machines: Machines, chaos: Path, run: Path, steps: int) -> World:
    arguments = ["run", str(chaos), "--run-dir", str(run), *OPTIONS, "--set", f"compute.silence_s={SILENCE_S}"]
    arguments += ["--set", f"stages.train.num_steps={steps}"]
    log = run.with_name(f"{run.name}-{time.monotonic_ns()}.log")
    return workers.start(arguments, size=4, log=log, machines=machines)


def wait_for_checkpoint(world: World, run: Path) -> None:
    until = time.monotonic() + 120
    while not any((run / "train" / "checkpoints").glob("step=*.ckpt")):
        assert world.running(), world.said()
        assert time.monotonic() < until, world.said()
        time.sleep(0.002)


def losses(run: Path) -> list[float]:
    return [row["train/cross_entropy"] for row in read_rows(run / "train") if "lr" in row]


@pytest.mark.exhaustive
def test_a_short_cut_is_waited_for_and_a_long_one_ends_both_sides(
    workers: Workers, machines: Machines, chaos: Path, tmp_path: Path
) -> None:
    """The run that is interrupted for a moment goes on; the one that is cut off is resumed to the same losses."""
    short, long = tmp_path / "short", tmp_path / "long"
    world = started(workers, machines, chaos, short, steps=30)
    wait_for_checkpoint(world, short)
    machines.cut()
    time.sleep(3)
    machines.mend()
    assert world.wait(120) == [0] * 4, world.said()

    world = started(workers, machines, chaos, long, steps=30)
    wait_for_checkpoint(world, long)
    machines.cut()
    began = time.monotonic()
    codes = world.wait(120)
    took = time.monotonic() - began
    machines.mend()
    assert codes == [1] * 4, world.said()
    assert took < 4 * SILENCE_S
    for log in world.logs:  # one line on each side, before the stack of where it waited
        said = log.read_text().split("Current thread")[0].split("Thread 0x")[0]
        assert "Traceback" not in said
        assert "the same command goes on" in said
    world = started(workers, machines, chaos, long, steps=30)
    assert world.wait(120) == [0] * 4, world.said()
    assert "resuming from step" in world.said()
    # DDP groups the gradients of a process's first step in another order, so that sums differ in their last bits
    assert losses(long) == pytest.approx(losses(short), rel=1e-3)
    assert len(losses(short)) == 30
