"""Kills a cell's training and holds what comes out, when it goes on, against the same training undisturbed."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from distill.training.metrics import read_rows
from tests.faults.cells import STAGE, STEPS, Cell, Text
from tests.faults.chaos import Kill
from tests.faults.workers import Workers


@dataclass(frozen=True)
class Moved:
    """A training that went on in other processes.

    Attributes:
        other_rows: steps that were not made of the undisturbed training's rows of text, each once.
        loss_difference: the largest of any loss of any step, as a share of the loss.
    """

    other_rows: int
    loss_difference: float


@dataclass(frozen=True)
class Resumes:
    """Runs cells.

    Attributes:
        workers: start the runs.
        text: of :meth:`Text.make`.
        folder: where runs go.
        limit_s: of one run.
    """

    workers: Workers
    text: Text
    folder: Path
    limit_s: float = 300.0

    def difference(self, cell: Cell) -> str | None:
        """What is not the same, to the last bit, after the kills of a cell; None when nothing is.

        Raises:
            RuntimeError: a run ended in another way than it should.
        """
        place = self._place(cell)
        straight, resumed = place / "straight", place / "resumed"
        self._run(cell, straight, None)
        for step in [*cell.steps(), None]:
            self._run(cell, resumed, step)
        return differing(straight, resumed)

    def moved(self, cells: Sequence[Cell]) -> Moved:
        """Kill the first cell's training after two steps, go on with the second for two, and so on.

        Args:
            cells: of the same training by other processes, without dropout, whose numbers belong to a process.

        Raises:
            RuntimeError: a run ended in another way than it should.
        """
        place = self._place(*cells)
        straight, resumed = place / "straight", place / "resumed"
        self._run(cells[0], straight, None)
        ends = [2 * number for number in range(1, len(cells))]
        rows: Counter[tuple[int, str]] = Counter()
        for cell, start, end in zip(cells, [0, *ends], [*ends, None], strict=True):
            rows += _traced(self._run(cell, resumed, end), start, end or STEPS)
        expected = _traced(straight.with_suffix(".trace-None"), 0, STEPS)
        differences = [
            abs(row[key] - its[key]) / its[key]
            for row, its in zip(figures(resumed), figures(straight), strict=True)
            for key in its
            if key.startswith(("train/", "val/"))
        ]
        return Moved(len({step for step, _ in (rows - expected) + (expected - rows)}), max(differences))

    def _place(self, *cells: Cell) -> Path:
        place = self.folder / sha256(repr(cells).encode()).hexdigest()[:8]
        place.mkdir()
        return place

    def _run(self, cell: Cell, run: Path, step: int | None) -> Path:
        """To the end, or until the checkpoint of ``step`` is in its place; the folder of what was read."""
        recipe, trace = run.with_suffix(".yaml"), run.with_suffix(f".trace-{step}")
        recipe.write_text(cell.recipe(self.text))
        trace.mkdir()
        kill = Kill("after rename", 1, f"step={step:08d}.ckpt") if step is not None else None
        arguments, log = ["run", str(recipe), "--run-dir", str(run)], run.with_suffix(f".log-{step}")
        world = self.workers.start(arguments, size=cell.size, log=log, kill=kill, trace=trace)
        codes = world.wait(self.limit_s)
        if any(codes) if step is None else codes[0] != -signal.SIGKILL:
            raise RuntimeError(f"{cell}: exit codes {codes}\n{world.said()}")
        return trace


def differing(run: Path, other: Path) -> str | None:
    """What two runs have not in common: the first file of weights, or row of metrics without clock and memory."""
    mine, theirs = (
        {file.name: file for file in (each / STAGE / "model").glob("*.safetensors")} for each in (run, other)
    )
    if not mine or mine.keys() != theirs.keys():
        return f"the files {sorted(mine)} and {sorted(theirs)}"
    for name, file in mine.items():
        if file.read_bytes() != theirs[name].read_bytes():
            return name
    ours, others = figures(run), figures(other)
    if len(ours) != len(others):
        return f"{len(ours)} and {len(others)} rows of metrics"
    return next((f"metrics of step {row['step']}" for row, its in zip(ours, others, strict=True) if row != its), None)


def figures(run: Path) -> list[dict[str, float]]:
    """The rows of metrics, without clock and memory."""
    measured = ("perf/", "memory/")
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in read_rows(run / STAGE)]


def _traced(folder: Path, start: int, end: int) -> Counter[tuple[int, str]]:
    """How often a row of text was trained on in each of these steps, by all processes."""
    lines = [line.partition(" ") for file in folder.iterdir() for line in file.read_text().splitlines()]
    return Counter((int(step), ids) for step, _, ids in lines if start <= int(step) < end)
