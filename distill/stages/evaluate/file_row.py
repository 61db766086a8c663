"""The row of an export in its engine, but for its speed: size, and quality beside the teacher."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from distill.data.chat_spec import ChatSpec
from distill.evaluation.engine_process import EngineProcess
from distill.evaluation.tasks.in_engine import ModelInEngine
from distill.models.load import load_config
from distill.models.size import parameters_of
from distill.pretrained import generation_config_from
from distill.reporting.tradeoff import FILE, Row
from distill.stages.evaluate.asking import Asking
from distill.stages.evaluate.measure import beside_teacher
from distill.stages.evaluate.measured_exports import ModelFile
from distill.stages.evaluate.spec import Evaluate
from distill.stages.models import local_folder
from distill.stages.session import StageContext


def row_of_file(stage: Evaluate, context: StageContext, file: ModelFile, teacher: Any, asking: Asking) -> Row:
    """Everything but speed; where the engine is not installed, the command that installs it in place of figures.

    Args:
        stage: of the recipe.
        context: of the stage.
        file: that is measured.
        teacher: in memory, or None.
        asking: of the stage's tasks.

    Raises:
        MachineError: the engine or the file does not load; one line.
    """
    parameters, non_embedding = parameters_of(local_folder(context.session.artifact(file.model)))
    num_bytes = file.target.num_bytes(file.folder)
    row = Row(
        name=file.name,
        role=file.role,
        kind=FILE,
        parent=file.model,
        scheme=file.label,
        parameters=parameters,
        non_embedding_parameters=non_embedding,
        weight_bytes=num_bytes,
        bits_per_parameter=8 * num_bytes / parameters,
        install=file.target.install_command(),
        baseline=file.baseline,
    )
    if row.install is not None:
        return row
    own = replace(context, session=context.session.in_vocabulary_of(file.model))
    with EngineProcess(file.opening(context), file.name) as process:
        measured = beside_teacher(own, process.predictions, teacher, stage.teacher, stage.batch_size)
        if (answers := measured.pop("answers", None)) is not None:
            asking.add(own.session.data.task.kind, file.name, answers)
        asking.ask(file.name, lambda: in_engine(own, file, process))
    return replace(row, engine=process.facts.name, device=process.facts.device, **measured)


def in_engine(context: StageContext, file: ModelFile, process: EngineProcess) -> ModelInEngine:
    """What is asked in an engine.

    Args:
        context: of the stage, in the vocabulary of the file.
        file: that runs.
        process: in which it runs.
    """
    session, location = context.session, local_folder(context.session.artifact(file.model))
    known = getattr(load_config(location).get_text_config(), "max_position_embeddings", None)
    return ModelInEngine(
        process,
        session.tokenizer(),
        chat=session.data.chat or ChatSpec(),
        positions=known if isinstance(known, int) else 2048,
        ends=ends_of(location, session.tokenizer()),
    )


def ends_of(location: str, tokenizer: Any) -> list[int]:
    """Ids that end what a model writes."""
    end = getattr(generation_config_from(location), "eos_token_id", None)
    end = tokenizer.eos_token_id if end is None else end
    return [one for one in (end if isinstance(end, list) else [end]) if one is not None]
