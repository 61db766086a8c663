"""The contract of a maker: which files it reads, and which rows it has a writer write."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distill.core.spec import Spec
from distill.data.files import File
from distill.stages.synthesize.candidate import Candidate
from distill.stages.synthesize.exam_spec import Question

if TYPE_CHECKING:
    from distill.data.base import Item
    from distill.stages.synthesize.asker import Asker

Holds = Literal["conversations", "text"]


@dataclass(frozen=True)
class MakerResult:
    """What a maker has made.

    Attributes:
        rows: before any filter.
        exam: questions that no row may repeat.
        raw: some replies as they were written, to be shown when few rows remain.
    """

    rows: list[Candidate]
    exam: list[Question] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)


class MakerSpec(Spec):
    """What is made."""

    holds: ClassVar[Holds] = "conversations"
    """What its rows are."""
    asks_about_documents: ClassVar[bool] = False
    """Whether its rows may be questions with a document, which some filters need."""

    kind: str
    max_new_tokens: int = Field(256, ge=1)
    """Largest number of tokens of a reply."""

    def files(self) -> list[File]:
        """Files that it reads.

        Raises:
            InputError: one is not there.
        """
        return []

    def check(self) -> list[str]:
        """Read what can be read before the run; lines of what is planned, and of what looks wrong.

        Raises:
            InputError: a file is wrong.
        """
        return []

    def missing(self) -> str | None:
        """A package that it needs and that is not installed, with how to install it."""
        return None

    def why_no_server(self) -> str | None:
        """Why a server cannot be its writer; None if it can."""
        return None

    def why_no_exam(self) -> str | None:
        """Why it keeps no exam questions out; None if it does."""
        return f"make: {self.kind} keeps no questions for an exam; name a stage with make: qna and an exam"

    def has_documents(self) -> bool:
        """Whether its rows have the column document.

        Raises:
            InputError: a file is wrong.
        """
        return False

    def make(self, asker: Asker, texts: Iterable[Item], seed: int) -> MakerResult:
        """Have all rows written.

        Args:
            asker: asks the writer.
            texts: the training text of the recipe, for makers that begin with texts.
            seed: of the run.
        """
        raise NotImplementedError
