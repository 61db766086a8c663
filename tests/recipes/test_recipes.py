"""Every recipe that is shipped: it reads well, means what it says, and runs from end to end on a tiny twin."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.forecast import describe
from distill.models.layouts import layout_of
from distill.recipe import Recipe
from distill.runner import run

FOLDER = Path(__file__).parents[2] / "recipes"
FILES = sorted(FOLDER.rglob("*.yaml"))
HEAVY = ("torch", "transformers", "datasets", "lightning", "pytorch_lightning", "peft", "wandb")

VARIANTS = {file.stem for file in FILES if file.stem.endswith("-control")} | {
    "add-knowledge",
    "cached-teacher",
    "chat",
    "csv-columns",
    "distilbert-style",
    "iterative",
    "llama-3.1-8b-to-4b-depth",
    "minilm-embeddings",
    "mistral-nemo-12b-to-8b",
    "quickstart-on-policy",
    "sequence-distillation",
    "smollm2-1.7b-to-1b",
    "sst2-minilm-3-layers",
    "tasks",
    "trec-minilm-3-layers",
}
"""Recipes that differ from another one in few keys, or whose stages others run too; ``make test-all`` runs them."""

MARKS = dict.fromkeys(VARIANTS, pytest.mark.exhaustive) | {"quickstart": pytest.mark.plots}

each = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


TRAINED = {"finetune", "distill", "quantize"}
"""Kinds of stages whose plan has memory and tokens."""


MEMORY = r" memory of a \w+.*: [\d.]+ [MG]B = |its config is not on this machine"


def kinds_of(file: Path) -> list[str]:
    return [stage.kind for stage in Recipe.load(file).stages.values()]


def test_there_are_recipes_and_the_readme_lists_each() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(FILES) >= 8
    assert [file.name for file in FILES if f"({file.name})" not in readme] == []


@each
def test_fits_a_page_and_says_how_to_run_it(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 120
    assert lines[0] == f"# distill run recipes/{file.relative_to(FOLDER).as_posix()}"
    assert lines[1].startswith("# ")
    assert lines[1].endswith(".")
    assert f"name: {file.stem}" in lines


@each
def test_the_resolved_recipe_is_the_same_recipe(file: Path) -> None:
    recipe = Recipe.load(file)
    again = Recipe.from_text(recipe.dump())
    assert again == recipe
    assert again.dump() == recipe.dump()


def test_check_passes_and_imports_nothing_heavy() -> None:
    code = (
        "import json, sys\n"
        "from distill.cli import main\n"
        "codes = {}\n"
        "for file in sys.argv[1:]:\n"
        "    print('recipe', file, flush=True)\n"
        "    sys.argv = ['distill', 'check', file]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as exit_:\n"
        "        codes[file] = exit_.code\n"
        f"print(json.dumps([codes, [name for name in {HEAVY} if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, FILES)], capture_output=True, text=True, check=True)
    codes, imported = json.loads(done.stdout.splitlines()[-1])
    assert codes == {str(file): 0 for file in FILES}
    assert imported == []
    plans = re.split(r"^recipe .*\n", done.stdout, flags=re.M)[1:]
    assert len(plans) == len(FILES)
    trained = [plan for plan, file in zip(plans, FILES, strict=True) if TRAINED & {*kinds_of(file)}]
    assert len(trained) > len(FILES) - 3
    assert [plan for plan in trained if not re.search(MEMORY, plan)] == []
    assert [plan for plan in trained if not re.search(r"^ +\[\d+/\d+\] .*\d (tokens|epochs?)\b", plan, re.M)] == []


PUBLISHED = {
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "google-bert/bert-base-uncased": 109_514_298,
    "sentence-transformers/all-MiniLM-L6-v2": 22_713_216,
}
"""Parameters as the models' own pages on the Hub count them; they vouch for the configs of these tests."""

STUDENTS = {
    "llama-3.1-8b-to-4b-width": "4.51B",
    "llama-3.1-8b-to-4b-depth": "4.54B",
    "mistral-nemo-12b-to-8b": "8.41B",
    "smollm2-1.7b-to-1b": "1.00B",
    "cross-entropy-control": "243.86M",
    "chat-smollm2": "107.97M",
    "hidden-states-control": "204.50M",
}


