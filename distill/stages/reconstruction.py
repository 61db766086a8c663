"""A pruned model's output projections solved anew, on the run's calibration set."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from distill.pruning.reconstruct import ReconstructSpec, reconstruct
from distill.stages.base import StageContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.pruning.layout import Layout
    from distill.pruning.plan import Plan

SECONDS_BETWEEN_LINES = 15.0


def reconstructed(
    context: StageContext,
    spec: ReconstructSpec,
    pruned: PreTrainedModel,
    location: str,
    plan: Plan,
    layout: Layout,
    batch_size: int,
) -> dict[str, float]:
    """Solve the projections of ``pruned`` in place, and say what that took off their error.

    Args:
        context: of the stage.
        spec: how.
        pruned: in float32.
        location: folder or Hub id of the model that was cut.
        plan: how it was cut.
        layout: the layout of its architecture.
        batch_size: calibration sequences a forward pass.

    Returns:
        ``error_before`` and ``error_after``, as :func:`~distill.pruning.reconstruct.reconstruct` returns them.
    """
    from distill.models.load import load_model, move
    from distill.stages.train import check_packing
    from distill.training.trainer import resolve_device

    device = resolve_device(context.session.compute)
    rows: list[dict[str, Any]] = []
    left = spec.num_sequences
    for batch in context.session.corpus().calibration_loader(batch_size=batch_size):
        rows.append({key: value[:left] for key, value in batch.items()})
        left -= len(rows[-1]["mask"])
        if left <= 0:
            break
    whole = move(check_packing(context, load_model(location, dtype="float32" if device == "cpu" else "auto")), device)
    move(pruned, device)
    start = last = time.monotonic()

    def say_done(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES and done < total:
            last = time.monotonic()
            context.say(f"reconstruct: {done} of {total}, {(last - start) / done * (total - done):.0f} s left")

    before, after = reconstruct(pruned, whole, plan, layout, rows, ridge=spec.ridge, say_done=say_done)
    context.say(f"reconstruct: error of the output projections {before:.1%} -> {after:.1%}")
    if layout.experts is not None:
        context.say("reconstruct: attention only; the experts stay as they were cut")
    return {"error_before": before, "error_after": after}
