"""A stage, a loss and a source are added as one file and one line each; all that knows of parts then knows of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distill.models.configs import config_of, count

ROOT = Path(__file__).parents[1]
TEMPLATES = Path(__file__).with_name("templates")
FOLDERS = {"stage": "stages", "loss": "losses", "source": "data"}
ADDED = {"stage": "count_parameters", "loss": "squared_distance", "source": "paragraphs"}
FORMULA = "lambda loss, student, teacher, *_: 0.5 * ((_softmax(teacher) - _softmax(student)) ** 2).sum(-1)"
"""What the contract tests compare the new loss with."""

PASSED = (
    "test_every_stage.py::test_runs_and_says_before_what_it_will_do[count_parameters]",
    "test_every_loss.py::test_every_loss_has_a_reference",
    "test_every_loss.py::test_gradient_is_that_of_the_float64_reference[squared_distance]",
    "test_every_loss.py::test_gradient_is_that_of_the_float64_reference[squared_distance-closed]",
    "test_names.py::test_kind_file_and_class_agree[sources-paragraphs]",
    "test_names.py::test_every_field_is_explained[CountParameters]",
    "test_schema_current.py::test_is_current",
)

RECIPE = """\
name: parts
teacher: builtin:quickstart-teacher
data: {train: {kind: paragraphs, path: text.txt}, sequence_length: 16}
stages:
  count_parameters: {}
  student: {kind: distill, student: teacher, num_steps: 2, batch_size: 2, losses: [squared_distance]}
compute: {accelerator: cpu}
logging: {wandb: disabled}
"""


def add(root: Path, part: str, kind: str) -> None:
    """Copy a template into a checkout under the name of a new part, and import it where its folder lists its parts."""
    words = {f"template_{part}": kind, f"Template{part.title()}": kind.title().replace("_", "")}
    text = (TEMPLATES / f"{part}.py").read_text(encoding="utf-8")
    for old, new in words.items():
        text = text.replace(old, new)
    folder = root / "distill" / FOLDERS[part]
    (folder / f"{kind}.py").write_text(text, encoding="utf-8")
    names = [kind.title().replace("_", ""), *([kind] if part == "loss" else [])]  # a loss is a function as well
    line = f"from distill.{FOLDERS[part]}.{kind} import {', '.join(names)}"
    listed, count = re.subn(r"\n\n([A-Z]+ = Family)", rf"\n{line}\n\n\1", (folder / "__init__.py").read_text(), count=1)
    assert count == 1
    (folder / "__init__.py").write_text(listed)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and its tests with three parts more."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("distill", "recipes", "tests/contracts"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "tests/conftest.py", "tests/test_names.py", "tests/test_schema_current.py"):
        shutil.copyfile(ROOT / name, root / name)
    for part, kind in ADDED.items():
        add(root, part, kind)
    contract = root / "tests" / "contracts" / "test_every_loss.py"
    line = f'REFERENCES["{ADDED["loss"]}"] = {FORMULA}\n\nSETTINGS:'
    contract.write_text(contract.read_text(encoding="utf-8").replace("SETTINGS:", line, 1), encoding="utf-8")
    (root / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (root / "text.txt").write_text("\n\n".join(f"Paragraph {i} of a text." for i in range(200)), encoding="utf-8")
    return root


def call(checkout: Path, *arguments: str) -> str:
    """What a module of the copy prints; it must end well."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_list_shows_them(checkout: Path) -> None:
    shown = call(checkout, "distill", "list")
    assert re.search(r"^  count_parameters +Count the parameters of a model\.$", shown, re.MULTILINE)
    assert re.search(
        r"^  squared_distance +Half of the squared distance between the probabilities\.$", shown, re.MULTILINE
    )
    assert re.search(r"^  paragraphs +The paragraphs of a text file\.$", shown, re.MULTILINE)


def test_a_recipe_takes_them_and_check_tells_their_plan(checkout: Path) -> None:
    plan = call(checkout, "distill", "check", "recipe.yaml")
    assert "data paragraphs, rows of 16 tokens" in plan
    assert "[1/2] count_parameters: reads teacher; counts its parameters\n" in plan
    assert "64 tokens = 2 steps of 2 x 16; squared_distance; makes 1.44M parameters\n" in plan


def test_the_schema_and_the_contract_tests_know_them(checkout: Path) -> None:
    call(checkout, "distill", "schema", "recipes/recipe.schema.json")
    schema = json.loads((checkout / "recipes" / "recipe.schema.json").read_text(encoding="utf-8"))
    assert {"CountParameters", "SquaredDistance", "Paragraphs"} <= schema["$defs"].keys()
    assert "count_parameters" in schema["properties"]["stages"]["properties"]
    files = ("tests/contracts/test_every_stage.py", "tests/contracts/test_every_loss.py", "tests/test_names.py")
    ours = "reference and squared or has_a_reference or is_current or CountParameters or count_parameters or paragraphs"
    said = call(checkout, "pytest", *files, "tests/test_schema_current.py", "-k", ours, "-p", "no:cacheprovider", "-vv")
    for name in PASSED:
        assert f"{name} PASSED" in said


def test_a_new_stage_runs(checkout: Path) -> None:
    call(checkout, "distill", "run", "recipe.yaml", "--only", "count_parameters", "--run-dir", "run")
    found = json.loads((checkout / "run" / "count_parameters" / "parameters.json").read_text(encoding="utf-8"))
    assert found == {"parameters": count(config_of("builtin:quickstart-teacher"))}
