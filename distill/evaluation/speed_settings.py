"""How speed is measured: what the measuring process is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Weights = Literal["stored", "random"]


@dataclass(frozen=True)
class SpeedSettings:
    """How speed is measured; the same for every model that shall be compared.

    Attributes:
        prompt_tokens: tokens of the prompt, read in one forward pass (prefill).
        new_tokens: tokens then made one by one (decode).
        repeats: how often both are measured, after one warm-up that does not count.
        batch: sequences answered at once.
        device: "cpu", "cuda" or "cuda:N".
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        threads: CPU threads; None: torch's own choice.
        timeout_s: seconds after which the measurement is given up.
        weights: "random" measures what a folder's config describes; it needs no weights.
    """

    prompt_tokens: int = 128
    new_tokens: int = 64
    repeats: int = 5
    batch: int = 1
    device: str = "cpu"
    dtype: str = "auto"
    threads: int | None = None
    timeout_s: float = 600.0
    weights: Weights = "stored"
