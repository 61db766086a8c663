"""Writes what the pages of the documentation take from the code: `python docs/generate.py` (`make pages`).

Each page of ``docs/stages/`` ends in a table of the stage's keys, made from its Spec. The text above is hand-written.
``docs/data.md`` has a table of the sources.
"""

from __future__ import annotations

from pathlib import Path

from distill.core.spec import Spec
from distill.data import SOURCES
from distill.listing import choices_of, default_of
from distill.stages import STAGES

DOCS = Path(__file__).parent
MARK = "<!-- made by docs/generate.py from the Spec; change the docstrings there -->"

SOURCES_MARK, END = "<!-- made by docs/generate.py: sources -->", "<!-- end -->"


def table(kind: str, spec: type[Spec]) -> str:
    """The keys of a stage as a Markdown table."""
    rows = [f"## Keys of `{kind}`", "", MARK, "", "| key | default | meaning |", "|---|---|---|"]
    for name, field in spec.model_fields.items():
        if name == "kind":
            continue
        meaning = " ".join((field.description or "").split())
        if choices := choices_of(field):
            meaning = f"{meaning} Choices: {', '.join(f'`{choice}`' for choice in choices)}."
        rows.append(f"| `{name}` | {default_of(field)} | {meaning.replace('|', chr(92) + '|')} |")
    more = "`distill list` shows the keys of what can stand in a key, such as the losses or the optimizer."
    return "\n".join([*rows, "", more, ""])


def page(kind: str, spec: type[Spec]) -> tuple[Path, str]:
    """The file of a stage's page, and what it must hold."""
    file = DOCS / "stages" / f"{kind}.md"
    prose = (
        file.read_text(encoding="utf-8").split(f"## Keys of `{kind}`")[0].rstrip() if file.is_file() else f"# {kind}"
    )
    return file, f"{prose}\n\n{table(kind, spec)}"


def sources() -> tuple[Path, str]:
    """The file of the page on data, and what it must hold."""
    file = DOCS / "data.md"
    rows = ["", "| kind | what it reads | keys |", "|---|---|---|"]
    for kind, spec in SOURCES.items():
        keys = ", ".join(f"`{name}`" for name in spec.model_fields if name != "kind")
        rows.append(f"| `{kind}` | {' '.join((spec.__doc__ or '').split()).partition('. ')[0].rstrip('.')} | {keys} |")
    before, rest = file.read_text(encoding="utf-8").split(SOURCES_MARK)
    return file, "\n".join([before + SOURCES_MARK, *rows, "", END + rest.partition(END)[2]])


def main() -> None:
    """Write every page."""
    file, text = sources()
    file.write_text(text, encoding="utf-8")
    print(file.relative_to(DOCS.parent))
    for kind, spec in STAGES.items():
        file, text = page(kind, spec)
        file.write_text(text, encoding="utf-8")
        print(file.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
