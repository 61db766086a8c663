"""Writes the parts of the documentation that are made from the code: `python docs/generate.py` (`make pages`).

Each page of ``docs/stages/`` ends in a table of the stage's keys, made from its Spec. The text above is hand-written.
``docs/data.md`` has a table of the sources. ``docs/reference/`` is made from the code, except ``python.md``: the
families, the sections of a recipe, and the command line.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

from distill.cli import app
from distill.core.spec import Family, Spec
from distill.data import SOURCES
from distill.listing import SECTIONS, choices_of, default_of
from distill.recipe import FAMILIES, Recipe
from distill.stages import STAGES

DOCS = Path(__file__).parent
MARK = "<!-- made by docs/generate.py from the Spec; change the docstrings there -->"
MADE = "<!-- made by docs/generate.py; change the docstrings in the code -->"

SOURCES_MARK, END = "<!-- made by docs/generate.py: sources -->", "<!-- end -->"


def keys(spec: type[Spec], without: frozenset[str] = frozenset({"kind"})) -> list[str]:
    """The keys of a spec as the lines of a Markdown table."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in spec.model_fields.items():
        if name in without:
            continue
        meaning = " ".join((field.description or "").split())
        if choices := choices_of(field):
            meaning = f"{meaning} Choices: {', '.join(f'`{choice}`' for choice in choices)}."
        rows.append(f"| `{name}` | {default_of(field)} | {_cell(meaning)} |")
    return rows if len(rows) > 2 else ["It has no keys."]


def table(kind: str, spec: type[Spec]) -> str:
    """The keys of a stage as a section of its page."""
    rows = [f"## Keys of `{kind}`", "", MARK, "", *keys(spec)]
    more = "`distill list` shows the keys of nested settings, such as those of a loss or of the optimizer."
    return "\n".join([*rows, "", more, ""])


def page(kind: str, spec: type[Spec]) -> tuple[Path, str]:
    """The file of a stage's page, and its text."""
    file = DOCS / "stages" / f"{kind}.md"
    prose = (
        file.read_text(encoding="utf-8").split(f"## Keys of `{kind}`")[0].rstrip() if file.is_file() else f"# {kind}"
    )
    return file, f"{prose}\n\n{table(kind, spec)}"


def sources() -> tuple[Path, str]:
    """The file of the page on data, and its text."""
    file = DOCS / "data.md"
    rows = ["", "| kind | what it reads | keys |", "|---|---|---|"]
    for kind, spec in SOURCES.items():
        names = ", ".join(f"`{name}`" for name in spec.model_fields if name != "kind")
        rows.append(f"| `{kind}` | {' '.join((spec.__doc__ or '').split()).partition('. ')[0].rstrip('.')} | {names} |")
    before, rest = file.read_text(encoding="utf-8").split(SOURCES_MARK)
    return file, "\n".join([before + SOURCES_MARK, *rows, "", END + rest.partition(END)[2]])


def family(plural: str, members: Family) -> tuple[Path, str]:
    """The file of the reference of a family, and its text: each member's module docstring and keys."""
    lines = [f"# {plural.replace('_', ' ').capitalize()}", "", MADE, ""]
    article = "an" if members.noun[0] in "aeiou" else "a"
    lines += [f"In a recipe, {article} {members.noun} is its name, or its settings with `kind:`.", ""]
    for kind, spec in members.items():
        beside = spec.__module__.rpartition(".")[2] == kind  # a file of its own says more than its spec
        text = (inspect.getdoc(sys.modules[spec.__module__]) if beside else inspect.getdoc(spec)) or ""
        lines += [f"## `{kind}`", "", plain(text), "", *keys(spec), ""]
    return DOCS / "reference" / f"{plural}.md", "\n".join(lines)


def recipe() -> tuple[Path, str]:
    """The file of the reference of a recipe, and its text."""
    lines = ["# Keys of a recipe", "", MADE, "", plain(inspect.getdoc(Recipe) or ""), "", *keys(Recipe), ""]
    lines += [
        "The keys of each stage are on its page: " + ", ".join(f"[{k}](../stages/{k}.md)" for k in STAGES) + ".",
        "",
    ]
    for name, section in SECTIONS.items():
        lines += [f"## `{name}`", "", plain(inspect.getdoc(section) or ""), "", *keys(section), ""]
    return DOCS / "reference" / "recipe.md", "\n".join(lines)


def command_line() -> tuple[Path, str]:
    """The file of the reference of the command line, and its text."""
    lines = ["# Command line", "", MADE, "", "`distill --install-completion` adds completion to the shell.", ""]
    for name, command in sorted(_commands(typer.main.get_command(app), "distill")):
        lines += [f"## `{name}`", "", " ".join((command.help or "").split()), "", "| argument | meaning |", "|---|---|"]
        for parameter in command.params:
            is_option = parameter.opts[0].startswith("-")
            shown = " ".join(parameter.opts) if is_option else parameter.metavar or str(parameter.name).upper()
            shown += f" {parameter.metavar}" if is_option and parameter.metavar else ""
            if getattr(parameter, "hidden", False) or not getattr(parameter, "help", None):
                continue
            lines.append(f"| `{shown}` | {_cell(' '.join(parameter.help.split()))} |")
        lines.append("")
    codes = "0 done, 1 failed, 2 the recipe or the arguments are wrong, 3 done, but a bound of `require` was not met, "
    codes += "75 stopped by SIGTERM, SIGUSR1 or SIGHUP and saved, 130 stopped by Ctrl-C and saved, 141 a reader such "
    codes += "as `head` closed standard output (commands other than a run stop; a run continues)."
    return DOCS / "reference" / "command-line.md", "\n".join([*lines, "## Exit codes", "", codes, ""])


def _commands(group: typer.core.TyperGroup, path: str) -> Iterator[tuple[str, typer.core.TyperCommand]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def plain(text: str) -> str:
    """A docstring as Markdown: roles and text in double backquotes become code."""
    text = re.sub(r":(?:func|class|meth|mod|data|attr):`([^`<]+?)\s*<[^`>]+>`", r"`\1`", text)
    text = re.sub(r":(?:func|class|meth|mod|data|attr):`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def _cell(text: str) -> str:
    return plain(text).replace("|", chr(92) + "|").replace("<", "&lt;")


def pages() -> Iterator[tuple[Path, str]]:
    """Every file that is made from the code, or has a part that is, and its text."""
    yield sources()
    for kind, spec in STAGES.items():
        yield page(kind, spec)
    for plural, members in FAMILIES.items():
        if plural != "stages":
            yield family(plural, members)
    yield recipe()
    yield command_line()


def main() -> None:
    """Write every page."""
    for file, text in pages():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
        print(file.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
