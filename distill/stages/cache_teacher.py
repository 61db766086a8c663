"""The teacher asked once: its output on the training text, on disk, for any number of students.

A cache belongs to a teacher and a text. The stages that name it may differ in student, order, batch size, packing and
devices, and pay for no teacher: neither its time nor its memory. The validation text is cached too, always as hidden
states, so that the validation's KL is the exact one whatever the codec.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from distill.core.artifact import replacing
from distill.core.errors import InputError
from distill.data.teacher_cache import CODECS, Hidden, TopK
from distill.data.teacher_cache.base import CodecSpec
from distill.data.teacher_cache.head_file import head_file, is_whole, seal
from distill.losses import AnyLossSpec, LossSpec, states
from distill.losses.sparse import refusal
from distill.stages.base import StageContext, StageSpec
from distill.training.spec import DistillSpec

if TYPE_CHECKING:
    from distill.data.blocks import Blocks
    from distill.data.corpus import Corpus
    from distill.data.spec import DataSpec, Packing
    from distill.data.teacher_cache.cache import Place
    from distill.data.teacher_cache.write import Live
    from distill.training.cached_teacher import CachedTeacher

NO_STREAM = (
    "a stream has no positions that a cache could belong to; store its text first (streaming: false, or a file), or "
    "learn from the teacher itself"
)


class CacheTeacher(StageSpec):
    """Write down what the teacher says about the training text, so that students learn without it in memory."""

    makes_signal: ClassVar[bool] = True

    kind: Literal["cache_teacher"] = "cache_teacher"
    teacher: str = "teacher"
    """Whom to ask: "teacher", an earlier stage (a corrected teacher), a folder or a Hub id."""
    codec: Annotated[CodecSpec, CODECS] = TopK()
    """How much of each distribution is kept."""
    num_sequences: int | None = Field(None, ge=1)
    """Training blocks to cache, the first in the order of training; unset: all that the stages of this recipe use."""
    window: int | None = Field(None, ge=2)
    """Tokens that the teacher reads at once; unset: as in the cache that is in `folder`, else data.sequence_length."""
    batch_size: int = Field(8, ge=1)
    """Sequences a forward pass of the teacher."""
    folder: str | None = None
    """Where the cache is, to share it between runs; unset: in the run's data folder, under its hash."""

    def references(self) -> list[tuple[tuple[str | int, ...], str]]:
        """The teacher."""
        return [(("teacher",), self.teacher)]

    def refuses(self, losses: Sequence[AnyLossSpec]) -> str | None:
        """Why a stage with these losses cannot learn from this cache, as one line; None when it can."""
        if why := states.refusal(losses):
            return why
        return None if self.codec.whole else refusal([loss for loss in losses if isinstance(loss, LossSpec)])

    def run(self, context: StageContext) -> dict[str, Any]:
        """Fill the cache with what the stages after this one will use."""
        header, places = self.fill(context, self.demand(context))
        context.say(f"cache: {places[0].folder.parent}")
        sizes = [sum(file.stat().st_size for file in place.folder.glob("shard-*")) for place in places]
        return {"codec": self.codec.model_dump(), "folder": str(places[0].folder), "fidelity": header["fidelity"]} | {
            "train_bytes": sizes[0],
            "validation_bytes": sizes[1],
        }

    def demand(self, context: StageContext) -> int | None:
        """Training sequences that the stages which name this one take from the order of training; None is all."""
        if self.num_sequences is not None:
            return self.num_sequences
        tokens = context.session.corpus().tokens_per_sequence
        users: list[Any] = [
            stage for stage in context.session.stages.values() if getattr(stage, "teacher", None) == context.name
        ]
        wanted = [stage.steps(tokens) * stage.batch_size for stage in users if isinstance(stage, DistillSpec)]
        return max(wanted) if any(wanted) else None

    def fill(self, context: StageContext, num_sequences: int | None) -> tuple[dict[str, Any], tuple[Place, Place]]:
        """Write what is missing of the first ``num_sequences`` training blocks and of the validation text.

        Returns:
            The header of the training cache, and where both caches are.
        """
        from distill.data.teacher_cache.write import fill

        corpus = context.session.corpus()
        places = self.places(context, corpus)
        for place in places:
            place.header()  # another's cache is refused before any teacher is loaded
        teacher = _Loaded(context, self, places[0])
        train, validation = _blocks(corpus), corpus.validation
        wanted = (_first(corpus, num_sequences), range(len(validation)))
        headers = [
            fill(
                place,
                blocks.tokens,
                place.needed(blocks, numbers),
                teacher,
                batch_size=self.batch_size,
                what=what,
                say=context.say,
            )
            for what, place, blocks, numbers in zip(
                ("train", "validation"), places, (train, validation), wanted, strict=True
            )
        ]
        teacher.keep_head()
        return headers[0], places

    def places(self, context: StageContext, corpus: Corpus) -> tuple[Place, Place]:
        """Where the caches of the training and the validation text are, or will be.

        Raises:
            InputError: the source is a stream, or the vocabulary is too large for the codec.
        """
        from distill.core.artifact import fingerprint
        from distill.data.blocks import Blocks
        from distill.data.teacher_cache.cache import Place
        from distill.data.teacher_cache.identity import Identity
        from distill.data.tokenizer import tokenizer_hash
        from distill.models.load import load_config

        session = context.session
        location = session.artifact(self.teacher).location
        config = load_config(location).get_text_config()
        if why := self.codec.refuses(config.vocab_size):
            raise InputError(why)
        tokenizer, teacher = tokenizer_hash(session.tokenizer()), fingerprint(location)
        shared = Path(self.folder).expanduser() if self.folder else None
        window, packing = self._reading(shared, session.data)
        ours = [
            Identity.of(teacher, tokenizer, Blocks(blocks.tokens, window, packing=packing), codec)
            for blocks, codec in ((_blocks(corpus), self.codec), (corpus.validation, Hidden()))
        ]
        folder = shared or session.run.folder / "data" / f"teacher-{ours[0].key()}"
        train = Place(folder / "train", ours[0], self.codec, 0, config.vocab_size)
        train = replace(train, width=config.hidden_size if self.codec.reads == "hidden" else config.vocab_size)
        # validation settings change more often than the training text does
        validation = Place(
            folder / f"validation-{ours[1].key()}", ours[1], Hidden(), config.hidden_size, config.vocab_size
        )
        return train, validation

    def _reading(self, folder: Path | None, data: DataSpec) -> tuple[int, Packing]:
        """The teacher's window and packing: of the shared cache that is there, else of this run."""
        from distill.data.teacher_cache.identity import read_header

        header = read_header(folder / "train") if folder is not None else None
        there = header["identity"] if header is not None else {}
        return self.window or there.get("window", data.sequence_length), there.get("packing", data.packing)


