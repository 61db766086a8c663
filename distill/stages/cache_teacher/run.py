"""The cache_teacher stage at work: fill the cache with what the stages after this one will use."""

from __future__ import annotations

from typing import Any

from distill.stages.cache_teacher.fill import fill_cache
from distill.stages.cache_teacher.spec import CacheTeacher
from distill.stages.session import StageContext
from distill.training.spec import DistillSpec


def run(stage: CacheTeacher, context: StageContext) -> dict[str, Any]:
    """Fill the cache with what the stages after this one will use."""
    header, places = fill_cache(stage, context, demand(stage, context))
    context.say(f"cache: {places[0].folder.parent}")
    sizes = [sum(file.stat().st_size for file in place.folder.glob("shard-*")) for place in places]
    return {"codec": stage.codec.model_dump(), "folder": str(places[0].folder), "fidelity": header["fidelity"]} | {
        "train_bytes": sizes[0],
        "validation_bytes": sizes[1],
    }


def demand(stage: CacheTeacher, context: StageContext) -> int | None:
    """Training sequences that the stages which name this one take from the order of training; None is all."""
    if stage.num_sequences is not None:
        return stage.num_sequences
    corpus, most = context.session.corpus(), 0
    for student in context.session.stages.values():
        if isinstance(student, DistillSpec) and student.teacher_named() == context.name:
            most = max(most, corpus.steps_of(student) * student.batch_size)
    return most or None
