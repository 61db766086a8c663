"""What a cache belongs to: a teacher, a tokenizer, a text, how the teacher read it, and a codec. Nothing else.

No order, batch size, number of ranks or student is among it, nor how the student's rows are cut, so that all of them
can share a cache.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from distill.core.artifact import hash_of
from distill.core.errors import InputError
from distill.data.teacher_cache.base import CodecSpec

if TYPE_CHECKING:
    from distill.data.blocks import Blocks
    from distill.data.packing import TokenFile

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
    def of(cls, teacher: str, tokenizer: str, read: Blocks, codec: CodecSpec) -> Identity:
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
    if not isinstance(header, dict) or "identity" not in header or not (_is_other(header) or _is_whole(header)):
        raise InputError(f"{file}: not the header of a teacher cache, or damaged; name another folder, or remove it")
    return header


def _is_other(header: dict[str, Any]) -> bool:
    """Whether another version of distill has written it, in whichever form."""
    return header.get("version") != VERSION


def _is_whole(header: dict[str, Any]) -> bool:
    """Whether all is there that a header says, and of its type."""
    from distill.data.teacher_cache import CODECS
    from distill.data.teacher_cache.fidelity import Fidelity

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
    """Stands for the ids of a token file; where it lies does not matter."""
    digest = hashlib.sha256()
    with Path(tokens.path).open("rb") as stream:
        while piece := stream.read(16 << 20):
            digest.update(piece)
    return hash_of(digest.hexdigest(), tokens.dtype, tokens.end)
