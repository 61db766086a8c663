"""Steps whose loss or gradient is not finite: what was read in them is kept, and too many in a row end the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from safetensors.torch import save_file

from distill.core.errors import DistillError
from distill.training.callbacks import StepEnd
from distill.training.module import DistillationModule

BAD_BATCHES = "bad-batches"
KEPT = 3
"""Steps of a look whose batches are written."""


class Guard(StepEnd):
    """Looks at what the module passed over (see ``configure_gradient_clipping`` there) when a row of metrics is due.

    Nothing is lost by looking late, as such steps change no weight; and looking at each would wait for the device.

    Args:
        folder: where batches go, as safetensors.
        batches: step, counted from 0 -> this rank's micro-batches of it, read again from the text.
        every: steps between two looks.
        limit: steps in a row that end the run.
        rank: of this process, in the names of the files.
        say: prints a line.
    """

    def __init__(
        self,
        folder: Path,
        batches: Callable[[int], Iterable[Any]],
        *,
        every: int,
        limit: int,
        rank: int,
        say: Callable[[str], None],
    ):
        super().__init__()
        self.folder, self.batches, self.rank, self.say = folder, batches, rank, say
        self.every, self.limit = every, limit
        self._in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Goes into a checkpoint: a run that is killed again and again still ends when it should."""
        return {"in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._in_a_row = state_dict["in_a_row"]

    def step_end(self, trainer: pl.Trainer, module: DistillationModule, step: int) -> None:
        """Look, when it is due.

        Raises:
            DistillError: too many steps in a row were passed over.
        """
        if step % self.every and step != trainer.max_steps:
            return
        skipped = module.drain_skipped()
        first = step - len(skipped)
        bad = [first + i for i, is_bad in enumerate(skipped) if is_bad]
        for number in bad[:KEPT]:
            self._keep(number)
        if bad:
            steps = ", ".join(str(number + 1) for number in bad[:10]) + (", ..." if len(bad) > 10 else "")
            self.say(f"  warning: loss or gradient not finite, passed over: step {steps} (see {self.folder})")
        for number, is_bad in enumerate(skipped, first + 1):
            self._in_a_row = self._in_a_row + 1 if is_bad else 0
            if self._in_a_row >= self.limit:
                raise DistillError(
                    f"loss or gradient not finite in {self.limit} steps in a row, the last at step {number}; no weight "
                    "has changed in them: lower optimizer.lr or raise its warmup_steps, and look at the text in "
                    f"{self.folder}"
                )

    def _keep(self, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{number}.{name}": value.contiguous()
            for number, batch in enumerate(self.batches(step))
            for name, value in batch.items()
        }
        save_file(tensors, self.folder / f"step={step + 1:08d}.rank={self.rank}.safetensors")
