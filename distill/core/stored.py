"""JSON that distill has written and reads again: checked against a schema, and where a check is written, against that.

A schema is a type that pydantic understands: a dataclass, a model, or a ``TypeAdapter`` of anything else.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from distill.core.artifact import hash_of, write_text
from distill.core.errors import InputError
from distill.core.outside import read

T = TypeVar("T")
CHECK = "check"
"""Key of the hash that stands in an object beside what it is of."""


def read_stored(file: Path, schema: type[T] | TypeAdapter[T], fix: str) -> T:
    """What a JSON file holds.

    Args:
        file: what to read.
        schema: what it must hold.
        fix: how to come by a whole one, for the message.

    Raises:
        InputError: it is no regular file, no JSON, or something else than the schema says.
    """
    return parse_stored(_text(file, fix), schema, str(file), fix)


def parse_stored(text: str, schema: type[T] | TypeAdapter[T], name: str, fix: str) -> T:
    """:func:`read_stored` of text whose file messages call ``name``."""
    adapter: TypeAdapter[T] = schema if isinstance(schema, TypeAdapter) else _adapter(schema)  # type: ignore[arg-type]
    try:
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        raise InputError(f"{name}: {_first(error)}; {fix}") from None


def write_checked(file: Path, content: dict[str, Any], about: str = "") -> None:
    """Write an object with a hash of itself, whole or not at all.

    Args:
        file: where to.
        content: what JSON can hold.
        about: goes into the hash: whoever reads the file must expect the same.
    """
    plain = json.loads(json.dumps(content))  # as it will be read: keys are text, tuples are lists
    write_text(file, json.dumps({**plain, CHECK: hash_of(about, plain)}, indent=2) + "\n")


def read_checked(file: Path, schema: type[T] | TypeAdapter[T], fix: str, about: str = "") -> T:
    """What :func:`write_checked` wrote.

    Raises:
        InputError: it is damaged, edited, about something else, or not what the schema says.
    """
    content = read_stored(file, _OBJECT, fix)
    check = content.pop(CHECK, None)
    if check is None:
        raise InputError(f"{file}: holds no checksum, so another version of distill wrote it; {fix}")
    if check != hash_of(about, content):
        raise InputError(f"{file}: damaged or edited since distill wrote it (its own checksum is wrong); {fix}")
    return parse_stored(json.dumps(content), schema, str(file), fix)


_OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


@cache  # building one takes longer than reading a file with it
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _text(file: Path, fix: str) -> str:
    try:
        return read(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: no text ({error}); {fix}") from None


def _first(error: ValidationError) -> str:
    """The first mistake: where it is, what it is, and what stands there."""
    found = error.errors(include_url=False)[0]
    place = ".".join(map(str, found["loc"]))
    unknown = found["type"] in ("extra_forbidden", "unexpected_keyword_argument")
    said = "unknown key" if unknown else found["msg"].removeprefix("Value error, ")
    got = "" if found["type"] in ("missing", "json_invalid", "value_error") else f" (got {_short(found['input'])})"
    return f"{place}: {said}{got}" if place else said


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