def open_cache(context: StageContext, name: str, num_sequences: int) -> tuple[Corpus, CachedTeacher]:
    """The run's data with the teacher's output in its batches, and the teacher that reads it.

    Args:
        context: of the stage that will train.
        name: of the cache_teacher stage.
        num_sequences: that the training will take from its order. What the cache lacks of them is added.

    Raises:
        InputError: the cache is limited to fewer sequences, or belongs to another teacher, tokenizer or text.
    """
    import torch

    from distill.data.teacher_cache.cache import CachedBlocks
    from distill.training.cached_teacher import CachedTeacher
    from distill.training.trainer import resolve_device

    stage = context.session.stages[name]
    assert isinstance(stage, CacheTeacher)
    corpus = context.session.corpus()
    _refuse_other_tokens(context, name, stage)
    needed, kept = _first(corpus, num_sequences), stage.num_sequences
    if kept is not None and (lacking := len(set(needed) - set(_first(corpus, kept)))):
        raise InputError(
            f"the cache {name!r} holds {kept} training sequences and {lacking} of the {len(needed)} different ones of "
            f"this stage are not among them; raise its num_sequences to {num_sequences} or leave it unset"
        )
    _, (train, validation) = stage.fill(context, kept or num_sequences)
    cached = replace(
        corpus, train=CachedBlocks(_blocks(corpus), train), validation=CachedBlocks(corpus.validation, validation)
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
    from distill.data.tokenizer import load_tokenizer

    session = context.session
    if session.is_cut:
        written = load_tokenizer(session.artifact(stage.teacher).location)
        if written.get_vocab() != session.tokenizer().get_vocab():
            raise InputError(
                f"the cache {name!r} holds what {stage.teacher} says in {len(written)} tokens, and the student speaks "
                f"{len(session.tokenizer())} of them; name {stage.teacher} here, which is then cut to these"
            )


def _blocks(corpus: Corpus) -> Blocks:
    from distill.data.blocks import Blocks

    if not isinstance(corpus.train, Blocks):
        raise InputError(NO_STREAM)
    return corpus.train


def _first(corpus: Corpus, num_sequences: int | None) -> list[int]:
    """The different blocks among the first sequences of the order of training."""
    from distill.data.loader import order_of

    count = len(_blocks(corpus))
    if num_sequences is None or num_sequences >= count:
        return list(range(count))  # the first pass holds each block once
    order = order_of(_blocks(corpus), corpus.seed, 1)
    return sorted(order.block_at(position) for position in range(num_sequences))


class _Loaded:
    """The teacher, loaded when it is first asked for, and its head to be kept."""

    def __init__(self, context: StageContext, stage: CacheTeacher, train: Place):
        self.context, self.stage, self.read = context, stage, train.identity
        self.head = head_file(train.folder.parent)
        self._live: Live | None = None

    def __call__(self) -> Live:
        from distill.data.spec import APART
        from distill.data.teacher_cache.write import Live
        from distill.models.head import check_head, hidden_states, output_head
        from distill.models.load import move
        from distill.models.packed import check_apart
        from distill.stages.train import check_context_length, load_frozen
        from distill.training.trainer import resolve_teacher

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
        from distill.data.packing import alone
        from distill.models.head import save_head

        with alone(self.head.parent.parent):
            if not is_whole(self.head):
                self()
                with replacing(self.head.parent) as folder:
                    save_head(self._model, folder / self.head.name)
                    seal(folder / self.head.name)
