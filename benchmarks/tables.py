"""Generates docs/benchmarks.md and docs/results.md from results/*.json: `python -m benchmarks.tables`.

The template of docs/results.md is ``results.md.jinja``, which takes figures of several benchmarks. The text of
docs/benchmarks.md is in ``benchmarks.md.jinja`` (the head of the page) and in ``results/<benchmark>.md.jinja``; without
such a file, only the tables of a benchmark are shown. The templates can use all keys of the JSON, and two functions, so
that no figure has to be typed:

    {{ table(rows, where={"vocabulary": 32768}, columns={"loss": "loss", "ratio": "time / limit"}) }}
    {{ value(rows, "ratio", loss="forward_kl", vocabulary=32768) }}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.result import FOLDER

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
WORDS = "benchmarks.md.jinja"
RESULTS_PAGE = ROOT / "docs" / "results.md"
RESULTS_WORDS = "results.md.jinja"
ORDER = (
    "loss_alone",
    "whole_step",
    "live_vs_cached",
    "books",
    "losses",
    "pruning",
    "quantization",
    "real_models",
    "chat",
    "knowledge",
    "encoders",
    "engines",
    "scoring",
    "threads",
    "tokenizing",
    "forecast",
)
"""Order of the benchmarks on the page; other benchmarks follow in alphabetical order."""

Row = Mapping[str, Any]


def render(folder: Path = FOLDER) -> str:
    """The page of all benchmarks, from all results in ``folder``."""
    environment = _environment(folder)
    results = sorted(_results(folder), key=lambda result: (_rank(result["benchmark"]), result["benchmark"]))
    sections = [_section(environment, folder, result) for result in results]
    return environment.get_template(WORDS).render(sections=sections).strip() + "\n"


def render_results(folder: Path = FOLDER) -> str:
    """The short page of results, from all results in ``folder``; sections without a result are left out."""
    results = {result["benchmark"]: result for result in _results(folder)}
    return _environment(folder).get_template(RESULTS_WORDS).render(results=results).strip() + "\n"


def _results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")]


def _environment(folder: Path) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=False,
        autoescape=False,
    )
    environment.globals.update(table=table, value=value, origin=_origin)
    return environment


def _rank(benchmark: str) -> int:
    return ORDER.index(benchmark) if benchmark in ORDER else len(ORDER)


def _section(environment: jinja2.Environment, folder: Path, result: Mapping[str, Any]) -> str:
    """The section of one benchmark: its text and tables, and below them how it was measured."""
    name = f"{result['benchmark']}.md.jinja"
    if (folder / name).is_file():
        body = environment.get_template(name).render(**result).strip()
    else:
        tables = "\n\n".join(_all_tables(result["rows"]))
        body = f"## {result['benchmark'].replace('_', ' ').capitalize()}\n\n{tables}"
    notes = "".join(f"- {note}\n" for note in result["notes"])
    return "\n\n".join(part.strip() for part in (body, notes, _origin(result)) if part.strip())


def _origin(result: Mapping[str, Any]) -> str:
    machine = result["hardware"]
    gpu = f"{machine['gpu']}, " if machine["gpu"] else ""
    where = f"{gpu}{machine['cpu']}, {machine['cores_used']} cores, {machine['memory_gb']} GB, {machine['os']}"
    packages = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return f"Measured {result['date']} by `{result['command']}` on {where}; {packages}."


def _all_tables(rows: Sequence[Row]) -> Iterable[str]:
    """All rows, with one table for each value of ``"table"``."""
    for name in dict.fromkeys(row.get("table") for row in rows):
        title = f"**{name}**\n\n" if name is not None else ""
        yield title + table([row for row in rows if row.get("table") == name])


def table(rows: Sequence[Row], columns: Mapping[str, str] | None = None, where: Mapping[str, Any] | None = None) -> str:
    """A Markdown table.

    Args:
        rows: rows of a result.
        columns: key -> heading, in order; None for all keys except ``"table"`` and lists (single measurements).
        where: values that rows must have to be shown.
    """
    rows = _matching(rows, where or {})
    keys = dict.fromkeys(key for row in rows for key in row if key != "table" and not isinstance(row[key], list))
    columns = columns or {key: key.replace("_", " ") for key in keys}
    cells = [[cell(row.get(key)) for key in columns] for row in rows]
    numeric = [
        all(not isinstance(row.get(key), str) for row in rows) and any(row.get(key) is not None for row in rows)
        for key in columns
    ]
    lines = [list(columns.values()), ["---:" if right else "---" for right in numeric], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def value(rows: Sequence[Row], key: str, **where: Any) -> str:
    """The figure ``key`` of the only row that has the values ``where``.

    Raises:
        LookupError: no row, or several rows, have these values; the text must not refer to another figure.
    """
    found = _matching(rows, where)
    if len(found) != 1:
        raise LookupError(f"{key}: {len(found)} rows have {where}, expected 1")
    return cell(found[0][key])


def cell(entry: Any) -> str:
    """A figure as text: three significant digits, thousands separated, and ± its standard deviation."""
    if isinstance(entry, Mapping):
        mean, deviation = entry["mean"], entry["std"]
        unit = max(abs(mean) / 200, deviation or 0.0)  # a tiny deviation must not add digits
        return cell(mean) if deviation is None else f"{_rounded(mean, unit)} ± {_rounded(deviation, unit)}"
    if entry is None:
        return "-"
    if isinstance(entry, float):
        return _rounded(entry, entry / 10)
    if isinstance(entry, int) and not isinstance(entry, bool):
        return f"{entry:,}"
    return str(entry).replace("|", "\\|").replace("\n", " ")


def _rounded(number: float, unit: float) -> str:
    """``number`` with as many decimals as two digits of ``unit`` need."""
    decimals = 0
    while decimals < 9 and 0 < abs(unit) * 10**decimals < 10:
        decimals += 1
    return f"{number:,.{decimals}f}"


def _matching(rows: Sequence[Row], where: Mapping[str, Any]) -> list[Row]:
    return [row for row in rows if all(row.get(key) == wanted for key, wanted in where.items())]


if __name__ == "__main__":
    for page, text in ((PAGE, render()), (RESULTS_PAGE, render_results())):
        page.write_text(text, encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}", file=sys.stderr)
