"""From YAML text to plain data whose every value knows its line, with ``--set`` and readable mistakes.

PyYAML alone reads ``1e-4`` as text, ``on`` as true and lets the second of two equal keys win; a recipe is read with the
scalars of YAML 1.2 and duplicate keys are mistakes.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distill.core.errors import InputError, RecipeError
from distill.core.outside import opened

KeyPath = tuple[str | int, ...]

SET = "--set"
"""The place of a value that the command line gave."""
MOST_VALUES = 10_000
"""Values that a recipe may hold, with every alias written out."""
MOST_BYTES = 1 << 20
"""Of a recipe's file."""
MOST_CHOICES, LONGEST_WORD = 1_000, 100
"""Names that a word is compared with for "did you mean", and its letters that are looked at."""
LONGEST_INT = 100
"""Digits; specs refuse what does not fit 64 bits."""
DEEPEST = 50
"""How deep values may be nested."""
_TOO_DEEP = f"nested more than {DEEPEST} deep"
_TOO_MANY = f"more than {MOST_VALUES:,} values"


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars: true/false only, and floats such as 1e-4.

    It stops reading where a text is nested too deep or holds too much: PyYAML's time grows with the square of the
    depth, and its recursion ends in an error of Python.
    """

    def __init__(self, stream: str):
        super().__init__(stream)
        self._depth = self._num_nodes = 0

    def fetch_flow_collection_start(self, token: Any) -> None:
        """An opening bracket: the scanner looks far ahead of the nodes."""
        if self.flow_level >= DEEPEST:
            raise ValueError(_TOO_DEEP)
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """One value, or one key."""
        self._num_nodes += 1
        if self._depth > DEEPEST:
            raise ValueError(_TOO_DEEP)
        if self._num_nodes > 2 * MOST_VALUES:
            raise ValueError(_TOO_MANY)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


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
    if len(text) > LONGEST_INT:  # Python itself refuses to read and write very long ones
        raise yaml.MarkedYAMLError(problem=f"a whole number of {len(text)} digits", problem_mark=node.start_mark)
    return int(text, 16) if text.lower().startswith("0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


@dataclass
class Source:
    """A recipe as plain data, with the place that each value came from.

    Attributes:
        data: dicts, lists and scalars.
        name: the file's name as the user gave it.
        places: value path -> ``"file:line"`` or ``"--set"``.
        mistakes: of the text, such as a key that is written twice.
    """

    data: dict[str, Any]
    name: str
    places: dict[KeyPath, str] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)

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

    def overridden(self, overrides: Iterable[str]) -> Source:
        """Another one with ``key.sub=value`` overrides applied.

        Raises:
            RecipeError: with every mistake of the text and of the overrides.
        """
        changed = Source(copy.deepcopy(self.data), self.name, dict(self.places), list(self.mistakes))
        for override in overrides:
            _apply(changed, override, changed.mistakes)
        if changed.mistakes:
            raise RecipeError(changed.mistakes)
        return changed


def read(file: str | Path) -> Source:
    """Read a YAML file.

    Raises:
        RecipeError: not YAML.
        InputError: the file cannot be read, or is larger than any recipe.
    """
    if not os.path.lexists(file):
        raise InputError(f"{file}: no such recipe; 'distill list recipes' names those that come with distill")
    with opened(Path(file)) as stream:
        content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise InputError(f"{file}: larger than {MOST_BYTES:,} bytes, which no recipe is; name a recipe's file")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: cannot be read as text ({error})") from None
    return parse(text, str(file))


def parse(text: str, name: str, what: str = "a recipe") -> Source:
    """As :func:`read`, for text that is in memory already.

    Args:
        text: YAML.
        name: of the file, for messages.
        what: the file is, for messages.
    """
    source = Source({}, name)
    try:
        node = yaml.compose(text, Loader=_Loader)
        data = _plain(node, (), source, source.mistakes) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError([f"{name}:{line}: not valid YAML: {_in_words(str(error.problem or error))}"]) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError([f"{name}:1: not valid YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(data, dict):
        raise RecipeError([f"{name}:1: {what} is a mapping of keys to values (got {type(data).__name__})"])
    source.data = data
    return source


_YAML_WORDS = (
    ("expected <block end>", "this line is indented unlike those before it; keys of one mapping begin in one column"),
    ("mapping values are not allowed here", "a second 'key: value' in one line, or a wrong indentation; a text with a "
     "colon in it needs quotes"),
    ("cannot start any token", "a tab or a special character; indent with spaces, and quote texts that begin with one"),
    ("could not find expected ':'", "a key without its colon"),
    ("expected ',' or ']'", "a list [a, b] without its comma or closing ]"),
    ("expected ',' or '}'", "a mapping {a: 1, b: 2} without its comma or closing }"),
    ("found unexpected end of stream", "a quote or bracket that is not closed"),
)  # fmt: skip
"""What the YAML reader says -> what is to be done."""


def _in_words(problem: str) -> str:
    """The YAML reader's complaint, and what it means for somebody who writes a recipe."""
    return next((f"{ours} ({problem})" for theirs, ours in _YAML_WORDS if theirs in problem), problem)


