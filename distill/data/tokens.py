"""Text that is already tokenized: one document per row of a table, or a flat file of ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from distill.data import files
from distill.data.base import Rejected, Tokenized
from distill.data.file_source import FileSource
from distill.data.files import File


class Tokens(FileSource):
    """Token ids that were made before, by the tokenizer of `data.tokenizer`. They are used unchanged.

    Flat files are those of nanoGPT: the concatenated ids of all documents, without a header.
    """

    kind: Literal["tokens"] = "tokens"
    path: str | list[str]
    """Files, folders or globs. `.parquet`, `.jsonl`: a document per row; `.npy`: one per row, or flat; `.bin`: flat."""
    column: str = "input_ids"
    """The column of the ids. Parquet and JSON Lines only."""
    dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"
    """How an id is stored, little-endian. `.bin` only."""
    document_end: int | None = Field(None, ge=0)
    """The id with which a document ends, such as the tokenizer's eos_token_id. Needed for flat files."""
    add_end: bool = False
    """Put the tokenizer's end-of-text token behind each document that does not end with it."""

    def documents(self) -> Iterator[Tokenized | Rejected]:
        """Yield one document per row, or per end of a document, in the order of the files."""
        from distill.data import token_documents

        return token_documents.read(self._files(), self.column, self.dtype, self.document_end, add_end=self.add_end)

    def num_bytes(self) -> int | None:
        """None: ids are not text."""
        self._files()
        return None

    def holds_ids(self) -> bool:
        """True: its documents are ids."""
        return True

    def drops_rows(self) -> bool:
        """True: unusable rows are yielded as :class:`~distill.data.base.Rejected`."""
        return True

    def _files(self) -> list[File]:
        return files.find(self.path, [".bin", ".npy", ".parquet", ".jsonl"])
