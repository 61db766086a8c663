"""What an installation brings: imported packages are declared, models and recipes come along, make explains."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from distill import recipes
from distill.models.load import load_model

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORTED = {"yaml": "pyyaml", "llama_cpp": "llama-cpp-python", "pynvml": "nvidia-ml-py"}
"""Names of modules that are not those of their packages."""


def declared(*extras: str) -> set[str]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {re.split(r"[\[<>=]", line)[0].replace("_", "-") for line in lines}


def imported() -> dict[str, str]:
    """Package -> a file of distill's that imports it."""
    found = {}
    for file in sorted((ROOT / "distill").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for top in {name.split(".")[0] for name in names} - {"distill", *sys.stdlib_module_names}:
                found[IMPORTED.get(top, top).replace("_", "-")] = file.relative_to(ROOT).as_posix()
    return found


def test_every_package_that_is_imported_is_declared() -> None:
    optional = declared("gguf", "gpu", "lm-eval", "onnx", "torchao") - declared()
    brought = {"lightning-fabric", "pyarrow", "pydantic-core", "typing-extensions"}  # by lightning, datasets, pydantic
    undeclared = {name: file for name, file in imported().items() if name not in declared() | optional | brought}
    assert undeclared == {}
    asking = ("distill/exporters/", "distill/evaluation/tasks/harness.py")
    needed = {name for name, file in imported().items() if not file.startswith(asking)}
    assert needed & optional == {"nvidia-ml-py"}, "only exporters and the harness ask for an extra, and what reads GPUs"
    assert packages_distributions().keys() >= {"torch", "transformers"}


def test_models_and_recipes_come_with_the_package() -> None:
    assert load_model("builtin:quickstart-teacher").num_parameters() == 1_443_456
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"] == {"packages": ["distill"], "force-include": {"recipes": "distill/_recipes"}}
    assert (ROOT / "distill" / "assets").is_dir()
    assert Path(recipes.find("quickstart")).is_file()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_names_the_python_that_it_needs_and_takes_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, as_old = tmp_path / "python3.10", "import sys; sys.version_info = (3, 10); exec(sys.argv[1])"
    old.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{as_old}' \"$2\"\n")
    old.chmod(0o755)
    monkeypatch.delenv("MAKELEVEL", raising=False)  # a make within a make says more
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    make = ["make", "-f", str(ROOT / "Makefile"), f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run([*make, "quickstart", f"PYTHON={old}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert done.stderr.startswith("distill needs Python 3.11 or newer; try make PYTHON=python3.12\n")
    assert not (tmp_path / "venv").exists()
    assert PROJECT["requires-python"] == ">=3.11"
    index = "TORCH_INDEX=https://download.pytorch.org/whl/cpu"
    done = subprocess.run([*make, "-n", "quickstart", index], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "--extra-index-url https://download.pytorch.org/whl/cpu -e ." in done.stdout
    assert done.stdout.rstrip().endswith("distill run recipes/quickstart.yaml")
