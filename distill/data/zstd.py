"""Reads files that are compressed with zstd, with pyarrow."""

from __future__ import annotations

import io
from typing import IO

import pyarrow

from distill.core.errors import InputError
from distill.data.remote import BUFFER, Reading


def decompressed(stream: IO[bytes], name: str) -> IO[bytes]:
    """The decompressed bytes of a stream, one frame after the other.

    Memory is bounded: zstd refuses frames that need more than 128 MiB to decompress.

    Args:
        stream: the compressed stream.
        name: name of the file, for the message of the ``InputError`` that reading raises if the data is broken.
    """

    def told(error: Exception) -> InputError:
        why = " ".join(str(error).split())[:200]
        if "too much memory" in why:
            return InputError(f"{name}: needs more than 128 MiB of memory to decompress; pack it again without --long")
        return InputError(f"{name}: not a whole zstd file ({why}); fetch or pack it again")

    return io.BufferedReader(Reading(pyarrow.CompressedInputStream(stream, "zstd"), told), BUFFER)
