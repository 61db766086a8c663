"""Where a run's curves and tables go besides its own folder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from distill.core.spec import Spec


class LoggingSpec(Spec):
    """Weights & Biases; whatever happens to it, the run goes on and its folder holds everything."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with an API key and a host that answers, else offline; offline files can be synced later."""
    project: str = Field("distill", min_length=1)
    """W&B project; without effect when wandb is disabled."""
    entity: str | None = None
    """W&B user or team; null: the key's own."""
    tags: list[str] = Field(default_factory=list)
    """Labels on the W&B run."""
