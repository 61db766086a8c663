"""Settings of the logging to Weights & Biases."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from distill.core.spec import Spec


class Price(Spec):
    """Price of the machine, for the costs in the report."""

    per_hour: float = Field(gt=0)
    """Price per hour of one device or of the machine."""
    currency: str = Field(min_length=1, max_length=8)
    """Currency, such as EUR."""
    per: Literal["device", "machine"] = "device"
    """What the price is for. device: each GPU; machine: all of them together."""


class LoggingSpec(Spec):
    """Weights & Biases. If it fails, the run continues; the run folder contains everything that is logged."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online if there is an API key and the host answers, else offline; offline runs can be synced later."""
    project: str = Field("distill", min_length=1)
    """W&B project; no effect if wandb is disabled."""
    entity: str | None = None
    """W&B user or team; null: the default of the API key."""
    tags: list[str] = Field(default_factory=list)
    """Tags of the W&B run."""
    hardware: bool = True
    """Record the use of processors, memory and GPUs every second in hardware.jsonl of the run folder."""
    price: Price | None = None
    """Price of the machine, for the cost of each stage in the report; null: no cost is shown."""
