"""Text from the columns of a row: one column, or a Jinja template over several.

    text: body
    text: "{{ title }}\\n\\n{{ body }}"
    text: "{{ title }}{% if tags %} ({{ tags | join(', ') }}){% endif %}\\n\\n{{ row['full text'] }}"

A template comes with a recipe that somebody else may have written, so it runs in Jinja's immutable sandbox, and may use
only a part of the language: output, ``if``, ``for``, comparisons, ``~``, and the filters below. It cannot call or
multiply anything, and a text that becomes too large is an error of its row. A missing column, a null and a value that
is not text are errors of the row, never the words "None" or "['a', 'b']" in a text to learn from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from distill.data import files
from distill.data.message import Unusable

OF_CHATS = ("messages", "conversations", "prompt")
"""Columns that hold conversations, which another kind of source reads."""
ROW = "row"
"""Name of the whole row in a template, for columns whose names are not identifiers."""
FORBIDDEN = {
    nodes.Call: "a call",
    nodes.Mul: "*",
    nodes.Pow: "**",
    nodes.Mod: "%",
    nodes.Macro: "a macro",
    nodes.CallBlock: "a call",
    nodes.FilterBlock: "a filter block",
    nodes.Include: "include",
    nodes.Import: "import",
    nodes.FromImport: "import",
    nodes.Extends: "extends",
    nodes.Block: "a block",
}
"""Parts of the language that a template over columns does not have, in words."""
MOST_STEPS = 10_000_000
"""Limit on loop iterations per text (a few seconds)."""
COUNTED = "counted, which no recipe can write"
"""Name of the filter that counts the steps of loops."""
WRITTEN = (str, int, float)
"""Types that are written unchanged; others must be converted to text first."""


class _Environment(ImmutableSandboxedEnvironment):
    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True, finalize=_written)
        self.globals.clear()  # so that a missing column of the same name raises an error
        kept = ("trim", "upper", "lower", "title", "capitalize", "default", "length", "first", "last", "round", "int")
        self.filters = {name: self.filters[name] for name in kept} | {"d": self.filters["default"]}
        self.filters |= {"join": _join, "replace": _replace, "tojson": _as_json, COUNTED: self._counted}
        self.num_steps = 0

    def _counted(self, items: Any) -> Iterator[Any]:
        for item in items:
            self.num_steps += 1
            if self.num_steps > MOST_STEPS:
                raise Unusable("too large", f"the template takes more than {MOST_STEPS:,} steps of its loops")
            yield item


class TextOf:
    """Builds the text of a row.

    Args:
        text: the name of a column, or a template.

    Raises:
        ValueError: the template is not allowed; the message has the reason.
    """

    def __init__(self, text: str):
        self.text = text
        self._template: Any = None
        self.columns: frozenset[str] | None = frozenset({text})
        """Columns that are read; None: any of them."""
        self.needed = {text}
        """Columns without which no row has a text."""
        if is_template(text):
            environment = _Environment()
            tree = _parsed(text, environment)
            names = meta.find_undeclared_variables(tree)
            self.columns = None if ROW in names else frozenset(names)
            may_lack = any(node.name in ("defined", "undefined") for node in tree.find_all(nodes.Test))
            may_lack |= any(node.name in ("default", "d") for node in tree.find_all(nodes.Filter))
            self.needed = set() if may_lack else names - {ROW}
            self._template = environment.from_string(tree)

    def missing(self, columns: list[str]) -> str | None:
        """Why the text cannot be built from these columns; None if it can."""
        lacking = sorted(self.needed - {*columns})
        return _lacking(lacking[0], columns) if lacking else None

    def __call__(self, row: Any) -> str:
        """The text of a row.

        Args:
            row: a dict (column -> value) unless it is malformed.

        Raises:
            Unusable: not a row of columns, a column is missing or does not hold text, or the text is too large.
        """
        if not isinstance(row, dict):
            raise Unusable("not an object", f"a row must be a JSON object (got {type(row).__name__})")
        if not self.needed <= row.keys():
            raise Unusable("no such column", self.missing(list(row)) or "")
        text = row[self.text] if self._template is None else self._render(row)
        if not isinstance(text, str):
            raise Unusable(
                "wrong type", f"column {self.text!r} must hold a string (got {type(text).__name__}{_hint(self.text)}"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            of = f"column {self.text!r}" if self._template is None else "the text"
            raise Unusable("not text", f"{of} holds half of a surrogate pair, or bytes that are no UTF-8") from None
        return text

    def _render(self, row: dict[str, Any]) -> str:
        self._template.environment.num_steps = 0
        parts, size = [], 0
        try:
            for part in self._template.generate({ROW: row, **row}):
                parts.append(part)
                size += len(part)
                _check(size)
        except Unusable as why:
            nulls = [name for name in sorted(self.needed) if row.get(name, "") is None]
            if why.reason != "a null" or not nulls:
                raise
            fix = f"write {{{{ {nulls[0]} or '' }}}} where it may"
            raise Unusable("a null", f"column {nulls[0]!r} holds none; {fix}") from None
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise Unusable(
                "no text", f"the template cannot be filled in ({' '.join(str(error).split())[:200]})"
            ) from None
        return "".join(parts)


def is_template(text: str) -> bool:
    """Whether a text is a template and not the name of a column."""
    return "{{" in text or "{%" in text


def filters_of_templates() -> list[str]:
    """Names of the filters that a template may use, sorted."""
    return sorted({*_Environment().filters} - {COUNTED, "d"})


def _parsed(text: str, environment: _Environment) -> nodes.Template:
    try:
        tree = environment.parse(text)
        for kind, name in FORBIDDEN.items():
            if (found := next(tree.find_all(kind), None)) is not None:
                raise ValueError(
                    f"line {found.lineno} of the template has {name}, which templates over columns cannot use"
                )
        environment.from_string(text)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, COUNTED, [], [], None, None, lineno=loop.lineno)
    except TemplateSyntaxError as error:  # also a filter that is not there
        filters = (
            f"; filters are {', '.join(sorted({*environment.filters} - {COUNTED}))}" if "filter" in str(error) else ""
        )
        raise ValueError(f"line {error.lineno} of the template: {error.message}{filters}") from None
    except RecursionError:
        raise ValueError("the template is nested too deep") from None
    return tree


def _hint(column: str | None) -> str:
    return "); use kind: chat for conversations" if column in OF_CHATS else ")"


def _lacking(name: str, columns: list[str]) -> str:
    shown = ", ".join(map(repr, columns[:20])) + (", ..." if len(columns) > 20 else "")
    has_chats = next((column for column in OF_CHATS if column in columns), None)
    fix = f"{has_chats!r} holds conversations: use kind: chat" if has_chats else "set text: COLUMN"
    return f"no column {name!r} (it has {shown or 'none'}); {fix}"


def _check(size: int) -> None:
    if size > files.LARGEST:
        raise Unusable("too large", f"the template writes more than {files.LARGEST:,} characters")


def _written(value: Any) -> Any:
    """Check a value before it is written into the text."""
    if value is None:
        raise Unusable("a null", "the template writes a null; write {{ ... or '' }} where there may be one")
    if isinstance(value, WRITTEN) or hasattr(value, "isoformat"):
        return value
    if isinstance(value, list | dict):
        how = "join(', ')" if isinstance(value, list) else "tojson"
        raise Unusable("wrong type", f"the template writes a {type(value).__name__}; make it text with | {how}")
    raise Unusable("wrong type", f"the template writes a value of type {type(value).__name__}, which is no text")


def _join(values: Any, between: str = "", attribute: str | None = None) -> str:
    """Jinja's filter ``join``, which raises an error before it builds a text that is too large."""
    parts = list(_texts(values, attribute))
    _check(sum(map(len, parts)) + len(str(between)) * len(parts))
    return str(between).join(parts)


def _texts(values: Any, attribute: str | None) -> Iterator[str]:
    for value in values:
        if attribute is not None:
            if not isinstance(value, dict) or attribute not in value:
                raise Unusable("no text", f"join finds an item without {attribute!r}")
            value = value[attribute]
        yield str(_written(value))


def _replace(value: Any, old: str, new: str) -> str:
    text, old, new = str(_written(value)), str(old), str(new)
    _check(len(text) + text.count(old) * len(new))
    return text.replace(old, new)


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
