"""Paraphrases of the recipe's text, so that the student reads a fact in several forms.

Rewritten text teaches more than repeated text, and less than questions and answers do (Active Reading, arXiv
2508.09494: SimpleWikiQA 15.9 repeated, 25.7 paraphrased, 47.9 as questions).

Source: Maini et al. 2024, arXiv 2401.16380.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distill.data.base import Document, Item
from distill.data.documents import Text, chunks_of
from distill.stages.synthesize.candidate import Candidate
from distill.stages.synthesize.makers.base import Holds, MakerResult, MakerSpec
from distill.stages.synthesize.requests import asked

if TYPE_CHECKING:
    from distill.stages.synthesize.asker import Asker

STYLES = (
    "Rewrite the text in other words. Keep every fact, name and number.",
    "Rewrite the text in short, simple sentences. Keep every fact, name and number.",
    "Retell the text as an encyclopedia would write it. Keep every fact, name and number.",
    "Write down everything that the text states, as a list of full sentences with names and numbers.",
)


class Rewrite(MakerSpec):
    """Paraphrases of the recipe's text, chunk by chunk."""

    holds: ClassVar[Holds] = "text"

    kind: Literal["rewrite"] = "rewrite"
    num_versions: int = Field(2, ge=1, le=64)
    """Number of versions of each chunk: in other words, in simple sentences, as an encyclopedia and as a list, in
    turn."""
    chunk_words: int = Field(200, ge=20)
    """Largest number of words per chunk."""
    temperature: float = Field(0.7, ge=0)
    """Sampling temperature; 0 is greedy."""
    num_documents: int | None = Field(None, ge=1)
    """Number of documents to rewrite, from the start of the text; unset: all."""

    def make(self, asker: Asker, texts: Iterable[Item], seed: int) -> MakerResult:
        """See :meth:`MakerSpec.make`."""
        documents = [Text(item.id, item.text) for item in texts if isinstance(item, Document)][: self.num_documents]
        chunks = [chunk for document in documents for chunk in chunks_of(document, self.chunk_words)]
        planned = [(chunk, number) for chunk in chunks for number in range(self.num_versions)]
        requests = [
            asked(
                f"{STYLES[number % len(STYLES)]}\n\n{chunk.text}",
                self.max_new_tokens,
                self.temperature,
                number // len(STYLES),
            )
            for chunk, number in planned
        ]
        replies = asker.ask("versions", requests)
        rows = [
            Candidate((), reply.text, chunk.text, chunk.id, finish=reply.finish, more={"style": number % len(STYLES)})
            for (chunk, number), reply in zip(planned, replies, strict=True)
        ]
        return MakerResult(rows, raw=[reply.text for reply in replies[:5]])
