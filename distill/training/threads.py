"""Number of CPU threads of a training: one thread for small models. The number is stored in the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch

from distill.core import threads


class Threads(pl.Callback):
    """Trains on one thread if a layer's output is small, unless the user has set a number (``OMP_NUM_THREADS``).

    The choice depends only on the model and the batch. Sums over another number of threads may differ in their last
    bits, so a warning is printed if a checkpoint was made with another number.

    Args:
        numbers: number of elements of a layer's output for a micro-batch: tokens x hidden size.
        say: function that prints a line.
    """

    def __init__(self, numbers: float, say: Callable[[str], None]):
        self.is_small, self.say = numbers < threads.SMALL, say
        self._before = torch.get_num_threads()

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Set the number of threads, before the checkpoint is loaded."""
        if self.is_small and _is_on_cpu(trainer) and not threads.users(threads.NUMBER):
            torch.set_num_threads(1)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Restore the number of threads for other stages."""
        torch.set_num_threads(self._before)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Lightning does not call ``teardown`` when the training ends with an error."""
        self.teardown(trainer, module, "fit")

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the number of threads."""
        checkpoint["cpu_threads"] = torch.get_num_threads()

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare the number of threads; if the number of processes differs too, the last bits differ anyway."""
        made_with, now = checkpoint.get("cpu_threads"), torch.get_num_threads()
        if _is_on_cpu(trainer) and made_with not in (None, now) and len(checkpoint["ranks"]) == trainer.world_size:
            self.say(
                f"  warning: the checkpoint was made with {made_with} CPU threads and this process has {now}; the last "
                f"bits may differ (OMP_NUM_THREADS={made_with} keeps them)"
            )


def _is_on_cpu(trainer: pl.Trainer) -> bool:
    return trainer.strategy.root_device.type == "cpu"
