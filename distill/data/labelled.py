"""Reads the rows of a source for a task: a text, possibly a second one, and the label.

A row that lacks a column, or has a value of the wrong type in it, is rejected with the reason, as in any other source.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distill.core.errors import InputError
from distill.core.tasks import Classification, Embedding, ModelTask, Regression, TokenClassification
from distill.core.tasks.base import OfTexts
from distill.data.base import Conversation, Document, Rejected, SourceSpec
from distill.data.columns import ColumnsSpec
from distill.data.message import Unusable
from distill.data.text_template import TextOf

Label = str | float | tuple[str, ...] | None
"""The name of a class, a number, the class names of all words, or None."""


@dataclass(frozen=True, slots=True)
class Labelled(Document):
    """A row for a task. Its ``text`` is everything that a model reads; equal rows are found by it.

    Attributes:
        first: the text, or the first text of a pair.
        second: the second text of a pair; None if there is none.
        words: the words of the text, if the source stores them as a list.
        label: the value to predict.
    """

    first: str = ""
    second: str | None = None
    words: tuple[str, ...] = ()
    label: Label = None


def labelled(source: SourceSpec, task: ModelTask, key: str) -> Iterator[Labelled | Rejected]:
    """Yield every row of a source, in its order.

    Args:
        source: the recipe's source.
        task: the recipe's task.
        key: key of the source in the recipe.

    Raises:
        InputError: the source has no columns and the task needs some, or it cannot be read.
    """
    if not isinstance(source, ColumnsSpec):
        if columns := columns_of(task):
            raise InputError(
                f"{key}: {source.kind} has no columns, and task: {task.kind} reads {', '.join(columns)}; use jsonl, "
                "csv, parquet, saved or hub"
            )
        for item in source.documents():
            assert not isinstance(item, Conversation)  # the recipe refuses them
            yield item if isinstance(item, Rejected) else Labelled(item.id, item.text, first=item.text)
        return
    if isinstance(task, TokenClassification):  # whose words are the text
        source = source.model_copy(update={"text": task.words})
    text_of = None if isinstance(task, TokenClassification) else TextOf(source.text)
    wanted = frozenset(columns_of(task))
    has_classes = isinstance(task, Classification | Embedding | TokenClassification) and task.label is not None
    stated = _names(source, task) if has_classes else None
    names = wanted if text_of is None else None if text_of.columns is None else text_of.columns | wanted
    for id, row in source.rows(names):
        try:
            if isinstance(row, Unusable):
                raise row
            item = _row(id, row, task, text_of, stated)
        except Unusable as why:
            yield Rejected(id, why.reason, why.detail.encode("utf-8", "backslashreplace").decode())
            continue
        if item.text.strip():
            yield item


def columns_of(task: ModelTask) -> tuple[str, ...]:
    """Columns that a task reads in addition to the text."""
    pair = (task.text_pair,) if isinstance(task, OfTexts) and task.text_pair else ()
    if isinstance(task, TokenClassification):
        return (task.words, task.label)
    label = getattr(task, "label", None)
    return (*pair, label) if label else pair


def _names(source: ColumnsSpec, task: Any) -> tuple[str, ...] | None:
    """Class names for integer labels: from the source, otherwise from the recipe.

    If the recipe's classes are numbers, such as [2, 1, 0], integers are treated as names.
    """
    classes = getattr(task, "classes", None)
    if classes is not None and any(name.removeprefix("-").isdecimal() for name in classes):
        return None
    return source.class_names(task.label) or classes


def _row(id: str, row: Any, task: ModelTask, text_of: TextOf | None, names: tuple[str, ...] | None) -> Labelled:
    if text_of is None:
        assert isinstance(task, TokenClassification)
        words, labels = _strings(row, task.words), _classes(row, task.label, names)
        if len(words) != len(labels):
            raise Unusable(
                "wrong length",
                f"column {task.words!r} has {len(words)} words and {task.label!r} {len(labels)} classes; expected the "
                "same number",
            )
        return Labelled(id, " ".join(words), words=words, label=labels)
    first = text_of(row)
    second = None
    if isinstance(task, OfTexts) and task.text_pair is not None:
        second = _string(row, task.text_pair)
    label: Label = None
    if isinstance(task, Classification | Embedding) and task.label is not None:
        label = _class(_column(row, task.label), task.label, names)
    elif isinstance(task, Regression):
        label = _number(_column(row, task.label), task.label)
    return Labelled(id, first if second is None else f"{first}\n\n{second}", first=first, second=second, label=label)


def _column(row: Any, name: str) -> Any:
    if not isinstance(row, dict):
        raise Unusable("not an object", f"a row must be a JSON object (got {type(row).__name__})")
    if name not in row:
        raise Unusable("no such column", f"no column {name!r} (the row has {', '.join(map(repr, row)) or 'none'})")
    return row[name]


def _string(row: Any, name: str) -> str:
    value = _column(row, name)
    if not isinstance(value, str):
        raise Unusable("wrong type", f"column {name!r} must hold a string (got {type(value).__name__})")
    return value


def _strings(row: Any, name: str) -> tuple[str, ...]:
    value = _column(row, name)
    if not isinstance(value, list) or not all(isinstance(word, str) and word for word in value):
        raise Unusable("wrong type", f"column {name!r} must hold a list of words (got {type(value).__name__})")
    return tuple(value)


def _classes(row: Any, name: str, names: tuple[str, ...] | None) -> tuple[str, ...]:
    value = _column(row, name)
    if not isinstance(value, list):
        raise Unusable("wrong type", f"column {name!r} must hold a list of classes (got {type(value).__name__})")
    return tuple(_class(one, name, names) for one in value)


def _class(value: Any, name: str, names: tuple[str, ...] | None) -> str:
    """The name of a class; an integer is an index into ``names``, or its own name if there are none."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int) and not isinstance(value, bool) and names is not None:
        if 0 <= value < len(names):
            return names[value]
        raise Unusable("no class", f"column {name!r} has {value}, and its classes are numbered 0 to {len(names) - 1}")
    if isinstance(value, int):
        return str(value).lower()  # true and false, too
    raise Unusable("no class", f"column {name!r} must hold a name or a whole number (got {value!r:.40})")


def _number(value: Any, name: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # a CSV file holds text
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise Unusable("no number", f"column {name!r} must hold a finite number (got {value!r:.40})")
    return number


def sorted_classes(names: set[str]) -> tuple[str, ...]:
    """Classes in the order of the logits: integers by value, other names alphabetically."""
    if all(name.removeprefix("-").isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))
