"""How distill was installed, and what else is installed under its name."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path
from urllib.parse import unquote, urlparse

DISTRIBUTION = "distill-lm"
"""Name on the package index; the command and the import are called distill."""


def install_command(extra: str) -> str:
    """The command that adds an extra to this installation of distill, with the installer that made it."""
    found = _found()
    wanted = f"{DISTRIBUTION}[{extra}]"
    if found is None:
        return f"pip install '{wanted}'"
    prefix = Path(sys.prefix).parts
    if "uv" in prefix and "tools" in prefix:
        return f"uv tool install '{wanted}'"
    if "pipx" in prefix:
        return f"pipx install --force '{wanted}'"
    if (checkout := _checkout(found)) is not None:
        place = "." if checkout == Path.cwd() else str(checkout)
        wanted, flag = f"{place}[{extra}]", "-e "
    else:
        flag = ""
    is_uv = (found.read_text("INSTALLER") or "").strip() == "uv"
    return f"{'uv pip' if is_uv else 'pip'} install {flag}{shlex.quote(wanted)}"


def conflicts() -> list[str]:
    """A line for each other package that installs a command or an import called distill, with the fix."""
    lines = []
    for other in distributions():
        name = str(other.metadata["Name"])
        if name.lower().replace("_", "-") == DISTRIBUTION:
            continue
        command = any(point.group == "console_scripts" and point.name == "distill" for point in other.entry_points)
        files = [file for file in other.files or () if file.parts[:1] == ("distill",)]
        what = [*["the command distill"] * command, *["the import distill"] * bool(files)]
        if what:
            lines.append(
                f"{name} {other.version} also installs {' and '.join(what)}, so one of the two is broken; "
                f"pip uninstall {name}, then pip install --force-reinstall --no-deps {DISTRIBUTION}"
            )
    first = shutil.which("distill")
    own = Path(sys.executable).with_name("distill")
    if first is not None and own.exists() and not os.path.samefile(first, own):
        lines.append(f"the shell finds another distill first: {first}; put the folder of {own} first in PATH")
    return lines


def _found() -> Distribution | None:
    """The installed distribution; None if distill runs from a folder that is not installed."""
    try:
        return distribution(DISTRIBUTION)
    except PackageNotFoundError:
        return None


def _checkout(found: Distribution) -> Path | None:
    """The folder of an editable installation; None for any other."""
    try:
        origin = json.loads(found.read_text("direct_url.json") or "{}")
    except ValueError:
        return None
    if not origin.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlparse(str(origin.get("url", ""))).path))
