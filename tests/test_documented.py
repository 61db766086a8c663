"""Code in the documentation: commands and options exist, Python compiles and imports what there is, recipes hold."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

import distill
from distill.cli import app
from distill.core.errors import RecipeError
from distill.recipe import Recipe
from distill.recipes import shipped

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "recipes" / "README.md", ROOT / "benchmarks" / "README.md"]
)
EXECUTED = {"docs/python.md"}
"""Pages whose Python a test executes (test_python_api.py)."""
SHELL = ("", "sh", "bash", "console")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    reason: str
    """Why it is not executed, as the comment above it says: <!-- not executed: REASON -->."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> Iterator[Block]:
    """Every fenced block of every page."""
    fence = re.compile(r"(?:<!-- not executed: ([^>]+?) -->\n)?^( *)```(\w*)\n(.*?)^\2```", re.M | re.S)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in fence.finditer(text):
            line = text[: found.start(4)].count("\n") + 1
            yield Block(page.relative_to(ROOT).as_posix(), line, found[3], found[4], found[1] or "")


BLOCKS = list(blocks())
PYTHON = [block for block in BLOCKS if block.language in ("python", "py")]
COMMANDS = [
    (block, command)
    for block in BLOCKS
    if block.language in SHELL
    for command in re.sub(r"\\\n\s*", " ", block.text).splitlines()
    if re.search(r"(?:^|[\s/$])distill (?=\w)", command) and not command.lstrip().startswith("#")
]


@cache
def commands() -> dict[str, Any]:
    """Command -> what typer knows of it, such as "cache info"."""
    found: dict[str, Any] = {}

    def walk(group: Any, path: str) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                walk(command, f"{path}{name} ")
            else:
                found[f"{path}{name}"] = command

    walk(typer.main.get_command(app), "")
    return found


def test_there_is_something_to_test() -> None:
    assert len(PYTHON) > 2
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_compiles_and_imports_what_there_is(block: Block) -> None:
    tree = ast.parse(block.text.replace("...)", ")"), str(block))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [(str(node.module), alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "distill":
            assert node.attr in distill.__all__, f"distill.{node.attr}"
            continue
        else:
            continue
        for module, name in modules:
            if module.split(".")[0] != "distill":
                continue
            assert find_spec(module) is not None, module
            if name is not None and module != "distill":
                source = Path(str(find_spec(module).origin)).read_text(encoding="utf-8")  # type: ignore[union-attr]
                assert re.search(rf"\b{name}\b", source), f"{module} has no {name}"
    assert block.page in EXECUTED or len(tree.body) == 0 or block.reason or not _runs_alone(tree), (
        f"{block}: add its page to EXECUTED with a test, or say <!-- not executed: REASON --> above it"
    )


def _runs_alone(tree: ast.Module) -> bool:
    """Whether a block looks like a program, and not like a fragment: it imports distill and calls something."""
    imports = any(isinstance(node, ast.Import) and node.names[0].name == "distill" for node in ast.walk(tree))
    return imports and any(isinstance(node, ast.Call) for node in ast.walk(tree))


@pytest.mark.parametrize(("block", "command"), COMMANDS, ids=[f"{b}-{i}" for i, (b, _) in enumerate(COMMANDS)])
def test_commands_exist_with_their_options(block: Block, command: str) -> None:
    text = re.search(r"(?:^|[\s/$])distill (.*)$", re.sub(r"\s#.*$", "", command))
    assert text is not None
    words = shlex.split(text[1].partition(" | ")[0].partition(" && ")[0].rstrip(";"))
    if words[0].startswith("--"):
        assert words[0] in ("--version", "--help", "--install-completion", "--show-completion"), words[0]
        return
    name = " ".join(words[:2]) if " ".join(words[:2]) in commands() else words[0]
    assert name in commands(), f"{block}: distill {name}"
    options = {
        option for parameter in commands()[name].params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    used = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert used <= options | {"--help"}, f"{block}: distill {name} has no {', '.join(sorted(used - options))}"
    named = next((word for word in words[1:] if word.endswith(".yaml")), None)
    if name in ("run", "check") and named is not None and named.startswith("recipes/") and "$" not in named:
        assert Path(named).stem in [*shipped(), "NAME"], f"{block}: {named}"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=str)
def test_recipes_in_pages_are_valid(block: Block) -> None:
    """Whole recipes validate; a part of one is at least YAML without tabs or doubled keys."""
    held = yaml.safe_load(block.text)
    if isinstance(held, dict) and {"name", "data", "stages"} <= held.keys():
        try:
            Recipe.from_text(block.text, str(block))
        except RecipeError as error:
            pytest.fail("\n".join(error.mistakes))
