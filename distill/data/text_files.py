"""Text files of one's own: one document a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from distill.core.errors import InputError
from distill.data import files
from distill.data.base import Document, SourceSpec


class TextFiles(SourceSpec):
    """Text files, folders of them or globs; a file is a document; ``.gz`` is unpacked."""

    kind: Literal["text_files"] = "text_files"
    path: str | list[str]
    """A file, a folder or a glob such as `notes/**/*.md`, or a list of these; relative to the current directory."""
    suffixes: list[str] = Field([".txt", ".md", ".rst", ".py"], min_length=1)
    """Which files of a folder count; no effect on files and globs, which name theirs."""

    def documents(self) -> Iterator[Document]:
        """One document a file, in the order of the names; files without text are passed over."""
        for file in self._files():
            with files.opened(file) as stream:
                data = stream.read()
            text = _decoded(data, file)
            if text.strip():
                yield Document(file.as_posix(), text)

    def fingerprint(self) -> str:
        """A hash of the names and bytes of the files."""
        return files.fingerprint(self._files())

    def num_bytes(self) -> int | None:
        """The size of the files."""
        return files.num_bytes(self._files())

    def _files(self) -> list[Path]:
        return files.find(self.path, self.suffixes)


def _decoded(data: bytes, file: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}); convert it"
        ) from None
