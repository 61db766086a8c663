"""The same prompts to several models of a run, and to exports in their engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill.evaluation.engine_process import EngineProcess
from distill.evaluation.side_by_side import Answer, align, answers_in_engine, answers_of
from distill.models.release import give_back_memory
from distill.reporting.tradeoff import Row
from distill.stages.evaluate.file_row import ends_of
from distill.stages.evaluate.measured_exports import export_of, is_export
from distill.stages.models import local_folder
from distill.stages.report.spec import ASKED, PROMPTS, Report
from distill.stages.session import StageContext
from distill.training.trainer import dtype_on, resolve_device


def answers_to(stage: Report, context: StageContext, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Answers side by side, one model in memory at a time; an export whose engine is missing is left out by a line."""
    chat = context.session.chat_prompts
    if not context.session.data.task.is_causal:  # such models continue no text
        return []
    prompts = ASKED if stage.prompts == PROMPTS and chat is not None else stage.prompts
    trained = [row.name for row in rows if row.role == "teacher" or (row.role == "student" and row.training_tokens)]
    given: dict[str, list[Answer]] = {}
    for name in list(stage.models) or trained if prompts else []:
        found = (
            _in_engine(stage, context, name, prompts)
            if is_export(context, name)
            else _of_model(stage, context, name, prompts)
        )
        if found is not None:
            given[name] = found
        give_back_memory()
    simulated = [row.name for row in rows if row.kernel == "simulated"]
    return align(prompts, given, simulated) if given else []


def _of_model(stage: Report, context: StageContext, name: str, prompts: Sequence[str]) -> list[Answer]:
    device = resolve_device(context.session.compute)
    return answers_of(
        context.session.artifact(name).location,
        prompts,
        new_tokens=stage.new_tokens,
        device=device,
        dtype=dtype_on(device),
        encode=context.session.chat_prompts,
    )


def _in_engine(stage: Report, context: StageContext, name: str, prompts: Sequence[str]) -> list[Answer] | None:
    file = export_of(context, name)
    if (command := file.target.install_command()) is not None:
        context.say(f"{name}: not asked, as its engine is not installed: {command}")
        return None
    session = context.session.in_vocabulary_of(file.model)
    location = local_folder(session.artifact(file.model))
    with EngineProcess(file.opening(context), name) as process:
        return answers_in_engine(
            process,
            session.tokenizer(),
            prompts,
            new_tokens=stage.new_tokens,
            ends=ends_of(location, session.tokenizer()),
            encode=session.chat_prompts,
        )
