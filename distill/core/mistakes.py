"""Mistakes of a recipe in the project's own words: one line each, with its place, and by whose hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from distill.core.source import SET, KeyPath, Source, suggest
from distill.core.spec import DEVICE, NAME

MAPPING = ("model_type", "dict_type")
"""Types of pydantic's errors where keys and values were expected."""
NO_SUCH = "no_such_"
"""Begins the type of the error when a family has no such member."""
IN_WORDS = {
    NAME: "a name holds letters, digits, . _ and - only, and begins with a letter or a digit",
    DEVICE: "expected auto, cpu, cuda or one GPU, such as cuda:1",
}
"""What the patterns ask for."""


def mistakes_of(
    error: ValidationError, source: Source, fields_at: Callable[[KeyPath], list[str]], kinds: dict[str, list[str]]
) -> list[str]:
    """Pydantic's errors as the project's lines ``file:line: key: what (got ..., expected ...)``.

    Args:
        error: what validation raised.
        source: the recipe, for places and for what was written.
        fields_at: keys that are legal at a path, for "did you mean".
        kinds: family noun -> its kinds.
    """
    said: dict[KeyPath, list[str]] = {}  # a value that fits no form of a union has a mistake for each form
    got: dict[KeyPath, str] = {}
    for item in error.errors():
        path = _written(item["loc"], source.data, missing=item["type"] == "missing")
        said.setdefault(path, []).append(_what(item, path, fields_at, kinds))
        got[path] = _got(item)
    return [
        f"{source.at(path)}: {_either(whats)}{got[path]}"
        for path, whats in said.items()
        if not any(len(deeper) > len(path) and deeper[: len(path)] == path for deeper in said)  # of the form meant
    ]


def _what(item: Any, path: KeyPath, fields_at: Callable[[KeyPath], list[str]], kinds: dict[str, list[str]]) -> str:
    """What is wrong with one value."""
    kind = item["type"]
    if kind == "extra_forbidden":
        legal = fields_at(path[:-1])
        return "unknown key" + (suggest(path[-1], legal) or f" (expected one of {', '.join(legal)})")
    if kind == "missing":
        return "is missing"
    if kind in MAPPING:
        return "needs a mapping of keys to values"
    if kind.startswith(NO_SUCH):
        noun = kind.removeprefix(NO_SUCH)
        wrong = item["input"].get("kind") if isinstance(item["input"], dict) else item["input"]
        if wrong is None:
            return f"needs a kind (one of {', '.join(kinds[noun])})"
        return f"no {noun} called {wrong!r} (one of {', '.join(kinds[noun])})" + suggest(wrong, kinds[noun])
    if kind == "string_pattern_mismatch":
        return IN_WORDS[item["ctx"]["pattern"]]
    what = str(item["msg"]).removeprefix("Value error, ")
    return what[0].lower() + what[1:]


def _got(item: Any) -> str:
    """What was written instead, where that is short and not said already."""
    kind, got = item["type"], item["input"]
    if kind in {"extra_forbidden", "missing", "value_error"} or kind.startswith(NO_SUCH):
        return ""
    if isinstance(got, dict | list):
        return " (got a list)" if kind in MAPPING else ""
    return f" (got {got!r})" + (suggest(got, re.findall(r"'([^']*)'", item["msg"])) if kind == "literal_error" else "")


def _either(whats: list[str]) -> str:
    """``input should be 'auto'`` and ``input should be a valid integer`` in one."""
    first, *others = whats
    return " or ".join([first, *(what.removeprefix("input should be ") for what in others)])


def _has(data: Any, part: str | int) -> bool:
    if isinstance(data, list):
        return isinstance(part, int) and part < len(data)
    return isinstance(data, dict) and part in data


def _written(loc: tuple[str | int, ...], data: Any, *, missing: bool) -> KeyPath:
    """Drop from a pydantic location the tags that stand for a union's choice, not for a key of the file."""
    path: list[str | int] = []
    for i, part in enumerate(loc):
        if _has(data, part):
            data = data[part]
        elif not (missing and i == len(loc) - 1):
            continue
        path.append(part)
    return tuple(path)


def blamed(mistakes: list[str], overrides: list[str], mistakes_with: Callable[[list[str]], list[str]]) -> list[str]:
    """The mistakes; one that stands at a line of the file, but only by an override, says by which.

    Args:
        mistakes: with all overrides.
        overrides: ``key=value`` each.
        mistakes_with: the mistakes with some of them.
    """
    if all(line.startswith(SET) for line in mistakes):
        return mistakes
    of_file = mistakes_with([])
    without = {one: mistakes_with(overrides[:i] + overrides[i + 1 :]) for i, one in enumerate(overrides)}

    def by_whom(line: str) -> str:
        if line.startswith(SET) or line in of_file:
            return ""
        guilty = [one for one, others in without.items() if line not in others] or overrides
        return ", ".join(f"{SET} {one.partition('=')[0]}" for one in guilty) + ": "

    return [by_whom(line) + line for line in mistakes]
