"""The evaluate stage at work: quality and size of each model, then the speed of all of them in turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from distill.core.artifact import Artifact, write_text
from distill.evaluation.quality import predictions_of
from distill.models.load import load_config, low_bit_scheme, task_of
from distill.models.release import give_back_memory
from distill.models.size import measure_size
from distill.pruning.mask import nonzero_share
from distill.reporting.tables import COLUMNS, cell
from distill.reporting.task_tables import task_lines
from distill.reporting.tradeoff import OF_TASKS, Row, from_json, to_json
from distill.stages.evaluate.asking import Asking
from distill.stages.evaluate.file_row import row_of_file
from distill.stages.evaluate.measure import beside_teacher, load_to_measure
from distill.stages.evaluate.measured_exports import ModelFile, export_of, is_export, with_baselines
from distill.stages.evaluate.spec import Evaluate
from distill.stages.evaluate.speeds import measured_speeds
from distill.stages.evaluate.stored_rows import ROWS
from distill.stages.models import local_folder
from distill.stages.progress_lines import ProgressLines
from distill.stages.session import StageContext


def run(stage: Evaluate, context: StageContext) -> dict[str, Any]:
    """Quality and size of one model after the other, then speed in rounds over all of them."""
    references, files = _measured(stage, context)
    teacher = None
    if stage.teacher != "teacher" or context.session.teacher is not None:
        files = list(with_baselines(context, files, stage.teacher))
        teacher = load_to_measure(context, context.session.artifact(stage.teacher).location)
    num_models = len(references) + len(files)
    progress = ProgressLines(context, num_models, ("quality", "models"))
    asking = Asking(context, stage.tasks, batch_size=stage.batch_size, num_models=num_models)
    rows = [progress.count(_row(stage, context, reference, teacher, asking)) for reference in references]
    give_back_memory()  # an engine in its own process needs what the last model has used
    rows += [progress.count(row_of_file(stage, context, file, teacher, asking)) for file in files]
    del teacher  # a GPU's memory is wanted by the processes that measure speed
    give_back_memory()
    if stage.speed is not None:
        speeds = measured_speeds(context, stage.speed, rows, files)
        rows = [replace(row, **speeds[row.name]) for row in rows]
    for row in rows:
        context.say(_line(row))
        for line in _lines_of_sources(row):
            context.say(line)
    for line in task_lines(asking.finish(rows)):
        context.say(line)
    text = to_json(rows)
    from_json(text)  # what is written can be read
    write_text(context.folder / ROWS, text)
    missing = {file.target.engine_module: file.target.kind for file in files if file.target.install_command()}
    figures = {"not_installed": sorted(map(str, missing))} if missing else {}
    return {"models": [row.name for row in rows], "text": context.session.data_hash, **figures}


def _measured(stage: Evaluate, context: StageContext) -> tuple[list[str], list[ModelFile]]:
    """References of models, and exports."""
    if stage.models:
        named = [*stage.models, *stage.controls]
    else:
        stages = context.session.stages
        before = list(stages)[: list(stages).index(context.name)]
        teacher = [stage.teacher] if stage.teacher != "teacher" or context.session.teacher else []
        made = [name for name in before if _is_measured(stage, context, name)]
        named = [*teacher, *made, *stage.controls]
    named = list(dict.fromkeys(named))
    exports = [name for name in named if is_export(context, name)]
    return [name for name in named if name not in exports], [export_of(context, name) for name in exports]


def _is_measured(stage: Evaluate, context: StageContext, name: str) -> bool:
    """Whether a stage made a model or a file; one that still lacks the head of the task cannot be measured."""
    made, task = context.session.stages[name], context.session.data.task
    if not made.makes_model:
        return made.makes_file
    if task.is_causal or task.head == "embedding":
        return True
    head = task_of(load_config(context.session.artifact(name).location))
    if head != task.head:
        context.say(f"{name}: not measured, as it has no head for task: {task.kind} yet")
    return head == task.head


def _row(stage: Evaluate, context: StageContext, reference: str, teacher: Any, asking: Asking) -> Row:
    """Everything but speed."""
    artifact = context.session.artifact(reference)
    own = replace(context, session=context.session.in_vocabulary_of(reference))
    model = teacher if reference == stage.teacher else load_to_measure(own, artifact.location)
    measured = beside_teacher(own, predictions_of(model), teacher, stage.teacher, stage.batch_size)
    if (answers := measured.pop("answers", None)) is not None:
        asking.add(own.session.data.task.kind, reference, answers)
    asking.ask(reference, lambda: asking.in_memory(model, own.session))
    size = measure_size(local_folder(artifact))
    lineage = artifact.lineage()
    masked = lineage is not None and lineage.mask is not None
    history = _history(context, reference, artifact)
    notes = [history.pop("notes", ""), measured.pop("notes")]
    return Row(
        name=reference,
        role=stage.role(reference),
        kernel="simulated" if low_bit_scheme(load_config(artifact.location)) else "real",
        parameters=size.parameters,
        non_embedding_parameters=size.non_embedding_parameters,
        weight_bytes=size.weight_bytes,
        nonzero_share=nonzero_share(model) if masked else None,
        bits_per_parameter=size.bits_per_parameter,
        notes="; ".join(filter(None, notes)),
        **measured,
        **history,
    )


def _history(context: StageContext, reference: str, artifact: Artifact) -> dict[str, Any]:
    """What the lineage says: how the model came about."""
    lineage = artifact.lineage() if reference in context.session.stages else None
    if lineage is None:
        return {}
    figures = lineage.figures
    notes = [f"mask {lineage.mask}, stored and run as dense"] * (lineage.mask is not None)
    if lineage.num_tokens is not None:
        notes.append(f"vocabulary cut to {lineage.num_tokens:,} tokens, KL over these; compare bits per byte")
    return {
        "kind": lineage.kind,
        "parent": lineage.parent if getattr(context.session.stages[reference], "weights", "") != "random" else None,
        "scheme": figures.get("scheme"),
        "notes": "; ".join(notes),
        "training_tokens": figures.get("training_tokens", 0),
        "training_seconds": figures.get("training_seconds", 0.0),
    }


def _lines_of_sources(row: Row) -> list[str]:
    lines = []
    for one in row.domains:
        parts = [] if one.bits_per_byte is None else [f"{one.bits_per_byte:.3f} bits per byte"]
        parts += [] if one.kl_to_teacher is None else [f"KL {one.kl_to_teacher:.4f}"]
        lines.append(f"  on {one.name:<19} {'  '.join(parts)}")
    return lines


def _line(row: Row) -> str:
    if row.install is not None:
        return f"{row.name:<24} {row.scheme}, not measured: its engine is not installed: {row.install}"
    of_task = [column for column in COLUMNS if column.key in OF_TASKS and getattr(row, column.key) is not None]
    parts = [
        f"{row.name:<24} " + "  ".join(f"{one.title.lower()} {cell(row, one)} {one.unit}".rstrip() for one in of_task)
    ]
    if not of_task or row.perplexity is not None:
        perplexity = "   not finite" if row.perplexity is None else f" {row.perplexity:8.2f}"
        parts = [f"{parts[0]} perplexity{perplexity}".replace("  perplexity", " perplexity")]
    if row.kl_to_teacher is not None:
        parts.append(f"KL {row.kl_to_teacher:.4f}")
    if row.weight_bytes is not None:
        parts.append(f"{row.weight_bytes / 1e6:.2f} MB")
    if row.decode_tokens_per_s is not None:
        parts.append(f"decode {row.decode_tokens_per_s:.0f} tokens/s")
    return "  ".join(parts)
