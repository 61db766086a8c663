"""Concatenates the token files of several sources, or of the shards of one; the result can be read like the token file
of one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np

from distill.core.stop import stoppable
from distill.data.packing import Part, TokenFile, read_tokens, writing
from distill.data.tally import Tally

STRETCH = 1 << 24
"""Number of tokens that are copied at once."""
SUMS = ("num_tokens", "num_documents", "num_bytes", "num_repeated")


def join_tokens(path: Path, parts: Sequence[Part]) -> TokenFile:
    """Concatenate the tokens of all parts in one file, unless it is already there; it is written completely or not at
    all.

    Args:
        path: the ``.bin`` file.
        parts: at least one; either all files have token byte counts or none, and either all have a mask of learned
            tokens or none.

    Raises:
        MachineError: the disk is full or not writable.
    """
    # the tally of each source is in its own file
    joined = read_tokens(path) or end_to_end(path, [part.tokens for part in parts], Tally())
    return replace(joined, parts=tuple(parts))


def end_to_end(path: Path, files: Sequence[TokenFile], tally: Tally) -> TokenFile:
    """Write the tokens of several files into one, completely or not at all.

    Args:
        path: the ``.bin`` file.
        files: at least one; either all files have token byte counts or none, and either all have a mask of learned
            tokens or none.
        tally: counts of the rows of all files.

    Raises:
        MachineError: the disk is full or not writable.
    """
    dtype = "uint32" if any(file.dtype == "uint32" for file in files) else "uint16"
    filled = [file for file in files if file.num_tokens]  # an empty file cannot be mapped
    columns = {".bin": ([file.ids() for file in filled], dtype), ".bounds": (_bounds(files), "int64")}
    if files[0].num_learned is not None:
        columns[".learned"] = ([learned for file in filled if (learned := file.learned()) is not None], "bool")
    if Path(files[0].path).with_suffix(".bytes").is_file():
        columns[".bytes"] = ([file.bytes_of_tokens() for file in filled], "uint32")
    digests = [Path(file.path).with_suffix(".digests") for file in files]
    if all(file.is_file() for file in digests):
        columns[".digests"] = ([np.fromfile(file, np.uint8) for file in digests], "uint8")
    with writing(path, list(columns)) as (streams, header):
        for suffix, (arrays, kind) in columns.items():
            for array in arrays:
                for start in stoppable(range(0, len(array), STRETCH)):
                    streams[suffix].write(np.asarray(array[start : start + STRETCH]).astype(kind).tobytes())
        # all fields but these are the same for all files
        header |= {
            one.name: getattr(files[0], one.name) for one in fields(TokenFile) if one.name not in ("path", "parts")
        }
        header |= {"dtype": dtype, "largest": max(file.largest for file in files), "start": _start(files)}
        header |= {name: sum(getattr(file, name) for file in files) for name in SUMS}
        if files[0].num_learned is not None:
            header["num_learned"] = sum(file.num_learned or 0 for file in files)
        header["tally"] = asdict(tally)
    joined = read_tokens(path, just_written=True)
    assert joined is not None
    return joined


def _start(files: Sequence[TokenFile]) -> tuple[int, ...]:
    """The start tokens of the rows, which are the same in all files that have some."""
    found = {file.start for file in files if file.start} or {()}
    assert len(found) == 1, "one tokenizer wrote all of them"
    return found.pop()


def _bounds(files: Sequence[TokenFile]) -> list[np.ndarray]:
    """First token of each document, and the end of the last one."""
    first, found = 0, [np.zeros(1, np.int64)]
    for file in files:
        found.append(np.asarray(file.bounds()[1:]) + first)
        first += file.num_tokens
    return found
