"""A pruned model's output projections solved anew, on the run's calibration set."""

from __future__ import annotations

from transformers import PreTrainedModel

from distill.models.load import move
from distill.pruning.layout import Layout
from distill.pruning.plan import Plan
from distill.pruning.reconstruct import ReconstructSpec, projections, reconstruct
from distill.stages.models import load_on_device
from distill.stages.progress_lines import ProgressLines
from distill.stages.session import StageContext
from distill.training.trainer import resolve_device


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
        batch_size: calibration sequences per forward pass.

    Returns:
        ``error_before`` and ``error_after``, as :func:`~distill.pruning.reconstruct.reconstruct` returns them.
    """
    batches = context.session.corpus().calibration_loader(spec.num_sequences, batch_size)
    whole = load_on_device(context, location)
    move(pruned, resolve_device(context.session.compute))
    progress = ProgressLines(context, len(projections(plan, layout)), ("reconstruct", "projections"))
    before, after = reconstruct(pruned, whole, plan, layout, batches, ridge=spec.ridge, done=progress.count)
    context.say(f"reconstruct: error of the output projections {before:.1%} -> {after:.1%}")
    if layout.experts is not None:
        context.say("reconstruct: attention only; the experts stay as they were cut")
    return {"error_before": before, "error_after": after}
