"""What a cache belongs to: a teacher, a tokenizer, a text, how the teacher read it, and a codec. Nothing else.

No order, batch size, number of ranks or student is among it, nor how the student's rows are cut, so that all of them
can share a cache.
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
"""Tokens that are looked at together."""


@dataclass(frozen=True)
class Identity:
    """Hashes of what a cache depends on.

    Attributes:
        teacher: of the model's content.
        tokenizer: of how text becomes ids.
        text: of the token ids.
        window: tokens in a row of the teacher, at most.
        packing: how its rows are cut and what a token of them sees.
        codec: its settings.
    """

    teacher: str
    tokenizer: str
    text: str
    window: int
    packing: str
    codec: dict[str, Any]

    @classmethod
    def of(cls, teacher: str, tokenizer: str, read: PackedRows, codec: CodecSpec) -> Identity:
        """Of a teacher and a tokenizer given as hashes, and the rows that the teacher reads."""
        text = hash_of_tokens(read.tokens)
        return cls(teacher, tokenizer, text, read.sequence_length, read.packing, codec.model_dump(mode="json"))

    def key(self) -> str:
        """One short hash of all of it."""
        return hash_of(VERSION, asdict(self))

    def check(self, folder: Path, header: dict[str, Any]) -> None:
        """Refuse a cache that belongs to something else.

        Raises:
            InputError: with the name of what is not the same.
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
    """What ``cache.json`` says, or None when there is no cache.

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
    """Whether another version of distill has written it, in whichever form."""
    return header.get("version") != VERSION


def _is_whole(header: dict[str, Any]) -> bool:
    """Whether all is there that a header says, and of its type."""
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
    """Refuse what another version of distill has written.

    Raises:
        InputError: it is such a cache.
    """
    if _is_other(header):
        raise InputError(
            f"{folder}: a teacher cache of version {header.get('version')}, expected {VERSION}; "
            "remove it to write it anew"
        )


def hash_of_tokens(tokens: TokenFile) -> str:
    """Stands for the ids of a token file and of what its rows begin with; where it lies does not matter."""
    digests, beside = [_digest(Path(tokens.path))], Path(tokens.path).with_suffix
    if tokens.num_learned is not None:
        digests += [_digest(beside(suffix)) for suffix in (".bounds", ".learned")]
    elif not _ids_tell_bounds(tokens):
        digests.append(_digest(beside(".bounds")))
    digests += [str(part.tokens.num_tokens) for part in tokens.parts]  # which decide how rows are cut
    # the first tokens of rows decide what the teacher has seen; where there are none, caches of earlier versions stay
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
