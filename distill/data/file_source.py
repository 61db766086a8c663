"""Sources that read files: what they say is identified by the bytes, wherever the files lie."""

from __future__ import annotations

from distill.data import files
from distill.data.base import SourceSpec
from distill.data.files import File


class FileSource(SourceSpec):
    """A source of text in files."""

    def fingerprint(self) -> str:
        """A hash of the bytes of the files, in order."""
        return files.fingerprint(self._files())

    def num_bytes(self) -> int | None:
        """The size of the files; None where one of them is compressed, so that only reading would tell."""
        return files.num_bytes(self._files())

    def _files(self) -> list[File]:
        """The files, in the order in which they are read.

        Raises:
            InputError: there are none.
        """
        raise NotImplementedError
