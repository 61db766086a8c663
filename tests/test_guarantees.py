"""The table of promises: each stands in its page word for word, and names tests that exist and are run somewhere."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "guarantees.md"
PROMISE = re.compile(r"^\| (?P<sentence>.+?) \| (?P<tests>`[^|]+`) \|$")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
PACKAGES = {re.split(r"[<>=]", line)[0] for lines in EXTRAS.values() for line in lines}
INSTALLED = {name.removesuffix("-python").replace("-", "_") for name in PACKAGES}
INSTALLED |= {"jsonschema"}  # by nbformat


def words(text: str) -> str:
    """Without line breaks, and of a link only what is read."""
    return " ".join(re.sub(r"\[([^\]]+)\]\([^)\s]+\)", r"\1", text).split())


def promises() -> list[tuple[Path, str, list[str]]]:
    """Page, sentence and tests of every row."""
    found, page = [], None
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## \[(.+)\]\((.+)\)$", line):
            page = ROOT / heading[1]
            assert page == (TABLE.parent / heading[2]).resolve()
        elif line.startswith("| ") and line != "| promise | tests |":
            row = PROMISE.match(line)
            assert row, f"not a row: {line}"
            assert page is not None
            found.append((page, row["sentence"].replace("\\|", "|"), re.findall(r"`([^`]+)`", row["tests"])))
    return found


@cache
def parsed(file: Path) -> ast.Module:
    """A file of tests; many promises name tests of the same few files."""
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def collected(file: Path) -> dict[str, ast.FunctionDef]:
    """The tests that pytest collects in a file."""
    functions = [node for node in parsed(file).body if isinstance(node, ast.FunctionDef)]
    return {node.name: node for node in functions if node.name.startswith("test_")}


@cache
def lines_of(file: Path) -> list[str]:
    """The lines of a file."""
    return file.read_text(encoding="utf-8").splitlines()


def source(file: Path, node: ast.stmt | ast.expr) -> str:
    """The lines of a node: as :func:`ast.unparse`, which takes most of the time for long tables."""
    return "\n".join(lines_of(file)[node.lineno - 1 : node.end_lineno])


@cache
def outside(file: Path) -> tuple[str, dict[str, str]]:
    """The source of a file outside of functions and classes, and the names that it gives to marks."""
    nodes = [node for node in parsed(file).body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assigned = [node for node in nodes if isinstance(node, ast.Assign) and "pytest.mark" in source(file, node)]
    marks = {ast.unparse(node.targets[0]): ast.unparse(node.value) for node in assigned}
    return "\n".join(source(file, node) for node in nodes), marks


def skipped(file: Path, test: ast.FunctionDef) -> list[str]:
    """Reasons for which a test never runs: it is switched off, or needs a package that no extra installs."""
    statements, named = outside(file)
    marks = [source(file, mark) for mark in test.decorator_list]
    marks = [mark.strip().removeprefix("@") for mark in marks]
    marks = [named.get(mark, mark) for mark in [*marks, *(["pytestmark"] if "pytestmark" in named else [])]]
    reasons = [mark for mark in marks if re.match(r"pytest\.mark\.(skip|xfail)\b(?!if)", mark)]
    first = source(file, (test.body[1:] if ast.get_docstring(test) else test.body)[0]).strip()
    reasons += [first] if first.startswith("pytest.skip(") else []
    code = "\n".join([*marks, *(source(file, node) for node in test.body), statements])
    asked = set(re.findall(r"""(?:importorskip|find_spec)\(['"](\w+)['"]""", code))
    return reasons + sorted(asked - INSTALLED)


PROMISES = promises()


def test_every_page_that_promises_something_is_in_the_table() -> None:
    pages = {*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "recipes" / "README.md"}
    measured = {ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "results.md"}
    of_results = {*measured, ROOT / "docs" / "README.md", TABLE}  # an index, and what is measured
    of_code = {*ROOT.glob("docs/reference/*.md")}  # test_pages.py holds that they are current
    assert {page for page, *_ in PROMISES} == pages - of_results - of_code
    assert len({(page, sentence) for page, sentence, _ in PROMISES}) == len(PROMISES) > 200


@pytest.mark.parametrize("page", sorted({page for page, *_ in PROMISES}), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_sentence_stands_in_its_page(page: Path) -> None:
    text = words(page.read_text(encoding="utf-8"))
    missing = [sentence for where, sentence, _ in PROMISES if where == page and words(sentence) not in text]
    assert missing == [], "reword them in docs/guarantees.md too, and look whether their tests still hold them"


@pytest.mark.parametrize(
    ("page", "begin", "end"),
    [
        ("SECURITY.md", "## What is never executed", "## Supported versions"),
        ("docs/runs.md", "## The files of a run", "no heading: to the end of the page"),
        ("docs/reliability.md", "## Signals at any moment", "## "),
    ],
)
def test_every_bullet_has_a_row(page: str, begin: str, end: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8").partition(f"{begin}\n")[2].partition(f"\n{end}")[0]
    bullets = [words(bullet) for bullet in re.findall(r"^- (.+(?:\n  .+)*)", text, re.M)]
    assert len(bullets) == text.count("\n- ")
    promised = [words(sentence) for where, sentence, _ in PROMISES if where == ROOT / page]
    assert len(bullets) >= 5
    assert [bullet for bullet in bullets if not any(sentence in bullet for sentence in promised)] == []


def test_every_test_exists_and_runs_somewhere() -> None:
    wrong = []
    for _, sentence, tests in PROMISES:
        assert tests, sentence
        for test in tests:
            path, _, name = test.partition("::")
            file = ROOT / "tests" / path
            found = collected(file).get(f"test_{name}") if file.is_file() else None
            wrong += [f"{test}: no such test"] if found is None else [f"{test}: {r}" for r in skipped(file, found)]
    assert wrong == []


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        ("@pytest.mark.skip\ndef test_it(): pass", "pytest.mark.skip"),
        ("@pytest.mark.xfail(strict=True)\ndef test_it(): pass", "pytest.mark.xfail(strict=True)"),
        ("off = pytest.mark.skip(reason='x')\n@off\ndef test_it(): pass", "pytest.mark.skip(reason='x')"),
        ("pytestmark = pytest.mark.skip\ndef test_it(): pass", "pytest.mark.skip"),
        ("def test_it():\n    'It is.'\n    pytest.skip('later')", "pytest.skip('later')"),
        ("pytest.importorskip('nowhere')\ndef test_it(): pass", "nowhere"),
        ("def test_it():\n    pytest.importorskip('nowhere')", "nowhere"),
        ("pytest.importorskip('torchao')\ndef test_it(): pass", None),
        ("@pytest.mark.skipif(find_spec('llama_cpp') is None, reason='x')\ndef test_it(): pass", None),
    ],
)
def test_a_test_that_never_runs_is_found(test: str, reason: str | None, tmp_path: Path) -> None:
    file = tmp_path / "test_file.py"
    file.write_text(test)
    assert skipped(file, collected(file)["test_it"]) == ([] if reason is None else [reason])
