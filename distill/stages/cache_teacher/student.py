"""What a student reads of a cache in place of a teacher."""

from __future__ import annotations

from dataclasses import replace

import torch

from distill.core.errors import InputError
from distill.data.corpus import Corpus
from distill.data.teacher_cache.cache import CachedRows
from distill.data.teacher_cache.head_file import head_file
from distill.data.tokenizer import load_tokenizer
from distill.stages.cache_teacher.fill import fill_cache, first_of, train_rows_of
from distill.stages.cache_teacher.spec import CacheTeacher
from distill.stages.session import StageContext
from distill.training.cached_teacher import CachedTeacher
from distill.training.trainer import resolve_device


def open_cache(context: StageContext, name: str, num_sequences: int) -> tuple[Corpus, CachedTeacher]:
    """The run's data with the teacher's output in its batches, and the teacher that reads it.

    Args:
        context: of the stage that will train.
        name: of the cache_teacher stage.
        num_sequences: that the training will take from its order. What the cache lacks of them is added.

    Raises:
        InputError: the cache is limited to fewer sequences, or belongs to another teacher, tokenizer or text.
    """
    stage = context.session.stages[name]
    assert isinstance(stage, CacheTeacher)
    corpus = context.session.corpus()
    _refuse_other_tokens(context, name, stage)
    needed, kept = first_of(corpus, num_sequences), stage.num_sequences
    if kept is not None and (lacking := len(set(needed) - set(first_of(corpus, kept)))):
        raise InputError(
            f"the cache {name!r} holds {kept} training sequences and {lacking} of the {len(needed)} different ones of "
            f"this stage are not among them; raise its num_sequences to {num_sequences} or leave it unset"
        )
    _, (train, validation) = fill_cache(stage, context, kept or num_sequences)
    cached = replace(
        corpus, train=CachedRows(train_rows_of(corpus), train), validation=CachedRows(corpus.validation, validation)
    )
    read, data = train.identity, context.session.data
    if (read.window, read.packing) != (data.sequence_length, data.packing):
        context.say(
            f"the teacher read {read.packing} rows of {read.window}, this run has {data.packing} rows of "
            f"{data.sequence_length}: at each token it says what it said after the text that it had seen"
        )
    dtype = None if resolve_device(context.session.compute) == "cuda" else torch.float32
    head = head_file(train.folder.parent)
    return cached, CachedTeacher(train.vocabulary, head, whole=stage.codec.whole, dtype=dtype)


def _refuse_other_tokens(context: StageContext, name: str, stage: CacheTeacher) -> None:
    session = context.session
    if session.is_cut:
        written = load_tokenizer(session.artifact(stage.teacher).location)
        if written.get_vocab() != session.tokenizer().get_vocab():
            raise InputError(
                f"the cache {name!r} holds what {stage.teacher} says in {len(written)} tokens, and the student speaks "
                f"{len(session.tokenizer())} of them; name {stage.teacher} here, which is then cut to these"
            )
