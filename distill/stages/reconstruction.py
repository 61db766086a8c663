"""A pruned model's output projections solved anew, on the run's calibration set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill.pruning.reconstruct import ReconstructSpec, projections, reconstruct
from distill.stages.base import StageContext
from distill.stages.pace import Pace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.pruning.layout import Layout
    from distill.pruning.plan import Plan


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
    batches = context.session.corpus().calibration_loader(spec.num_sequences, batch_size)
    whole = move(check_packing(context, load_model(location, dtype="float32" if device == "cpu" else "auto")), device)
    move(pruned, device)
    pace = Pace(context, len(projections(plan, layout)), ("reconstruct", "projections"))
    before, after = reconstruct(pruned, whole, plan, layout, batches, ridge=spec.ridge, done=pace.of)
    context.say(f"reconstruct: error of the output projections {before:.1%} -> {after:.1%}")
    if layout.experts is not None:
        context.say("reconstruct: attention only; the experts stay as they were cut")
    return {"error_before": before, "error_after": after}
