"""From YAML text to plain data whose every value knows its line, with ``--set`` and readable mistakes.

PyYAML alone reads ``1e-4`` as text, ``on`` as true and lets the second of two equal keys win; a recipe is read with the
scalars of YAML 1.2 and duplicate keys are mistakes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distill.core.errors import InputError, RecipeError

KeyPath = tuple[str | int, ...]

SET = "--set"
"""The place of a value that the command line gave."""
MOST_VALUES = 10_000
"""Values that a recipe may hold, with every alias written out."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars: true/false only, and floats such as 1e-4."""


_Loader.yaml_implicit_resolvers = {}  # those of YAML 1.1 would stay otherwise
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.nan|\.NaN",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(f"^(?:{_pattern})$"),
        list(_first.replace("\0", "")) + ([""] if "\0" in _first else []),
    )


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 16) if text.lower().startswith("0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


@dataclass
class Source:
    """A recipe as plain data, with the place that each value came from.

    Attributes:
        data: dicts, lists and scalars.
        name: the file's name as the user gave it.
        places: value path -> ``"file:line"`` or ``"--set"``.
    """

    data: dict[str, Any]
    name: str
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: Iterable[str | int]) -> str:
        """Where the value at ``path``, or its nearest parent, was written."""
        path = tuple(path)
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.name)

    def at(self, path: Iterable[str | int]) -> str:
        """How a message begins: the place and the key, ``"file:line: a.b"`` or ``"--set a.b"``."""
        path = tuple(path)
        place = self.place(path)
        return f"{place}{' ' if place == SET else ': '}{dotted(path) or 'recipe'}"


def read(file: str | Path, overrides: Iterable[str] = ()) -> Source:
    """Read a YAML file and apply ``key.sub=value`` overrides.

    Raises:
        RecipeError: not YAML, a duplicate key, or an override that names nothing; every mistake found.
        InputError: the file cannot be read.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{file}: no such recipe; 'distill list recipes' names those that come with distill") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as text ({error})") from None
    return parse(text, str(file), overrides)


def parse(text: str, name: str, overrides: Iterable[str] = ()) -> Source:
    """As :func:`read`, for text that is in memory already."""
    source = Source({}, name)
    mistakes: list[str] = []
    try:
        node = yaml.compose(text, Loader=_Loader)
        data = _plain(node, (), source, mistakes) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError([f"{name}:{line}: not valid YAML: {error.problem or error}"]) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError([f"{name}:1: not valid YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(data, dict):
        raise RecipeError([f"{name}:1: a recipe is a mapping of keys to values (got {type(data).__name__})"])
    source.data = data
    for override in overrides:
        _apply(source, override, mistakes)
    if mistakes:
        raise RecipeError(mistakes)
    return source


def _plain(node: yaml.Node, path: KeyPath, source: Source, mistakes: list[str], depth: int = 0) -> Any:
    """Node -> plain data, noting lines and duplicate keys. Aliases are expanded, but not for ever."""
    if depth > 50:
        raise ValueError("nested more than 50 deep")
    if len(source.places) > MOST_VALUES:  # a few lines of aliases of aliases stand for billions
        raise ValueError(f"more than {MOST_VALUES:,} values")
    place = f"{source.name}:{node.start_mark.line + 1}"
    source.places[path] = place
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=key_node.start_mark)
            key = str(key_node.value)
            if key in result:
                mistakes.append(f"{source.name}:{key_node.start_mark.line + 1}: {dotted((*path, key))}: written twice")
                continue
            result[key] = _plain(value_node, (*path, key), source, mistakes, depth + 1)
            source.places[(*path, key)] = f"{source.name}:{key_node.start_mark.line + 1}"
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, i), source, mistakes, depth + 1) for i, item in enumerate(node.value)]
    return _scalar(node, place)


def _scalar(node: yaml.Node, place: str) -> Any:
    if node.tag not in {f"tag:yaml.org,2002:{tag}" for tag in ("str", "int", "float", "bool", "null")}:
        raise yaml.MarkedYAMLError(problem=f"a recipe holds no {node.tag} values", problem_mark=node.start_mark)
    loader = _Loader("")
    try:
        value = loader.construct_object(node)
    finally:
        loader.dispose()
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _apply(source: Source, override: str, mistakes: list[str]) -> None:
    """Set one ``a.b.c=value``; list items are addressed by index or by their ``kind``."""
    key, equals, text = override.partition("=")
    place = f"{SET} {key}"
    if not equals or not key.strip():
        mistakes.append(f"{SET} {override}: write it as key.sub=value")
        return
    try:
        node = yaml.compose(text, Loader=_Loader)
        inner = Source({}, place)
        value = _plain(node, (), inner, mistakes) if node is not None else None
    except (yaml.YAMLError, ValueError) as error:
        why = getattr(error, "problem", None) or " ".join(str(error).split())
        mistakes.append(f"{place}: the value {text!r} is not valid YAML ({why})")
        return
    *parents, last = key.strip().split(".")
    target: Any = source.data
    path: KeyPath = ()
    for part in parents:
        step = _step(target, part)
        if step is None and isinstance(target, dict) and path != ("stages",):
            target[part], step = {}, part
            source.places[(*path, part)] = SET
        if step is None:
            mistakes.append(f"{place}: {_nothing_to_set(path, part, target)}")
            return
        if isinstance(target, dict) and target[step] is None:
            target[step] = {}
        if isinstance(target[step], str) and last != "kind":
            target[step] = {"kind": target[step]}
        target, path = target[step], (*path, step)
    step = _step(target, last)
    if step is None:
        if not isinstance(target, dict) or path == ("stages",):
            mistakes.append(f"{place}: {_nothing_to_set(path, last, target)}")
            return
        step = last
    target[step] = value
    here = (*path, step)
    for old in [p for p in source.places if p[: len(here)] == here]:
        del source.places[old]
    source.places[here] = SET


def _nothing_to_set(path: KeyPath, part: str, target: Any) -> str:
    near = suggest(part, _keys(target))
    mend = "; --set cannot add a stage, so write it into the recipe" if path == ("stages",) and not near else near
    return f"there is no {dotted((*path, part))} to set{mend}"


def _step(target: Any, part: str) -> str | int | None:
    if isinstance(target, dict):
        return part if part in target else None
    if isinstance(target, list):
        if part.isdigit() and int(part) < len(target):
            return int(part)
        hits = [
            i for i, item in enumerate(target) if item == part or (isinstance(item, dict) and item.get("kind") == part)
        ]
        return hits[0] if len(hits) == 1 else None
    return None


def _keys(target: Any) -> list[str]:
    if isinstance(target, dict):
        return list(target)
    return (
        [str(item.get("kind", i)) if isinstance(item, dict) else str(i) for i, item in enumerate(target)]
        if isinstance(target, list)
        else []
    )


def dotted(path: Iterable[str | int]) -> str:
    """``('losses', 0, 'kind')`` -> ``'losses.0.kind'``."""
    return ".".join(str(part) for part in path)


def suggest(word: object, choices: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest choice, else an empty string."""
    near = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
