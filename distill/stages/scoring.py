"""Scores of a model's units, made once: kept in the run's folder and found again by what they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.core.artifact import fingerprint, hash_of, write_bytes
from distill.pruning.base import CriterionSpec, Scores
from distill.stages.base import StageContext

if TYPE_CHECKING:
    from torch import Tensor

    from distill.pruning.layout import Layout

FOLDER = "scores"
"""Where a run keeps them; no stage's folder, so that they outlive a stage that is planned anew."""


def scores_of(
    context: StageContext, location: str, criteria: Sequence[CriterionSpec], layout: Layout, batch_size: int
) -> tuple[list[Scores], dict[str, str]]:
    """Scores of a model on the run's calibration set; only what was never scored before is scored.

    Args:
        context: of the stage.
        location: the model's folder or Hub id.
        criteria: what to score by; those that only watch share one pass.
        layout: the layout of the model's architecture.
        batch_size: sequences a forward pass.

    Returns:
        The scores by each criterion, and what identifies them: the model's fingerprint, the calibration set's hash.
    """
    from distill.models.load import load_model, move
    from distill.pruning.base import score
    from distill.stages.train import check_packing
    from distill.training.trainer import resolve_device

    device = resolve_device(context.session.compute)
    batches = list(context.session.corpus().calibration_loader(batch_size=batch_size))
    about = {"model": fingerprint(location), "calibration": calibration_hash(batches), "device": device}
    files = [_file(context, criterion, about) for criterion in criteria]
    found = {file: _read(file) for file in files}
    # width and depth may name the same criterion, which scores both at once
    if missing := {file: criterion for file, criterion in zip(files, criteria, strict=True) if found[file] is None}:
        loaded = check_packing(context, load_model(location, dtype="float32" if device == "cpu" else "auto"))
        model = move(loaded, device)
        made = score(list(missing.values()), model, layout, batches)
        for (file, criterion), scores in zip(missing.items(), made, strict=True):
            write(file, scores, {**about, "criterion": criterion.model_dump_json()})
            found[file] = scores
    num_sequences = sum(len(batch["mask"]) for batch in batches)
    for file, criterion in dict(zip(files, criteria, strict=True)).items():
        how = f"scored on {num_sequences} sequences" if file in missing else "scored before"
        context.say(f"{criterion.kind}: {how} ({file.relative_to(context.session.run.folder)})")
    return [kept for file in files if (kept := found[file]) is not None], about


def calibration_hash(batches: Iterable[Mapping[str, Tensor]]) -> str:
    """Stands for the tokens that are read, where they stand and which of them count, however they are batched."""
    digest = hashlib.sha256()
    for batch in batches:
        read = [batch[key] for key in ("input_ids", "mask", "position_ids", "attention_mask") if key in batch]
        for row in zip(*read, strict=True):
            digest.update(b"".join(tensor.numpy().tobytes() for tensor in row))
    return digest.hexdigest()[:16]


def write(file: Path, scores: Scores, about: Mapping[str, str]) -> None:
    """Write scores as safetensors, an axis a tensor, with what they are about in the file's metadata."""
    from safetensors.torch import save

    write_bytes(file, save({axis: t.contiguous() for axis, t in scores.tensors().items()}, metadata=dict(about)))


def _file(context: StageContext, criterion: CriterionSpec, about: dict[str, str]) -> Path:
    key = hash_of(json.loads(criterion.model_dump_json()), about)
    return context.session.run.folder / FOLDER / f"{criterion.kind}-{key}.safetensors"


def _read(file: Path) -> Scores | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Any] = load_file(file)
    except (OSError, SafetensorError):  # not there, or cut short: it is made again
        return None
    return Scores(**tensors)
