"""The synthesize stage at work: a maker asks, filters drop, the rows are written."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from distill.core.artifact import write_text
from distill.core.errors import InputError
from distill.data.base import Item
from distill.data.clean import Cleaner
from distill.data.mixture_split import texts_of
from distill.stages.session import StageContext
from distill.stages.synthesize.asker import Asker
from distill.stages.synthesize.filters import Dropped, counts, filtered
from distill.stages.synthesize.makers.base import MakerResult
from distill.stages.synthesize.replies import Replies
from distill.stages.synthesize.row_files import ABOUT, DROPPED, EXAM, write_lines, write_rows
from distill.stages.synthesize.spec import Synthesize
from distill.stages.synthesize.writer import writer_of

SHOWN = 3


def run(stage: Synthesize, context: StageContext) -> dict[str, Any]:
    """Make the data set."""
    started = time.perf_counter()
    for line in stage.make.check():
        context.say(line)
    writer = writer_of(stage.writer, stage.batch_size, context)
    replies = Replies(context.folder, writer.identity())
    asker = Asker(context, writer, replies)
    made = stage.make.make(asker, _texts(context), context.session.seed)
    kept, dropped = filtered(made.rows, stage.filters, made.exam, asker)
    by_filter = counts(dropped)
    _check_yield(stage, made, len(kept), dropped)
    write_rows(context.folder, [row.row() for row in kept], stage.rows_per_file)
    write_lines(context.folder / DROPPED, (_dropped_row(one) for one in dropped))
    write_lines(context.folder / EXAM, (asdict(question) for question in made.exam))
    figures = {
        "writer": writer.identity(),
        "rows": len(kept),
        "rows_before_filters": len(made.rows),
        "dropped": by_filter,
        "exam_questions": len(made.exam),
        "replies": len(replies),
        "tokens": replies.num_tokens(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    about = {**figures, "stage": stage.model_dump(mode="json"), "seed": context.session.seed}
    write_text(context.folder / ABOUT, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    context.say(f"{len(kept):,} of {len(made.rows):,} rows kept; dropped: {in_words(by_filter)}")
    if made.exam:
        context.say(f"exam: {len(made.exam)} questions kept out, in {EXAM}")
    context.say(f"look at them: distill data {context.folder}")
    return figures


def in_words(by_filter: dict[str, int]) -> str:
    """Counts of dropped rows, for people."""
    return ", ".join(f"{name} {count:,}" for name, count in by_filter.items()) or "none"


def _texts(context: StageContext) -> Iterator[Item]:
    """The training side of the recipe's text, as it is trained on: cleaned, without what validates."""
    data = context.session.data
    texts = texts_of(data)
    cleaner = None if data.clean is None else Cleaner(data.clean, texts)
    for text in texts:
        yield from text.split.training() if cleaner is None else cleaner.training(text)


def _dropped_row(one: Dropped) -> dict[str, Any]:
    return {"filter": one.filter, "why": one.why, **one.row.row()}


def _check_yield(stage: Synthesize, made: MakerResult, num_kept: int, dropped: list[Dropped]) -> None:
    """Stop where so few rows remain that something is wrong with the writer or the prompts.

    Raises:
        InputError: with the counts and the first replies as they were written.
    """
    least = stage.filters.min_yield
    if not least or (made.rows and num_kept >= max(1, least * len(made.rows))):
        return
    lines = [
        f"{num_kept} of {len(made.rows)} rows were kept, filters.min_yield is {least:g}; dropped: "
        f"{in_words(counts(dropped))}; change the writer or the filters. What was written:"
    ]
    lines += [f"  raw: {' '.join(text.split())[:300]!r}" for text in made.raw[:SHOWN]]
    lines += [f"  {one.filter}: {one.why}: {one.row.answer[:100]!r}" for one in dropped[:SHOWN]]
    raise InputError("\n".join(lines))
