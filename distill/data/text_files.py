"""Text files, such as Markdown or source code: one document per file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from distill.core.errors import InputError
from distill.data import files
from distill.data.base import Document
from distill.data.file_source import FileSource
from distill.data.files import File


class TextFiles(FileSource):
    """Text files, folders of them or globs; a file is a document; `.gz` and `.zst` are decompressed."""

    kind: Literal["text_files"] = "text_files"
    path: str | list[str]
    """A file, a folder or a glob such as `notes/**/*.md`, or a list of these; `s3://`, `gs://` and `https://`
    too."""
    suffixes: list[str] = Field([".txt", ".md", ".rst", ".py"], min_length=1)
    """Suffixes of the files to read in a folder; no effect on files that `path` names directly or by a glob."""

    def documents(self) -> Iterator[Document]:
        """Yield one document per file, in the order of the names; files without text are skipped."""
        for file in self._files():
            with files.opened(file) as stream:
                data = files.whole(stream, file)
            text = _decoded(data, file)
            if text.strip():
                yield Document(file.as_posix(), text)

    def _files(self) -> list[File]:
        return files.find(self.path, self.suffixes)


def _decoded(data: bytes, file: File) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}); convert it"
        ) from None
