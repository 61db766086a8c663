"""Scores of a model's units, made once: kept in the run's folder and found again by what they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from distill.core.artifact import fingerprint, hash_of, write_bytes
from distill.core.batch import MODEL_INPUTS
from distill.core.run_folder import SCORES_FOLDER
from distill.core.stored import CHECK
from distill.pruning.base import CriterionSpec, Scores, score
from distill.pruning.layout import Layout
from distill.stages.models import load_on_device
from distill.stages.session import StageContext
from distill.training.trainer import resolve_device


def scores_of(
    context: StageContext, location: str, criteria: Sequence[CriterionSpec], layout: Layout, batch_size: int
) -> tuple[list[Scores], dict[str, str]]:
    """Scores of a model on the run's calibration set; only what was never scored before is scored.

    Args:
        context: of the stage.
        location: the model's folder or Hub id.
        criteria: what to score by; those that only watch share one pass.
        layout: the layout of the model's architecture.
        batch_size: sequences per forward pass.

    Returns:
        The scores by each criterion, and what identifies them: the model's fingerprint, the calibration set's hash.
    """
    device = resolve_device(context.session.compute)
    batches = list(context.session.corpus().calibration_loader(batch_size=batch_size))
    about = {"model": fingerprint(location), "calibration": calibration_hash(batches), "device": device}
    files = [_file(context, criterion, about) for criterion in criteria]
    found = {file: _read(file) for file in files}
    damaged = {file for file in files if found[file] is None and file.exists()}
    # width and depth may name the same criterion, which scores both at once
    if missing := {file: criterion for file, criterion in zip(files, criteria, strict=True) if found[file] is None}:
        model = load_on_device(context, location)
        made = score(list(missing.values()), model, layout, batches)
        for (file, criterion), scores in zip(missing.items(), made, strict=True):
            write(file, scores, {**about, "criterion": criterion.model_dump_json()})
            found[file] = scores
    num_sequences = sum(len(batch["mask"]) for batch in batches)
    for file, criterion in dict(zip(files, criteria, strict=True)).items():
        how = f"scored on {num_sequences} sequences" if file in missing else "scored before"
        how += ", as the file was not what was written" if file in damaged else ""
        context.say(f"{criterion.kind}: {how} ({file.relative_to(context.session.run.folder)})")
    return [kept for file in files if (kept := found[file]) is not None], about


def of_axes(choices: Mapping[str, str], found: Mapping[str, Scores]) -> Scores:
    """The scores of every axis that is cut, each by the criterion that was chosen for it.

    Args:
        choices: axis -> key of its criterion; see :meth:`distill.stages.prune.spec.Prune.choices`.
        found: key of a criterion -> its scores of all its axes.
    """
    tensors: dict[str, Any] = {}
    for axis, key in choices.items():
        scored = found[key].tensors()
        tensors |= {name: scored[name] for name in (axis, "layer_blocks") if name in scored}
    return Scores(**tensors)


def calibration_hash(batches: Iterable[Mapping[str, Tensor]]) -> str:
    """Hash of all that a criterion reads of the rows: inputs, targets, and which of these count.

    Where rows are not padded, it does not depend on the size of the batches.
    """
    digest = hashlib.sha256()
    for batch in batches:
        read = [batch[key] for key in ("input_ids", "mask", *MODEL_INPUTS[1:]) if key in batch]
        if "attention_mask" in batch:  # the targets of a causal row follow from its tokens
            read.append(batch["targets"])
        for row in zip(*read, strict=True):
            digest.update(b"".join(tensor.numpy().tobytes() for tensor in row))
    return digest.hexdigest()[:16]


def write(file: Path, scores: Scores, about: Mapping[str, str]) -> None:
    """Write scores as safetensors, one tensor per axis, with what they are about and a checksum as metadata."""
    tensors = {axis: tensor.contiguous() for axis, tensor in scores.tensors().items()}
    write_bytes(file, save(tensors, metadata={**about, CHECK: _check(tensors)}))


def _file(context: StageContext, criterion: CriterionSpec, about: dict[str, str]) -> Path:
    key = hash_of(json.loads(criterion.model_dump_json()), about)
    return context.session.run.folder / SCORES_FOLDER / f"{criterion.kind}-{key}.safetensors"


def _read(file: Path) -> Scores | None:
    """Scores of an earlier run; None where there are none, or damaged ones: they are made again."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            tensors: dict[str, Any] = {axis: opened.get_tensor(axis) for axis in opened.keys()}  # noqa: SIM118
            check = (opened.metadata() or {}).get(CHECK)
    except (OSError, SafetensorError):
        return None
    return Scores(**tensors) if check == _check(tensors) else None


def _check(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for axis, tensor in sorted(tensors.items()):
        digest.update(f"{axis} {tensor.dtype} {[*tensor.shape]}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
