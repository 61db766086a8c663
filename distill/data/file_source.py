"""Sources that read files. Their content is identified by the bytes, regardless of the paths."""

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
        """Size of the files; None if one of them is compressed, because its size is known only after reading."""
        return files.num_bytes(self._files())

    def _files(self) -> list[File]:
        """The files, in the order in which they are read.

        Raises:
            InputError: there are none.
        """
        raise NotImplementedError
