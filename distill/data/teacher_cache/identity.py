"""What a cache depends on: a teacher, a tokenizer, a text, how the teacher read it, and a codec.

It does not depend on order, batch size, number of ranks, the student, or how the student's rows are cut, so all of
these can share a cache.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from distill.core.artifact import hash_of
from distill.core.errors import InputError
from distill.core.stored import CHECK
from distill.data.packed_rows import PackedRows
from distill.data.packing import TokenFile
from distill.data.teacher_cache import CODECS
from distill.data.teacher_cache.base import CodecSpec
from distill.data.teacher_cache.fidelity import Fidelity

HEADER = "cache.json"
VERSION = 2
_CALLED = {
    "teacher": "another teacher",
    "tokenizer": "another tokenizer",
    "text": "another text",
    "window": "another window of the teacher",
    "packing": "another packing",
    "codec": "a codec",
}

STRETCH = 1 << 24
"""Number of tokens that are scanned at once."""


@dataclass(frozen=True)
class Identity:
    """Hashes of what a cache depends on.

    Attributes:
        teacher: hash of the model's content.
        tokenizer: hash of how text becomes ids.
        text: hash of the token ids.
        window: maximum number of tokens in a row of the teacher.
        packing: how its rows are cut, and what each token sees.
        codec: settings of the codec.
    """

    teacher: str
    tokenizer: str
    text: str
    window: int
    packing: str
    codec: dict[str, Any]

    @classmethod
    def of(cls, teacher: str, tokenizer: str, read: PackedRows, codec: CodecSpec) -> Identity:
        """Make it from the hashes of a teacher and a tokenizer, and from the rows that the teacher reads."""
        text = hash_of_tokens(read.tokens)
        return cls(teacher, tokenizer, text, read.sequence_length, read.packing, codec.model_dump(mode="json"))

    def key(self) -> str:
        """One short hash of all fields."""
        return hash_of(VERSION, asdict(self))

    def check(self, folder: Path, header: dict[str, Any]) -> None:
        """Check that the cache in a folder has this identity.

        Raises:
            InputError: a field differs; the message names it.
        """
        check_version(folder, header)
        for name, ours in asdict(self).items():
            theirs = header["identity"][name]
            if theirs != ours:
                raise InputError(
                    f"{folder}: this cache was written with {_CALLED[name]} ({theirs}), this run has {ours}; "
                    "name another folder, or remove it to write it anew"
                )


def read_header(folder: Path) -> dict[str, Any] | None:
    """The content of ``cache.json``; None if there is no cache.

    Raises:
        InputError: it is not such a file.
    """
    file = folder / HEADER
    if not file.is_file():
        return None
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        header = None
    if isinstance(header, dict) and header.pop(CHECK, hash_of("", header)) != hash_of("", header):
        header = None
    if not isinstance(header, dict) or "identity" not in header or not (_is_other(header) or _is_whole(header)):
        raise InputError(f"{file}: not the header of a teacher cache, or damaged; name another folder, or remove it")
    return header


def _is_other(header: dict[str, Any]) -> bool:
    """Whether a header was written by another version of distill, in any form."""
    return header.get("version") != VERSION


def _is_whole(header: dict[str, Any]) -> bool:
    """Whether a header has all fields, each of the right type."""
    try:
        identity = TypeAdapter(Identity).validate_python(header["identity"])
        TypeAdapter(Fidelity).validate_python(header["fidelity"])
        CODECS[identity.codec["kind"]].model_validate(identity.codec)
        return all(
            isinstance(header[key], int) and header[key] > 0 for key in ("width", "vocabulary", "rows_per_shard")
        )
    except (ValidationError, KeyError, TypeError):
        return False


def check_version(folder: Path, header: dict[str, Any]) -> None:
    """Check that a cache was not written by another version of distill.

    Raises:
        InputError: the version differs.
    """
    if _is_other(header):
        raise InputError(
            f"{folder}: a teacher cache of version {header.get('version')}, expected {VERSION}; "
            "remove it to write it anew"
        )


def hash_of_tokens(tokens: TokenFile) -> str:
    """Hash of the ids of a token file and of its start tokens; its path does not matter."""
    digests, beside = [_digest(Path(tokens.path))], Path(tokens.path).with_suffix
    if tokens.num_learned is not None:
        digests += [_digest(beside(suffix)) for suffix in (".bounds", ".learned")]
    elif not _ids_tell_bounds(tokens):
        digests.append(_digest(beside(".bounds")))
    digests += [str(part.tokens.num_tokens) for part in tokens.parts]  # sizes of parts decide how rows are cut
    # start tokens change what the teacher has read; without start tokens the hash is unchanged, so older caches stay
    # valid
    return hash_of(*digests, tokens.dtype, tokens.filling, *tokens.start)


def _ids_tell_bounds(tokens: TokenFile) -> bool:
    """Whether the filling token occurs exactly at the end of each document, as in plain text."""
    ids, stretches = tokens.ids(), range(0, tokens.num_tokens, STRETCH)
    if not (ids[tokens.bounds()[1:] - 1] == tokens.filling).all():
        return False
    found = sum(int(np.count_nonzero(ids[start : start + STRETCH] == tokens.filling)) for start in stretches)
    return found == tokens.num_documents


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
