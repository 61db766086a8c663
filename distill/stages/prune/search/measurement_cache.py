"""What a search has measured so far, kept as it comes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from distill.core.errors import InputError
from distill.core.stored import read_checked, write_checked

FOUND: TypeAdapter[dict[str, dict[str, Any]]] = TypeAdapter(dict[str, dict[str, Any]])


class MeasurementCache:
    """Measurements in a file; another process goes on from there.

    Args:
        file: where they are kept.
    """

    def __init__(self, file: Path):
        self._file = file
        self._all: dict[str, Any] = {}
        if file.is_file():
            with suppress(InputError):  # damaged: what it held is measured anew
                self._all = read_checked(file, FOUND, "search anew")

    def get(self, kind: str, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured before, or is now."""
        key = f"{kind} {name}"
        if key not in self._all:
            self._all[key] = measure()
            write_checked(self._file, self._all)
        found: dict[str, Any] = self._all[key]
        return found

    def forget(self, kind: str, name: str = "") -> None:
        """Leave no measurement of a kind, or the one of a name, to be believed."""
        gone = [key for key in self._all if key == f"{kind} {name}" or (not name and key.startswith(f"{kind} "))]
        if gone:
            self._all = {key: value for key, value in self._all.items() if key not in gone}
            write_checked(self._file, self._all)
