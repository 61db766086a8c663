"""Kills a run until it has been killed often enough; the result is compared with that of an uninterrupted run."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from distill.core.run_folder import CHECKPOINTS
from distill.training.checkpoint import newest_valid
from tests.faults.chaos import POINTS, Kill
from tests.faults.workers import Workers, World

ANY_TIME = "any time"


@dataclass
class Toll:
    """What a campaign has done and found.

    Attributes:
        kills: point -> how often a process died there.
        finished: runs that came to their end after kills.
        exact: of these, the ones with the undisturbed run's weights, to the last bit.
        lost: checkpoints that a kill had left unreadable, or progress that was gone; each in words.
        seconds: of wall time.
    """

    kills: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    exact: int = 0
    lost: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Campaign:
    """Attempts at one recipe, each killed somewhere, until enough kills are counted and the last run has finished.

    Attributes:
        workers: start the attempts.
        recipe: file of the recipe.
        stage: of it, whose model is compared and whose checkpoints are watched.
        folder: where runs go.
        size: processes of an attempt.
        options: further arguments of the command line.
        seed: decides where processes die.
        limit_s: of one attempt.

    Half of the kills come at any moment of what an undisturbed run takes, the others at :data:`~.chaos.POINTS`.
    """

    workers: Workers
    recipe: Path
    stage: str
    folder: Path
    size: int = 1
    options: Sequence[str] = ()
    seed: int = 0
    limit_s: float = 300.0

    def run(self, num_kills: int) -> Toll:
        """Undisturbed once, then killed ``num_kills`` times.

        Raises:
            TimeoutError: an attempt neither ended nor died.
            RuntimeError: an attempt that nobody killed failed.
        """
        chance, toll, started = random.Random(self.seed), Toll(), time.monotonic()
        expected, number = self._finish(self.folder / "undisturbed"), 0
        took_s = time.monotonic() - started
        while toll.kills.total() < num_kills:
            run, number = self.folder / f"disturbed-{number}", number + 1
            while not self._is_done(run) and toll.kills.total() < num_kills:
                self._attempt(run, chance, toll, took_s)
            toll.finished += 1
            toll.exact += self._finish(run) == expected
            shutil.rmtree(run)
        toll.seconds = time.monotonic() - started
        return toll

    def _attempt(self, run: Path, chance: random.Random, toll: Toll, took_s: float) -> None:
        """Start, kill, and look at what is left."""
        before = self._step(run)
        point = chance.choice([*POINTS, *[ANY_TIME] * len(POINTS)])
        kill = None if point == ANY_TIME else Kill(point, chance.randint(1, 12))
        victim = chance.randrange(self.size)
        world = self._start(run, kill, victim)
        if kill is None:
            world.processes[victim].join(chance.uniform(0, took_s))
            if world.processes[victim].is_alive():
                world.send(signal.SIGKILL, victim)
        world.processes[victim].join(self.limit_s)
        is_killed = world.processes[victim].exitcode == -signal.SIGKILL
        codes = world.end() if is_killed else world.wait(self.limit_s)
        if is_killed:
            toll.kills[point] += 1
        elif any(codes):
            raise RuntimeError(f"exit codes {codes}\n{world.said()}")
        found, complaints = newest_valid(run / self.stage / CHECKPOINTS)
        toll.lost += complaints
        if not self._is_done(run) and self._step(run) < before:
            toll.lost.append(f"step {before} was saved, and {found} is left after a kill at {point}")

    def _finish(self, run: Path) -> str:
        """Run undisturbed to the end, and the hash of the model's weights."""
        world = self._start(run)
        if any(codes := world.wait(self.limit_s)):
            raise RuntimeError(f"exit codes {codes}\n{world.said()}")
        return sha256((run / self.stage / "model" / "model.safetensors").read_bytes()).hexdigest()

    def _start(self, run: Path, kill: Kill | None = None, victim: int = 0) -> World:
        arguments = ["run", str(self.recipe), "--run-dir", str(run), *self.options]
        return self.workers.start(
            arguments, size=self.size, log=run.with_name(run.name + ".log"), kill=kill, victim=victim
        )

    def _is_done(self, run: Path) -> bool:
        return (run / self.stage / "DONE").exists()

    def _step(self, run: Path) -> int:
        """The newest step whose checkpoint is on disk, whole or not."""
        return max((int(p.stem[5:]) for p in (run / self.stage / CHECKPOINTS).glob("step=*.ckpt")), default=0)
