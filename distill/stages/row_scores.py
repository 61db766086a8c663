"""What ``data.order`` sorts the first rows of a training by, where their lengths do not tell."""

from __future__ import annotations

import numpy as np

from distill.core.artifact import fingerprint
from distill.core.errors import InputError
from distill.core.stop import stoppable
from distill.data.packing import file_lock
from distill.data.row_loss_file import RowLossFile
from distill.data.teacher_cache.write_cache import RowProgress
from distill.models.head import check_head
from distill.models.load import move
from distill.stages.cache_teacher.fill import first_of, train_rows_of
from distill.stages.models import check_context_length, load_frozen
from distill.stages.session import StageContext
from distill.training.row_losses import row_losses
from distill.training.trainer import resolve_teacher


def losses_of_teacher(
    context: StageContext, teacher: str | None, num_sequences: int, batch_size: int
) -> np.ndarray | None:
    """The teacher's loss on each row that the training sorts; None where it sorts none by it.

    What is not known yet is computed by the first process that comes here, and kept beside the tokens for others, for
    later trainings with the same teacher, and for a run that is interrupted.

    Args:
        context: of the stage that will train.
        teacher: reference of the teacher.
        num_sequences: rows that the training reads.
        batch_size: rows that the teacher reads at once.

    Returns:
        fp32 [rows], in nats per token; NaN for rows that are not sorted.

    Raises:
        InputError: there is no teacher, it has other tokens, or a loss is not finite.
    """
    order, corpus = context.session.data.order, context.session.corpus()
    count = corpus.num_sorted(num_sequences)
    if order is None or order.by != "teacher_loss" or not count:
        return None
    if teacher is None:
        raise InputError(
            f"stages.{context.name}: data.order by teacher_loss needs a teacher, which this stage has not; give it a "
            "data section of its own, or order by length"
        )
    packed, location = train_rows_of(corpus), context.session.artifact(teacher).location
    rows = np.array(first_of(corpus, count), np.int64)
    if packed.packing == "padded":  # rows of like length together
        rows = rows[np.argsort(packed.lengths()[rows], kind="stable")]
    with file_lock(context.session.run.folder / "data"):
        losses = RowLossFile(packed, fingerprint(location))
        if len(missing := losses.missing(rows)):
            context.say(f"data.order: {teacher} reads {len(missing):,} rows, once, to sort them by its loss")
            _compute(context, teacher, losses, missing, batch_size)
        return losses.read()


def _compute(context: StageContext, teacher: str, losses: RowLossFile, rows: np.ndarray, batch_size: int) -> None:
    session = context.session
    device, _ = resolve_teacher(session.compute)
    model = move(load_frozen(context, teacher), device).eval()
    check_head(model)
    check_context_length(model, session.data.sequence_length)
    packed, progress = train_rows_of(session.corpus()), RowProgress("the teacher's loss", len(rows))
    for start in stoppable(range(0, len(rows), batch_size)):
        some = rows[start : start + batch_size]
        found = row_losses(model, packed[some.tolist()]).numpy()
        if not np.isfinite(found).all():
            bad = int(some[np.argmin(np.isfinite(found))])
            raise InputError(f"data.order: the loss of {teacher} on row {bad} is not finite; choose another teacher")
        losses.write(some, found.astype(np.float32))
        for _ in some:
            progress.advance()
