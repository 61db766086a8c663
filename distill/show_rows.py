"""The rows that a stage has made: those that are kept, and those that are dropped, with the reason."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from distill.core.errors import InputError
from distill.core.outside import is_file, is_folder, read_json
from distill.stages.synthesize.replies import FOLDER as REPLIES
from distill.stages.synthesize.row_files import ABOUT, DROPPED, EXAM, FOLDER, read_lines

LONGEST = 600
"""Characters of a text that are shown."""


def is_data_set(place: Path) -> bool:
    """Whether a folder is that of a stage that has made rows."""
    return is_file(place / ABOUT) and is_file(place / DROPPED)


def is_unfinished(place: Path) -> bool:
    """Whether a folder is that of a stage that was ended while it made rows."""
    return not is_data_set(place) and is_folder(place / REPLIES)


def show_rows(place: Path, num_rows: int, start: int = 0, console: Console | None = None) -> None:
    """Print the counts of a data set, some kept rows, some rows that each filter dropped, and some exam questions.

    Args:
        place: folder of the stage.
        num_rows: rows of each kind.
        start: kept rows, and dropped rows of each filter, to skip first.
        console: where to print; unset: standard output.

    Raises:
        InputError: a file is damaged.
    """
    console = console or Console(highlight=False)
    say = lambda line: console.print(Text(line), soft_wrap=True)  # noqa: E731
    about = read_json(place / ABOUT) or {}
    found = about.get("dropped")
    dropped: dict[str, Any] = found if isinstance(found, dict) else {}
    counts = f"{about.get('rows')} of {about.get('rows_before_filters')} rows kept"
    say(f"{place}: {counts}, written by {about.get('writer')}")
    say("dropped: " + (", ".join(f"{name} {count}" for name, count in dropped.items()) or "none"))
    files = sorted((place / FOLDER).glob("*.jsonl"))
    if not files:
        raise InputError(f"{place / FOLDER}: no file of rows; run the stage again")
    kept = (row for file in files for row in read_lines(file))
    for number, row in islice(enumerate(kept, 1), start, start + num_rows):
        say(f"\nkept {number}: {row.get('source', '')}")
        _show(row, say)
    seen: dict[str, int] = {}
    for row in read_lines(place / DROPPED):
        name = str(row.get("filter"))
        seen[name] = seen.get(name, 0) + 1
        if start < seen[name] <= start + num_rows:
            say(f"\ndropped by {name}, {seen[name]} of {dropped.get(name)}: {row.get('why')}")
            _show(row, say)
    for number, row in islice(enumerate(read_lines(place / EXAM), 1), start, start + num_rows):
        say(f"\nexam {number} ({row.get('group')}): {row.get('place')}\n  {row.get('question')}\n  {row.get('answer')}")


def _show(row: dict[str, Any], say: Any) -> None:
    if "text" in row:
        say(f"  {_short(str(row['text']))}")
    messages = row.get("messages")
    for message in messages if isinstance(messages, list) else ():
        say(f"  {message.get('role')}: {_short(str(message.get('content')))}")
    if row.get("document"):
        say(f"  document: {_short(str(row['document']))}")


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."
