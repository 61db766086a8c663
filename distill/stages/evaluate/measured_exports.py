"""Exports that an evaluate stage measures, each in its engine, and the teacher's own files that stand beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distill.core.artifact import hash_of, replacing
from distill.core.errors import InputError
from distill.core.seal import is_sealed, seal
from distill.core.tasks import Embedding
from distill.evaluation.engine import TRANSFORMERS, Opening
from distill.exporters.base import ExporterSpec
from distill.models.kv_cache import cache_type
from distill.models.load import load_config
from distill.quantization.kv_cache import CacheType
from distill.reporting.tradeoff import Role
from distill.stages.export import Export
from distill.stages.models import local_folder
from distill.stages.session import StageContext
from distill.training.trainer import dtype_on, resolve_device

FOLDER = "teacher-files"
"""Folder of the stage with the teacher's files, which are written for the comparison alone."""


@dataclass(frozen=True)
class ModelFile:
    """An export, or a file of the teacher's.

    Attributes:
        name: of its row.
        model: reference of the model that it was made from.
        target: what wrote it.
        folder: where it is.
        label: format and precision.
        role: in the comparison.
        kv_cache: type of keys and values that the model was trained for, in which it runs in llama.cpp; None: F16.
        baseline: name of the row of the teacher's file of the same precision; None: there is none, or it is that.
    """

    name: str
    model: str
    target: ExporterSpec
    folder: Path
    label: str
    role: Role
    kv_cache: CacheType | None = None
    baseline: str | None = None

    def opening(self, context: StageContext) -> Opening:
        """How its engine is opened, on the machine of the recipe."""
        device = resolve_device(context.session.compute)
        is_transformers = self.target.runs_in == TRANSFORMERS
        dtype = dtype_on(device) if is_transformers else "auto"
        task = context.session.data.task
        pooling = (task.pooling, task.normalize) if isinstance(task, Embedding) else None
        folder, module = str(self.folder), self.target.runs_in
        return Opening(folder, module, device, dtype, kv_cache=self.kv_cache, pooling=pooling)


def is_export(context: StageContext, reference: str) -> bool:
    """Whether a reference names an export stage."""
    return isinstance(context.session.stages.get(reference), Export)


def export_of(context: StageContext, reference: str) -> ModelFile:
    """The file of a finished export stage.

    Raises:
        InputError: a file of it has changed since it was written.
    """
    stage, run = context.session.stages[reference], context.session.run
    done = run.done(reference)
    assert isinstance(stage, Export)
    assert done is not None  # stages run in order
    run.check(reference, done.figures["folder"])
    folder = run.stage(reference) / done.figures["folder"]
    is_transformers = stage.target.runs_in == TRANSFORMERS
    cache = None if is_transformers else cache_type(load_config(local_folder(context.session.artifact(stage.model))))
    return ModelFile(reference, stage.model, stage.target, folder, _label(stage.target, folder), "student", cache)


def with_baselines(context: StageContext, files: Sequence[ModelFile], teacher: str) -> Iterator[ModelFile]:
    """The files, each followed by the teacher's file of the same format and precision where that is another one.

    A teacher's file that is not there yet is written, one for each setting of the exporter.

    Args:
        context: of the stage.
        files: exports of the run.
        teacher: reference of the teacher.
    """
    installed = [one for one in files if one.target.install_command() is None]
    named: dict[str, str | None] = {_format(one): one.name for one in installed if one.model == teacher}
    for one in files:
        if one.model == teacher or one not in installed:
            yield one
            continue
        made, wanted = None, _format(one)
        if wanted not in named:
            taken = sum(other.startswith(f"{teacher} as {one.label}") for other in named.values() if other)
            made = _of_teacher(context, one, teacher, f" ({taken + 1})" if taken else "")
            named[wanted] = None if made is None else made.name
        yield replace(one, baseline=named[wanted])
        if made is not None:
            yield made


def _format(one: ModelFile) -> str:
    """All settings of the exporter that rounds a full-precision model to the precision of this file, and the cache."""
    target = one.target.post_training(one.folder)
    settings = "none" if target is None else target.model_dump_json(exclude={"max_kl"})
    return f"{one.label}, cache {one.kv_cache}: {settings}"


def _of_teacher(context: StageContext, one: ModelFile, teacher: str, number: str) -> ModelFile | None:
    target = one.target.post_training(one.folder)
    if target is None:
        context.say(f"{one.name}: no exporter rounds the teacher to {one.label}, so none of its files is beside it")
        return None
    name = f"{teacher} as {one.label}{number}"
    folder = context.folder / FOLDER / f"{one.label.replace(' ', '-')}-{hash_of(_format(one))[:8]}"
    try:
        if not is_sealed(folder):  # not there, or damaged since it was written
            with replacing(folder) as place:
                target.export(Path(local_folder(context.session.artifact(teacher))), place, title="teacher")
                seal(place)
    except InputError as error:
        context.say(f"{one.name}: the teacher cannot be written as {one.label}, to stand beside it: {error}")
        return None
    return ModelFile(name, teacher, target, folder, _label(target, folder), "control", one.kv_cache)


def _label(target: ExporterSpec, folder: Path) -> str:
    """By the writer's package, which may be gone where the file was made on another machine."""
    return target.kind if target.missing() else target.label(folder)
