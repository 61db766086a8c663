"""What a trace of one training step has found; plain data that goes from the tracing process to the one that prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

MICRO_PHASES = ("teacher forward", "student forward", "head and losses", "backward")
"""Phases that each micro-batch of a step has, besides "step", which is what its forward pass does between them."""


@dataclass(frozen=True)
class Work:
    """Operations of one kind that are alike.

    Attributes:
        micro_batch: index of the micro-batch; work done once per step (clipping, AdamW) is in the last one.
        phase: of the step.
        name: of the operation, as torch's dispatcher has it, or of the collective.
        kind: "kernel", or "collective", whose bytes are those of the whole tensor.
        num_bytes: read and written by each.
        flops: of each.
        is_half: whether its products are of 16-bit numbers.
        count: how many there are.
    """

    micro_batch: int
    phase: str
    name: str
    kind: Literal["kernel", "collective"]
    num_bytes: int
    flops: int
    is_half: bool
    count: int


@dataclass(frozen=True)
class Wait:
    """A place where the CPU waits for the GPU.

    Attributes:
        phase: of the step.
        what: the CPU asks for.
        place: ``file:line`` of the call.
        count: how often.
    """

    phase: str
    what: str
    place: str
    count: int


@dataclass(frozen=True)
class Figures:
    """Of one training stage; memory is of two optimizer steps, all else of the second one.

    Attributes:
        peak_bytes: the most bytes of tensors on the GPU at once.
        peak_phase: when.
        peaks: phase -> most bytes in it.
        still_bytes: before the first step: models and what is made with them.
        host_bytes: most bytes of tensors in the host's memory when the training ends, of this process.
        num_micro_batches: that were traced.
        tokens: of a micro-batch.
        works: operations on the GPU.
        waits: places where the CPU waits for it.
        model_flops: FLOPs per token by the project's own count, for the model FLOPs utilisation.
        seconds: that the trace took.
    """

    peak_bytes: int
    peak_phase: str
    peaks: Mapping[str, int]
    still_bytes: int
    host_bytes: int
    num_micro_batches: int
    tokens: int
    works: Sequence[Work]
    waits: Sequence[Wait]
    model_flops: float
    seconds: float

    def kernels(self) -> int:
        """Kernels of the step."""
        return sum(work.count for work in self.works if work.kind == "kernel")

    def moved_bytes(self) -> int:
        """Bytes that the kernels of the step read and write."""
        return sum(work.count * work.num_bytes for work in self.works if work.kind == "kernel")

    def collectives(self) -> int:
        """Collectives of the step."""
        return sum(work.count for work in self.works if work.kind == "collective")

    def waits_per_micro_batch(self) -> float:
        """Waits within the micro-batches, per micro-batch."""
        return sum(w.count for w in self.waits if w.phase in MICRO_PHASES or w.phase == "step") / self.num_micro_batches
