"""What the repository says it measured: results of one shape, and a page made of nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import result, tables
from distill.recipe import Recipe

RESULTS = sorted(result.FOLDER.glob("*.json"))
each = pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)


def test_the_page_is_made_of_the_results() -> None:
    assert tables.PAGE.read_text(encoding="utf-8") == tables.render(), "run `python -m benchmarks.tables`"


@each
def test_a_result_has_the_shape_of_all(file: Path) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    assert set(data) == {"benchmark", "date", "hardware", "versions", "command", "rows", "notes"}
    assert data["benchmark"] == file.stem
    assert set(data["hardware"]) >= {"cpu", "cores_used", "memory_gb", "gpu", "os"}
    assert data["rows"]
    assert data["command"].startswith("python -m benchmarks.")


@each
def test_a_result_names_no_place_of_the_machine_it_was_made_on(file: Path) -> None:
    assert re.findall(r"(?<![\w.])/(?:\w[\w.-]*/)+", file.read_text(encoding="utf-8")) == []


def test_recipes_of_benchmarks_are_recipes() -> None:
    files = sorted((Path(result.__file__).parent / "recipes").glob("*.yaml"))
    assert [Recipe.load(file).name for file in files] == [file.stem for file in files] != []


def _write(folder: Path, name: str, rows: list[dict], notes: list[str]) -> None:
    machine = {"cpu": "a CPU", "cores_used": "1 of 2", "memory_gb": 8, "gpu": None, "os": "an OS"}
    command = f"python -m benchmarks.{name}"
    result.write(name, command=command, hardware=machine, versions={}, rows=rows, notes=notes, folder=folder)


def test_a_result_without_words_shows_all_its_rows(tmp_path: Path) -> None:
    rows = [{"table": "first", "loss": "a", "seconds": 0.12345}, {"table": "second", "loss": "b", "bytes": 123456}]
    _write(tmp_path, "something_else", rows, ["measured twice"])
    page = tables.render(tmp_path)
    assert "## Something else" in page
    assert "**first**\n\n| loss | seconds |\n| --- | ---: |\n| a | 0.123 |\n" in page
    assert "**second**\n\n| loss | bytes |\n| --- | ---: |\n| b | 123,456 |\n" in page
    assert "- measured twice\n" in page
    assert "by `python -m benchmarks.something_else` on a CPU, 1 of 2 cores, 8 GB, an OS" in page


def test_words_beside_a_result_take_their_figures_from_it(tmp_path: Path) -> None:
    words = '## Title\n\nIt took {{ value(rows, "s", loss="a") }} s.\n\n{{ table(rows, columns={"loss": "which"}) }}\n'
    (tmp_path / "timed.md.jinja").write_text(words, encoding="utf-8")
    _write(tmp_path, "timed", [{"loss": "a", "s": 2.0}], [])
    assert "## Title\n\nIt took 2.00 s.\n\n| which |\n| --- |\n| a |\n" in tables.render(tmp_path)
    _write(tmp_path, "timed", [{"loss": "a", "s": 2.0}, {"loss": "a", "s": 3.0}], [])
    with pytest.raises(LookupError, match="s: 2 rows have"):
        tables.render(tmp_path)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (17.0, "17.0"),
        (0.03856, "0.0386"),
        (1234.5, "1,234"),
        (0.0, "0"),
        (123456, "123,456"),
        (None, "-"),
        ("a|b", "a\\|b"),
        (result.spread([2.0]), "2.00"),
        (result.spread([20.0, 21.0, 22.0]), "21.0 ± 1.0"),
        (result.spread([0.5, 0.5, 0.5]), "0.5000 ± 0.0000"),
    ],
)
def test_figures_as_people_read_them(entry: object, text: str) -> None:
    assert tables.cell(entry) == text
