"""What tiny runs compute is what was recorded: a refactoring changes not a bit, on a machine that computes alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.identity import RECORD, arithmetic, differences, figures
from benchmarks.identity_recipes import MODELS, RECIPES, as_yaml, write_text_files
from distill.recipe import Recipe
from distill.runner import run

TOLERANCE = 2e-5
"""Relative, where the machine computes otherwise: ten times the largest difference of any figure between AVX-512, AVX2
and no vector instructions (2.5e-6)."""
TOLERANCES = {"bf16": 4e-3, "cached-teacher": 0.1, "quantize": 0.1}
"""Ten times the largest difference in bf16 (4e-4); and what one other draw of a sampled cache or one other code of a
weight makes of so small a model (3e-2), as a last bit can turn both."""


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the text and the models, where one thread computes."""
    folder = tmp_path_factory.mktemp("identity")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    write_text_files(folder)
    _run(MODELS, folder)
    yield folder
    torch.set_num_threads(num_threads)


def _run(name: str, place: Path) -> None:
    file = place / f"{name}.yaml"
    if not file.exists():
        file.write_text(as_yaml(name, place, place / MODELS), encoding="utf-8")
        run(Recipe.load(file), place / name, say=lambda _: None)


def test_every_recipe_is_recorded(recorded: dict[str, Any]) -> None:
    assert recorded["figures"].keys() == RECIPES.keys(), "run `python -m benchmarks.identity --record`"


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_computes_what_was_recorded(name: str, place: Path, recorded: dict[str, Any]) -> None:
    """Where a change is meant: `python -m benchmarks.identity --base REVISION` shows it, and `--record` writes it."""
    _run(name, place)
    exact = arithmetic() == recorded["arithmetic"]
    assert (
        differences(
            recorded["figures"][name], figures(place / name), None if exact else TOLERANCES.get(name, TOLERANCE)
        )
        == []
    )


def test_a_difference_is_found_and_the_largest_comes_first() -> None:
    expected = {"loss": 2.0, "kl": 1.0, "weights": "ab", "gone": 1.0}
    found = {"loss": 2.0000001, "kl": 1.1, "weights": "ac"}
    lines = differences(expected, found)
    assert [line.split()[0].rstrip(":") for line in lines] == ["gone", "kl", "loss", "weights"]
    assert differences(expected, expected) == []
    close = {name: value for name, value in expected.items() if name != "gone"}
    assert [line.split(":")[0] for line in differences(close, found, 1e-3)] == ["kl"]
    assert differences({"loss": float("nan")}, {"loss": float("nan")}) == []
    assert differences({"loss": float("nan")}, {"loss": 1.0}, 1e-3) != []