@pytest.mark.parametrize("reference", PUBLISHED)
def test_the_real_teachers_have_the_published_size(reference: str, real_config: Callable[[str], Path]) -> None:
    config = json.loads((real_config(reference) / "config.json").read_text())
    assert layout_of(config).count(config) == PUBLISHED[reference]


@pytest.mark.parametrize("name", STUDENTS)
def test_the_real_student_is_as_large_as_the_recipe_says(name: str, real_config: Callable[[str], Path]) -> None:
    file = FOLDER / f"{name}.yaml"
    teacher = Recipe.load(file).teacher
    plan = describe(Recipe.load(file, set=[f"teacher={real_config(str(teacher))}"]))
    line = next(line for line in plan.splitlines() if "] prune:" in line)
    assert f"makes {STUDENTS[name]} parameters (" in line
    assert line.endswith("B to cut, after scoring)")


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=MARKS.get(file.stem, ())) for file in FILES],
    ids=lambda file: file.stem,
)
def test_runs_from_end_to_end(
    file: Path, shrink: Callable[[Path], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from distill.models.head_names import loader_of

    recipe = Recipe.load(file, set=shrink(file))
    targets = {name: stage.target.kind for name, stage in recipe.stages.items() if stage.kind == "export"}
    if "gguf" in targets.values():
        pytest.importorskip("gguf", reason="the gguf package is not installed: pip install 'distill-lm[test]'")
    if "onnx" in targets.values():
        pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'distill-lm[test]'")
    hosts: list[str] = []
    monkeypatch.setattr("socket.getaddrinfo", lambda host, *given, **named: hosts.append(host) or [])
    said: list[str] = []
    the_run = run(recipe, tmp_path / "run", say=said.append)
    assert hosts == []
    assert [name for name in recipe.stages if the_run.done(name) is None] == []
    for name, stage in recipe.stages.items():
        if stage.kind == "export":
            folder = the_run.stage(name) / the_run.done(name).figures["folder"]  # type: ignore[union-attr]
            if targets[name] == "onnx":
                assert (folder / "model.onnx").is_file()
                continue
            packed = {"gguf_file": next(folder.glob("*.gguf")).name} if targets[name] == "gguf" else {}
            model = loader_of(recipe.task.head).from_pretrained(folder, **packed)
            with torch.no_grad():
                assert model(input_ids=torch.arange(8)[None])[0].isfinite().all()
        elif stage.makes_model:
            assert (the_run.stage(name) / "model" / "model.safetensors").is_file()

    said.clear()
    run(recipe, tmp_path / "run", say=said.append)
    assert len([line for line in said if "finished before" in line]) == len(recipe.stages)


def test_the_quickstart_can_end_in_a_gguf(shrink: Callable[[Path], list[str]], tmp_path: Path) -> None:
    """As the README says: another target, and the stages before it are not run again."""
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed: pip install 'distill-lm[test]'")
    file = FOLDER / "quickstart.yaml"
    said: list[str] = []
    for target in ("huggingface", "gguf"):
        said.clear()
        recipe = Recipe.load(file, set=[*shrink(file), f"stages.export.target={target}"])
        the_run = run(recipe, tmp_path / "run", say=said.append)
    lines = [line for line in said if line.startswith("[") and "finished" not in line]
    started = [line.split("]")[1].split()[0].rstrip(":") for line in lines]
    assert started == ["export", "report"], said
    figures = the_run.done("export").figures  # type: ignore[union-attr]
    (written,) = (the_run.stage("export") / figures["folder"]).glob("*.gguf")
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(written).tensors}
    assert kinds == {"F32", "Q8_0", "Q4_0"}  # norms, embeddings and head, layers
    # the student's codes are compared in llama.cpp where it is installed, and the stage says so where it is not
    assert figures.get("worst_kl", 0.0) < 0.05
    assert ("worst_kl" in figures) != ("unverified" in figures)
