"""Quality of whatever makes logits, a model in memory or an engine, in the columns of a row."""

from __future__ import annotations

import math
from typing import Any

from distill.data.corpus import Corpus
from distill.data.task_corpus import TaskCorpus
from distill.evaluation.domains import together
from distill.evaluation.quality import FIGURES, Predictions, Quality, compare_predictions, predictions_of
from distill.evaluation.task_quality import measure_task
from distill.models.load import move
from distill.reporting.tradeoff import Domain
from distill.stages.models import check_packing, load_in_vocabulary
from distill.stages.session import StageContext
from distill.training.trainer import dtype_on, resolve_device


def load_to_measure(context: StageContext, location: str) -> Any:
    """A model on its device, in evaluation mode, in the tokens of the stage."""
    device = resolve_device(context.session.compute)
    return move(check_packing(context, load_in_vocabulary(context, location, dtype_on(device))), device)


def beside_teacher(
    context: StageContext, own: Predictions, teacher: Any, reference: str, batch_size: int
) -> dict[str, Any]:
    """Columns of quality on the validation text; a figure that is no finite number is left out and noted.

    Args:
        context: of the stage, in the vocabulary of what is measured.
        own: of what is measured.
        teacher: with its whole vocabulary, or None.
        reference: of the teacher.
        batch_size: rows of a batch.
    """
    if context.session.is_cut and teacher is not None:  # compared with the teacher in its own tokens
        teacher = load_to_measure(context, context.session.artifact(reference).location)
    theirs = None if teacher is None else predictions_of(teacher)
    corpus = context.session.corpus()
    if isinstance(corpus, TaskCorpus):
        return _on_task(own, theirs, corpus, batch_size)
    quality, by_source = _on_text(own, theirs, context.session.corpus(), batch_size)
    measured = {key: getattr(quality, key) for key in FIGURES}
    broken = [key for key, value in measured.items() if value is not None and not math.isfinite(value)]
    note = f"not a finite number: {', '.join(key.replace('_', ' ') for key in broken)}" if broken else ""
    domains = tuple(Domain(name, one.tokens, **_finite(one)) for name, one in by_source.items())
    return measured | dict.fromkeys(broken) | {"domains": domains, "notes": note}


def _on_task(own: Predictions, teacher: Predictions | None, corpus: TaskCorpus, batch_size: int) -> dict[str, Any]:
    """Columns of a task other than the next token, and under ``answers`` what a classifier answered."""
    found = measure_task(own, teacher, corpus, batch_size)
    columns: dict[str, Any] = {name: value for name, (value, _) in found.metrics.items()}
    columns["errors"] = {name: error for name, (_, error) in found.metrics.items()}
    columns |= {"domains": (), "notes": "", "answers": found.answers}
    if corpus.task.compares == "values":
        return columns
    quality = compare_predictions(own, teacher, corpus.validation_loader(batch_size))
    measured = _finite(quality)
    if corpus.task.kind != "masked_lm":
        measured["perplexity"] = None  # a perplexity over a few classes adds nothing to the accuracy
    return columns | measured


def _on_text(
    own: Predictions, teacher: Predictions | None, corpus: Corpus, batch_size: int
) -> tuple[Quality, dict[str, Quality]]:
    """Quality on the validation text, and of a mixture on each of its sources."""

    def on(one: Corpus) -> Quality:
        return compare_predictions(own, teacher, one.validation_loader(batch_size), one.validation_bytes)

    by_source = corpus.by_source()
    if not by_source:
        return on(corpus), {}
    found = {name: on(one) for name, one in by_source.items()}
    return together([(found[name], one.validation_bytes) for name, one in by_source.items()]), found


def _finite(quality: Quality) -> dict[str, float | None]:
    """The figures; None for those that are no finite number."""
    values = {key: getattr(quality, key) for key in FIGURES}
    return {key: value if value is not None and math.isfinite(value) else None for key, value in values.items()}
