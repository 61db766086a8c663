"""Settings that come as Python arguments, checked by the same specs as those of a recipe."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from distill.core.errors import InputError

T = TypeVar("T")


def checked(kind: type[T], value: Any, what: str) -> T:
    """A value as an instance of a spec, or of an annotated family.

    Args:
        kind: the spec, or ``Annotated[Base, FAMILY]``.
        value: an instance, a dict, or the kind of a member of the family as a string.
        what: name of the argument, for the message; "" if the keys of the value are arguments.

    Raises:
        InputError: it does not fit; one line for each mistake.
    """
    adapter: TypeAdapter[T] = TypeAdapter(kind)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            where = ".".join(str(part) for part in (what, *item["loc"]) if part != "")
            got = f" (got {item['input']!r})" if item["type"] != "value_error" else ""
            lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')}{got}".lstrip(": "))
        raise InputError("\n".join(lines)) from None
