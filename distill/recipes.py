"""The recipes that come with the package, found by name."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from distill.core.errors import InputError
from distill.core.source import suggest


def shipped() -> dict[str, Path]:
    """Name -> file of every recipe that comes with distill (inside the wheel, or beside the package in a checkout)."""
    package = Path(str(resources.files("distill")))
    for folder in (package / "_recipes", package.parent / "recipes"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.rglob("*.yaml"))}
    return {}


def find(recipe: str) -> Path:
    """A recipe's file: the path itself if it exists, else the shipped recipe of that name.

    Raises:
        InputError: neither.
    """
    path, names = Path(recipe), shipped()
    if path.is_file():
        return path
    name = path.name.removesuffix(".yaml")
    if name in names and (recipe == name or path.parts[:-1] == ("recipes",)):
        return names[name]
    raise InputError(
        f"{recipe}: no such recipe (those that come with distill: {', '.join(names)}){suggest(name, names)}"
    )
