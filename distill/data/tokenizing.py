"""Decides which processes tokenize one side of a text, and which items of its source are on that side.

Most texts are tokenized by all processes of a run, a part each. Where the order of documents matters
(:attr:`~distill.data.spec.DataSpec.needs_order`) one process tokenizes it, while the others wait.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.core.world import World
from distill.data.base import Item
from distill.data.clean import Cleaner
from distill.data.encoder import TextEncoder
from distill.data.mixture_split import OneText
from distill.data.packing import TokenFile, digests_file, read_tokens, write_tokens
from distill.data.repeats import Found, ValidationRepeats
from distill.data.replace_words import WordReplacer
from distill.data.shared_tokens import SharedText
from distill.data.token_shards import TokenShards


@dataclass(frozen=True)
class Tokenizing:
    """Tokenizes the sides of a text.

    Attributes:
        encoder: converts text to ids.
        vocabulary_size: every id must be below it.
        cleaner: leaves rows of the training side out; None: all stay.
        replacer: adds copies to the training side; None: there are none.
        repeats: counts training documents that nearly repeat validation text, on the first process; None: not counted.
        world: the processes that tokenize a part each; None: only this one, which holds the lock on the folder.
    """

    encoder: TextEncoder
    vocabulary_size: int
    cleaner: Cleaner | None = None
    replacer: WordReplacer | None = None
    repeats: ValidationRepeats | None = None
    world: World | None = None

    def tokens_of(self, path: Path, side: str, text: OneText) -> TokenFile:
        """The token file of one side of a text, which is written if it does not exist.

        Args:
            path: the ``.bin`` file.
            side: ``"train"`` or ``"validation"``.
            text: a source with its split.

        Raises:
            InputError: the text cannot be read, or an id has no row in the model.
            MachineError: the disk is full or not writable.
        """
        validates = side == "validation"
        if (tokens := read_tokens(path)) is None:
            found = Found()
            if self.world is None:
                tokens = self._alone(path, text, found, validates=validates)
            else:
                tokens = self._shared(path, text, found, self.world, validates=validates)
            if (line := found.line(text.key(side))) is not None:
                print(line, file=sys.stderr, flush=True)
        elif self.world is not None:
            TokenShards(path).remove()  # left by a run that was killed after it had joined them
        if validates:
            text.split.digests = digests_file(path)
        return tokens

    def _alone(self, path: Path, text: OneText, found: Found, *, validates: bool) -> TokenFile:
        data, split = text.data, text.split
        if validates:
            total = data.validation.num_bytes() if data.validation else None
            encoder = self.encoder.for_validation()
            return write_tokens(
                path, split.validation(), encoder, self.vocabulary_size, with_bytes=True, total_bytes=total
            )
        items, total = split.training() if self.cleaner is None else self.cleaner.training(text), data.train.num_bytes()
        if self.repeats is not None:
            items = self.repeats.watched(items, found)
        if self.replacer is not None:
            items = self.replacer.with_copies(items)
            total = None if total is None else total * (1 + self.replacer.spec.copies)
        return write_tokens(
            path,
            items,
            self.encoder,
            self.vocabulary_size,
            total_bytes=total,
            num_repeated=lambda: split.num_repeated,
        )

    def _shared(self, path: Path, text: OneText, found: Found, world: World, *, validates: bool) -> TokenFile:
        source = text.data.validation if validates and text.data.validation is not None else text.data.train
        keep = _Kept(text, self.cleaner, validates=validates)

        def documents() -> Iterable[Item]:
            read = text.split.read(source)
            if self.repeats is None or validates or world.rank:
                return read
            return self.repeats.watched(read, found, lambda item: bool(text.split.to_train([item])[0]))

        return SharedText(
            path,
            documents,
            keep,
            self.encoder.for_validation() if validates else self.encoder,
            self.vocabulary_size,
            with_bytes=validates,
            total_bytes=source.num_bytes(),
            prepare=keep.prepare,
            world=world,
        ).write()


class _Kept:
    """Selects the items of one side among those of a source.

    Args:
        text: the source with its split.
        cleaner: leaves out rows of the training side, each independently of the others; None: all stay.
        validates: whether it is the validation side.
    """

    def __init__(self, text: OneText, cleaner: Cleaner | None, *, validates: bool):
        self.text, self.cleaner, self.validates = text, cleaner, validates

    def prepare(self) -> None:
        """Read what the choice depends on, before other processes are forked."""
        self.text.split.prepare(to_train=not self.validates)
        if self.cleaner is not None and not self.validates:
            self.cleaner.prepare()

    def __call__(self, items: Sequence[Item]) -> tuple[list[Item], int]:
        """Return (items that are used, number skipped because they are in the validation text)."""
        split = self.text.split
        if self.validates:
            return ([*items], 0) if self.text.data.validation is not None else split.to_validate(items)
        kept, num_repeated = split.to_train(items)
        return [item if self.cleaner is None else self.cleaner.kept(item) for item in kept], num_repeated
