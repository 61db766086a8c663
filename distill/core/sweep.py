"""The trial of a W&B sweep that this process was started for."""

from __future__ import annotations

import os


def trial_of_sweep() -> str | None:
    """The id that ``wandb agent`` has given to this trial; None outside of a sweep."""
    return os.environ.get("WANDB_RUN_ID") or None if os.environ.get("WANDB_SWEEP_ID") else None
