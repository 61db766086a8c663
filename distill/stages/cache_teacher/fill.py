"""Write what a cache lacks: the teacher reads the rows that are not there yet, and is loaded only for those."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.core.artifact import fingerprint, replacing
from distill.core.errors import InputError
from distill.data.corpus import Corpus
from distill.data.loader import order_of
from distill.data.micro_batches import MicroBatches
from distill.data.packed_rows import PackedRows
from distill.data.packing import file_lock
from distill.data.spec import APART, DataSpec, Packing
from distill.data.teacher_cache import Hidden
from distill.data.teacher_cache.cache import CacheLocation
from distill.data.teacher_cache.head_file import head_file, is_whole, seal
from distill.data.teacher_cache.identity import Identity, read_header
from distill.data.teacher_cache.write_cache import Live, fill
from distill.data.tokenizer import tokenizer_hash
from distill.models.head import check_head, hidden_states, output_head, save_head
from distill.models.load import load_config, move
from distill.models.packed import check_apart
from distill.stages.cache_teacher.spec import NO_STREAM, CacheTeacher
from distill.stages.models import check_context_length, load_frozen
from distill.stages.session import StageContext
from distill.training.trainer import resolve_teacher


def fill_cache(
    stage: CacheTeacher, context: StageContext, num_sequences: int | None
) -> tuple[dict[str, Any], tuple[CacheLocation, CacheLocation]]:
    """Write what is missing of the first ``num_sequences`` training rows and of the validation text.

    Returns:
        The header of the training cache, and where both caches are.
    """
    corpus = context.session.corpus()
    places = places_of(stage, context, corpus)
    for place in places:
        place.header()  # another's cache is refused before any teacher is loaded
    teacher = _Loaded(context, stage, places[0])
    train, validation = train_rows_of(corpus), corpus.validation
    wanted = (first_of(corpus, num_sequences), range(len(validation)))
    headers = [
        fill(
            place,
            packed.tokens,
            place.needed(packed, numbers),
            teacher,
            batch_size=stage.batch_size,
            what=what,
            say=context.say,
        )
        for what, place, packed, numbers in zip(
            ("train", "validation"), places, (train, validation), wanted, strict=True
        )
    ]
    teacher.keep_head()
    return headers[0], places


def places_of(stage: CacheTeacher, context: StageContext, corpus: Corpus) -> tuple[CacheLocation, CacheLocation]:
    """Where the caches of the training and the validation text are, or will be.

    Raises:
        InputError: the source is a stream, or the vocabulary is too large for the codec.
    """
    session = context.session
    location = session.artifact(stage.teacher).location
    config = load_config(location).get_text_config()
    if why := stage.codec.refuses(config.vocab_size):
        raise InputError(why)
    tokenizer, teacher = tokenizer_hash(session.tokenizer()), fingerprint(location)
    shared = Path(stage.folder).expanduser() if stage.folder else None
    window, packing = _reading(stage, shared, session.data)
    if session.data.holds_conversations and window < session.data.sequence_length:
        raise InputError(
            f"window ({window}) would cut conversations, of which rows hold {session.data.sequence_length} tokens "
            "(data.sequence_length); leave it unset, or name another folder"
        )
    ours = [
        Identity.of(teacher, tokenizer, PackedRows(packed.tokens, window, packing=packing), codec)
        for packed, codec in ((train_rows_of(corpus), stage.codec), (corpus.validation, Hidden()))
    ]
    folder = shared or session.run.folder / "data" / f"teacher-{ours[0].key()}"
    train = CacheLocation(folder / "train", ours[0], stage.codec, 0, config.vocab_size)
    train = replace(train, width=config.hidden_size if stage.codec.reads == "hidden" else config.vocab_size)
    # validation settings change more often than the training text does
    validation = CacheLocation(
        folder / f"validation-{ours[1].key()}", ours[1], Hidden(), config.hidden_size, config.vocab_size
    )
    return train, validation


def _reading(stage: CacheTeacher, folder: Path | None, data: DataSpec) -> tuple[int, Packing]:
    """The teacher's window and packing: of the shared cache that is there, else of this run."""
    header = read_header(folder / "train") if folder is not None else None
    there = header["identity"] if header is not None else {}
    return stage.window or there.get("window", data.sequence_length), there.get("packing", data.packing)


def train_rows_of(corpus: Corpus) -> PackedRows:
    if not isinstance(corpus.train, PackedRows):
        raise InputError(NO_STREAM)
    return corpus.train


def first_of(corpus: Corpus, num_sequences: int | None) -> list[int]:
    """The different rows among the first sequences of the order of training."""
    count, parts = len(train_rows_of(corpus)), train_rows_of(corpus).tokens.parts
    if num_sequences is None or (not parts and num_sequences >= count):
        return list(range(count))  # the first pass holds each row once
    order = order_of(train_rows_of(corpus), corpus.seed, MicroBatches(1))
    return sorted({order.row_at(position) for position in range(num_sequences)})


class _Loaded:
    """The teacher, loaded when it is first asked for, and its head to be kept."""

    def __init__(self, context: StageContext, stage: CacheTeacher, train: CacheLocation):
        self.context, self.stage, self.read = context, stage, train.identity
        self.head = head_file(train.folder.parent)
        self._live: Live | None = None

    def __call__(self) -> Live:
        if self._live is None:
            device, _ = resolve_teacher(self.context.session.compute)
            model = move(load_frozen(self.context, self.stage.teacher), device)
            check_head(model)
            check_context_length(model, self.read.window, "the teacher's window")
            if self.read.packing in APART:
                check_apart(model)
            self._model = model
            self._live = Live(lambda batch: hidden_states(model, **batch), output_head(model).logits, device)
        return self._live

    def keep_head(self) -> None:
        """Write the head beside the caches, once, and again when it was damaged."""
        with file_lock(self.head.parent.parent):
            if not is_whole(self.head):
                self()
                with replacing(self.head.parent) as folder:
                    save_head(self._model, folder / self.head.name)
                    seal(folder / self.head.name)
