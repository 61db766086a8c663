"""The recipes that come with the package, found by name."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from distill.core.artifact import write_text
from distill.core.errors import InputError
from distill.core.outside import is_there
from distill.core.source import suggest


def shipped() -> dict[str, Path]:
    """Name -> file of every recipe that comes with distill (inside the wheel, or beside the package in a checkout)."""
    package = Path(str(resources.files("distill")))
    for folder in (package / "_recipes", package.parent / "recipes"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.rglob("*.yaml"))}
    return {}


START = "start"
"""The recipe that ``distill init`` writes when none is named."""


def copy_of(name: str, file: Path) -> None:
    """Write a shipped recipe to a file of the user's, to be edited.

    Raises:
        InputError: there is no recipe of that name, or the file is there already.
    """
    source = find(name)
    if is_there(file):
        raise InputError(f"{file}: is there already; name another with --out, or remove it")
    first, *rest = source.read_text(encoding="utf-8").splitlines(keepends=True)
    # the first line is the command that runs the recipe
    write_text(file, "".join([f"# distill run {file}\n" if first.startswith("# distill run") else first, *rest]))


def find(recipe: str) -> Path:
    """A recipe's file: the path itself if it exists, else the shipped recipe of that name.

    Raises:
        InputError: neither.
    """
    path, names = Path(recipe), shipped()
    if os.path.isfile(path):
        return path
    name = path.name.removesuffix(".yaml")
    if name in names and (recipe == name or path.parts[:-1] == ("recipes",)):
        return names[name]
    if len(path.parts) > 1 or path.suffix in (".yaml", ".yml"):
        raise InputError(
            f"{recipe}: no such file{suggest(name, names)}; 'distill list recipes' names those that come with distill"
        )
    raise InputError(
        f"{recipe}: no such recipe (those that come with distill: {', '.join(names)}){suggest(name, names)}"
    )