def _plain(node: yaml.Node, path: KeyPath, source: Source, mistakes: list[str], depth: int = 0) -> Any:
    """Node -> plain data, noting lines and duplicate keys. Aliases are expanded, but not for ever."""
    if depth > DEEPEST:  # an alias may stand for what it is in
        raise ValueError(_TOO_DEEP)
    if len(source.places) > MOST_VALUES:  # a few lines of aliases of aliases stand for billions
        raise ValueError(_TOO_MANY)
    place = f"{source.name}:{node.start_mark.line + 1}"
    source.places[path] = place
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=key_node.start_mark)
            key = _readable(key_node)
            if key in result:
                mistakes.append(f"{source.name}:{key_node.start_mark.line + 1}: {dotted((*path, key))}: written twice")
                continue
            result[key] = _plain(value_node, (*path, key), source, mistakes, depth + 1)
            source.places[(*path, key)] = f"{source.name}:{key_node.start_mark.line + 1}"
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, i), source, mistakes, depth + 1) for i, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    return _scalar(node, place)


def _readable(node: yaml.ScalarNode) -> str:
    """The text of a key or a value. Escapes can write what no file's name and no UTF-8 text can hold."""
    try:  # JSON writes a character beyond 16 bits as two escapes
        node.value = node.value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        problem = "holds half of a surrogate pair, which is no text"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None
    if "\0" in node.value:
        raise yaml.MarkedYAMLError(problem="holds a NUL character, which is no text", problem_mark=node.start_mark)
    return str(node.value)


def _scalar(node: yaml.ScalarNode, place: str) -> Any:
    _readable(node)
    if node.tag not in {f"tag:yaml.org,2002:{tag}" for tag in ("str", "int", "float", "bool", "null")}:
        raise yaml.MarkedYAMLError(problem=f"values of type {node.tag} are not read", problem_mark=node.start_mark)
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
    if len(parents) >= DEEPEST:
        mistakes.append(f"{SET}: a key of {len(parents) + 1} parts, expected at most {DEEPEST}")
        return
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
    hint = "; --set cannot add a stage, so write it into the recipe" if path == ("stages",) and not near else near
    return f"there is no {dotted((*path, part))} to set{hint}"


def _step(target: Any, part: str) -> str | int | None:
    if isinstance(target, dict):
        return part if part in target else None
    if isinstance(target, list):
        if re.fullmatch("[0-9]{1,6}", part) and int(part) < len(target):  # isdigit() takes in what int() refuses
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
    some = itertools.islice(choices, MOST_CHOICES)  # each comparison costs as much as reading the word many times
    near = difflib.get_close_matches(str(word)[:LONGEST_WORD], list(some), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """A nested mapping as dotted key -> value; an empty one is a value."""
    if not isinstance(value, dict) or not value:
        return {key: value}
    return {k: v for name, part in value.items() for k, v in flat(part, f"{key}.{name}".lstrip(".")).items()}
