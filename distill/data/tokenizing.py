"""Who tokenizes one side of a text, and what of its source goes into it.

Most texts are tokenized by all processes of a run, a part each. Where the order of documents matters
(:attr:`~distill.data.spec.DataSpec.needs_order`) one process tokenizes it, while the others wait.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from distill.core.world import World
from distill.data.base import Item
from distill.data.clean import Cleaner
from distill.data.encoder import TextEncoder
from distill.data.mixture_split import OneText
from distill.data.packing import TokenFile, read_tokens, write_tokens
from distill.data.repeats import Found, ValidationRepeats
from distill.data.replace_words import WordReplacer
from distill.data.shared_tokens import SharedText


def tokens_of(
    path: Path,
    side: str,
    text: OneText,
    encoder: TextEncoder,
    vocabulary_size: int,
    cleaner: Cleaner | None,
    replacer: WordReplacer | None,
    repeats: ValidationRepeats | None,
    world: World | None,
) -> TokenFile:
    """One side of a text as tokens, read where they are there and else made.

    Args:
        path: the ``.bin`` file.
        side: ``"train"`` or ``"validation"``.
        text: a source with its split.
        encoder: text to ids.
        vocabulary_size: every id must be below it.
        cleaner: leaves rows of the training side out; None: all stay.
        replacer: adds copies to it; None: there are none.
        repeats: counts its documents that nearly repeat validation text, on the first process; None: they are not.
        world: the processes that ask for it at once and make a part each; None: this one makes it alone, and holds the
            lock on the folder.

    Raises:
        InputError: the text cannot be read, or an id has no row in the model.
        MachineError: the disk is full or not writable.
    """
    tokens = read_tokens(path) or _made(path, side, text, encoder, vocabulary_size, cleaner, replacer, repeats, world)
    if side == "validation":
        text.split.digests = path.with_suffix(".digests")
    return tokens


def _made(
    path: Path,
    side: str,
    text: OneText,
    encoder: TextEncoder,
    vocabulary_size: int,
    cleaner: Cleaner | None,
    replacer: WordReplacer | None,
    repeats: ValidationRepeats | None,
    world: World | None,
) -> TokenFile:
    validates = side == "validation"
    encoder = encoder.for_validation() if validates else encoder
    if validates or (world is not None and world.rank):
        repeats = None
    found = Found()
    if world is None:
        items, total = _items(text, cleaner, validates=validates)
        if repeats is not None:
            items = repeats.watched(items, found)
        if replacer is not None and not validates:
            items = replacer.with_copies(items)
            total = None if total is None else total * (1 + replacer.spec.copies)
        tokens = write_tokens(
            path,
            items,
            encoder,
            vocabulary_size,
            with_bytes=validates,
            total_bytes=total,
            num_repeated=lambda: 0 if validates else text.split.num_repeated,
        )
    else:
        source = text.data.validation if validates and text.data.validation is not None else text.data.train
        keep = _Kept(text, cleaner, validates=validates)

        def documents() -> Iterable[Item]:
            read = text.split.read(source)
            if repeats is None:
                return read
            return repeats.watched(read, found, lambda item: bool(text.split.to_train([item])[0]))

        tokens = SharedText(
            path,
            documents,
            keep,
            encoder,
            vocabulary_size,
            with_bytes=validates,
            total_bytes=source.num_bytes(),
            prepare=keep.prepare,
            world=world,
        ).write()
    if (line := found.line(text.key(side))) is not None:
        print(line, file=sys.stderr, flush=True)
    return tokens


def _items(text: OneText, cleaner: Cleaner | None, *, validates: bool) -> tuple[Iterable[Item], int | None]:
    data, split = text.data, text.split
    if validates:
        return split.validation(), data.validation.num_bytes() if data.validation else None
    return split.training() if cleaner is None else cleaner.training(text), data.train.num_bytes()


class _Kept:
    """The items of one side among those of a source.

    Args:
        text: the source with its split.
        cleaner: leaves rows of the training side out; what it leaves out depends on the row alone. None: all stay.
        validates: whether it is the side that is validated on.
    """

    def __init__(self, text: OneText, cleaner: Cleaner | None, *, validates: bool):
        self.text, self.cleaner, self.validates = text, cleaner, validates

    def prepare(self) -> None:
        """Read what the choice depends on, before other processes are forked."""
        self.text.split.prepare(to_train=not self.validates)
        if self.cleaner is not None and not self.validates:
            self.cleaner.prepare()

    def __call__(self, items: Sequence[Item]) -> tuple[list[Item], int]:
        """The items that are used, and how many are left out as validation has their text."""
        split = self.text.split
        if self.validates:
            return ([*items], 0) if self.text.data.validation is not None else split.to_validate(items)
        kept, num_repeated = split.to_train(items)
        return [item if self.cleaner is None else self.cleaner.kept(item) for item in kept], num_repeated
