"""Comma-separated values whose cells a spreadsheet shows and never computes.

Names of stages and models, notes and schemes come from recipes and folders. A spreadsheet takes a cell that begins with
``=``, ``+``, ``-`` or ``@`` for a formula, which can read other files or call an address; an apostrophe before it makes
it text (OWASP, "CSV Injection").
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from typing import Any

FORMULA = ("=", "+", "-", "@", "\t", "\r")


def text_cell(text: str) -> str:
    """A text as a spreadsheet shows it."""
    return f"'{text}" if text.startswith(FORMULA) else text


def csv_of_texts(rows: Iterable[Sequence[Any]]) -> str:
    """Rows of cells as they are; None is an empty one."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


def csv_of_records(records: Sequence[Any]) -> str:
    """Dataclasses of one type, a row each, with the names of their fields as headings; numbers at full precision."""
    cells = ([text_cell(cell) if isinstance(cell, str) else cell for cell in astuple(one)] for one in records)
    return csv_of_texts([[field.name for field in fields(records[0])], *cells])
