"""Training and validation text of a mixture: each source is split separately, and validation text of one source is
removed from the training text of all.
"""

from __future__ import annotations

from dataclasses import dataclass

from distill.core.artifact import hash_of
from distill.data.base import Item, Rejected, digest, normalised
from distill.data.mixture import Mixture
from distill.data.spec import DataSpec
from distill.data.split import Side, Split


@dataclass(frozen=True)
class OneText:
    """One source with its validation text.

    Attributes:
        name: the source's name in its mixture; empty if it is the only one.
        data: the recipe's section with only this source.
        split: decides the side of each document.
        others: hash of the other sources, because their validation text is removed from this one.
    """

    name: str
    data: DataSpec
    split: Split
    others: str | None = None

    def key(self, side: str) -> str:
        """Key of one side of the text in the recipe, below ``data``; also the first part of the name of its token
        file."""
        if not self.name:
            return side
        return f"train.{'sources' if side == 'train' else 'validation'}.{self.name}"


class SplitBeside(Split):
    """The split of one source of a mixture: training leaves out the validation text of the other sources.

    Attributes:
        others: splits of the other sources.
    """

    others: tuple[Split, ...] = ()

    def side_of(self, document: Item) -> Side:
        """See :meth:`Split.side_of`."""
        side = super().side_of(document)
        if side is not Side.TRAIN or isinstance(document, Rejected):
            return side
        key = digest(normalised(document.text))
        return Side.REPEATED if any(key in other.validation_digests for other in self.others) else Side.TRAIN

    def prepare(self, *, to_train: bool = True) -> None:
        """See :meth:`Split.prepare`."""
        super().prepare(to_train=to_train)
        for other in self.others if to_train else ():
            other.validation_digests  # noqa: B018  # computed once, and kept


def texts_of(data: DataSpec) -> list[OneText]:
    """The sources of a recipe's text: those of a mixture, or the single source."""
    if not isinstance(data.train, Mixture):
        return [OneText("", data, Split(data))]
    mixture, found, others = data.train, [], hash_of(data.train.fingerprint())
    for name, source in mixture.sources.items():
        own = data.model_copy(update={"train": source, "validation": mixture.validation.get(name)})
        found.append(OneText(name, own, SplitBeside(own, f"data.train.sources.{name}"), others))
    for one in found:
        assert isinstance(one.split, SplitBeside)
        one.split.others = tuple(other.split for other in found if other is not one)
    return found
