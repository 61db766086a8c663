"""How speed is measured: what the measuring process is told."""

from __future__ import annotations

from dataclasses import dataclass

from distill.evaluation.meter import ENERGY_S


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
        timeout_s: seconds after which the measurement is stopped.
        grid: further (batch, prompt_tokens) at which the same is measured.
        energy_s: seconds of prefill, and of decoding, over which energy is measured where there is a counter.
    """

    prompt_tokens: int = 128
    new_tokens: int = 64
    repeats: int = 5
    batch: int = 1
    device: str = "cpu"
    dtype: str = "auto"
    threads: int | None = None
    timeout_s: float = 600.0
    grid: tuple[tuple[int, int], ...] = ()
    energy_s: float = ENERGY_S

    def points(self) -> list[tuple[int, int]]:
        """Every (batch, prompt_tokens), the one of fewest tokens first, so that a peak of memory is its own."""
        return sorted({(self.batch, self.prompt_tokens), *self.grid}, key=lambda point: (point[0] * point[1], point))
