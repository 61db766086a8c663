"""What an installation brings: imported packages are declared, models and recipes come along, make explains."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import distill
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
    optional = declared("gguf", "gpu", "lm-eval", "onnx", "pdf", "torchao") - declared()
    brought = {"lightning-fabric", "pyarrow", "pydantic-core", "typing-extensions"}  # by lightning, datasets, pydantic
    undeclared = {name: file for name, file in imported().items() if name not in declared() | optional | brought}
    assert undeclared == {}
    asking = ("distill/exporters/", "distill/evaluation/tasks/harness.py", "distill/data/documents.py")
    needed = {name for name, file in imported().items() if not file.startswith(asking)}
    assert needed & optional == {"nvidia-ml-py"}, "exporters, the harness and PDF ask for an extra, and what reads GPUs"
    assert packages_distributions().keys() >= {"torch", "transformers"}


def test_models_and_recipes_come_with_the_package() -> None:
    assert load_model("builtin:quickstart-teacher").num_parameters() == 1_443_456
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"] == {"packages": ["distill"], "force-include": {"recipes": "distill/_recipes"}}
    assert (ROOT / "distill" / "assets").is_dir()
    assert Path(recipes.find("quickstart")).is_file()


def test_the_wheel_works_outside_of_a_checkout(tmp_path: Path) -> None:
    """`make release` also installs it into an empty environment and runs the quickstart."""
    builders = pytest.importorskip(
        "hatchling.builders.wheel", reason="hatchling is not installed: pip install 'distill-lm[test]'"
    )
    wheel = next(builders.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    assert Path(wheel).name == f"distill_lm-{distill.__version__}-py3-none-any.whl"
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert {file.name for file in site.iterdir()} == {"distill", f"distill_lm-{distill.__version__}.dist-info"}
    (points,) = site.glob("*.dist-info/entry_points.txt")
    assert "distill = distill.__main__:main" in points.read_text()
    code = "import distill; print(distill.__file__)\nfrom distill.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "check", "quickstart"],
        capture_output=True,
        text=True,
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{site / 'distill' / '__init__.py'}\n")
    assert "[10/10] report" in done.stdout


def test_the_version_is_the_same_everywhere() -> None:
    assert PROJECT["version"] == distill.__version__
    assert f"version: {distill.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {distill.__version__} - 20" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    named = set(re.findall(r"[\w-]+", everything.partition("[")[2]))
    assert named == set(extras) - {"all", "test", "lint", "docs", "release", "notebooks"}


def test_images_are_built_of_files_that_are_there() -> None:
    for name in ("Dockerfile", "Dockerfile.cuda"):
        lines = re.sub(r"\\\n\s*", " ", (ROOT / name).read_text(encoding="utf-8")).splitlines()
        words = [line.split(maxsplit=1)[0] for line in lines if line and not line.startswith("#")]
        assert set(words) <= {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
        assert words[0] == "FROM"
        assert words.index("USER") > words.index("RUN")
        copied = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
        assert copied
        assert [source for source in copied if not (ROOT / source).exists()] == []


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
