"""Exports in a run: measured in the engine that runs them, beside the teacher's own file in the same precision."""

from __future__ import annotations

import importlib.util
import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedModel

from distill.core.artifact import Artifact
from distill.core.errors import InputError, RecipeError
from distill.exporters.huggingface import HuggingFace
from distill.forecast import describe
from distill.recipe import Recipe
from distill.reporting.tradeoff import Row, read_rows
from distill.runner import run
from distill.stages.evaluate.measured_exports import FOLDER, ModelFile, _of_teacher

RECIPE = """\
name: tiny
teacher: {teacher}
data:
  train: {{kind: jsonl, path: {text}}}
  sequence_length: 16
  validation_tokens: 100
  calibration_sequences: 4
stages:
  prune: {{keep: {{intermediate_size: 32}}}}
  export: {{model: prune, target: {target}, verify_sequences: 1}}
  evaluate:
    models: [export]
    speed: {speed}
    tasks: {{last: {{kind: cloze, path: {text}, prompt: "{{text}}", answer: null, limit: 3}}}}
  report: {{prompts: [row], models: [export], new_tokens: 3}}
compute: {{accelerator: cpu}}
logging: {{wandb: disabled}}
"""


@pytest.fixture
def recipe_of(teacher: Path, text: Path) -> Any:
    def make(target: str, speed: str = "null") -> Recipe:
        return Recipe.from_text(RECIPE.format(teacher=teacher, text=text, target=target, speed=speed))

    return make


def test_an_export_is_measured_in_its_engine_beside_the_teacher_s_file(recipe_of: Any, tmp_path: Path) -> None:
    speed = "{prompt_tokens: 4, new_tokens: 2, repeats: 1, rounds: 1, contexts: [8], batch_sizes: [2]}"
    said: list[str] = []
    the_run = run(recipe_of("huggingface", speed), tmp_path / "run", say=said.append)
    export, beside = rows_of(tmp_path)
    assert (export.name, export.role, export.kind, export.parent) == ("export", "student", "export", "prune")
    assert (beside.name, beside.role, beside.parent) == ("teacher as safetensors", "control", "teacher")
    assert (export.baseline, beside.baseline) == (beside.name, None)
    assert (export.scheme, export.kernel, export.install) == ("safetensors", "real", None)
    folder = the_run.stage("export") / "tiny-prune"
    assert export.weight_bytes == (folder / "model.safetensors").stat().st_size
    (file,) = (the_run.stage("evaluate") / FOLDER).rglob("*.safetensors")
    assert beside.weight_bytes == file.stat().st_size > export.weight_bytes
    for row in (export, beside):
        assert [(p.batch, p.prompt_tokens) for p in row.speeds] == [(1, 4), (1, 8), (2, 4), (2, 8)]
        assert row.speeds[0].decode_tokens_per_s == row.decode_tokens_per_s > 0
        assert row.engine.startswith("transformers ")
    assert beside.kl_to_teacher == pytest.approx(0, abs=1e-6)
    assert export.kl_to_teacher > 0
    page = (the_run.stage("report") / "report.md").read_text()
    assert "## Speed and energy" in page
    assert "**export** (3 tokens, " in page
    verdict = the_run.done("report").figures["verdict"]
    assert "export: " in verdict
    assert "of the bytes of teacher as safetensors, which was rounded without training" in verdict
    scores = json.loads((the_run.stage("evaluate") / "tasks.json").read_text())
    assert [(pair["first"], pair["second"]) for pair in scores["pairs"]] == [("teacher as safetensors", "export")]


def test_what_is_measured_in_an_engine_is_what_the_model_is(recipe_of: Any, tmp_path: Path) -> None:
    text = recipe_of("huggingface").dump().replace("models:\n    - export\n    controls", "models: []\n    controls")
    run(Recipe.from_text(text), tmp_path / "run", say=lambda line: None)
    rows = {row.name: row for row in rows_of(tmp_path)}
    assert list(rows) == ["teacher", "prune", "export", "teacher as safetensors"]
    for one, other in (("prune", "export"), ("teacher", "teacher as safetensors")):
        assert rows[one].perplexity == pytest.approx(rows[other].perplexity, rel=1e-5)
        assert rows[one].kl_to_teacher == pytest.approx(rows[other].kl_to_teacher, abs=1e-6)


def test_a_teacher_s_file_that_is_not_whole_is_made_again(teacher: Path, tmp_path: Path) -> None:
    """As an evaluate stage may find it that was interrupted after it had written the file."""

    class Target(HuggingFace):
        def post_training(self, folder: Path) -> Target:
            return self

        def export(self, source: Path, folder: Path, *, title: str) -> list[str]:
            exported.append(title)
            (folder / "weights").write_bytes(b"12345678")
            return []

        def label(self, folder: Path) -> str:
            return "F16"

    exported: list[str] = []
    session = SimpleNamespace(artifact=lambda name: Artifact(name, str(teacher)))
    context: Any = SimpleNamespace(folder=tmp_path, session=session, say=lambda line: None)

    def made() -> Path:
        one = ModelFile("export", "prune", Target(), tmp_path, "F16", "student")
        found = _of_teacher(context, one, "teacher", "")
        assert found is not None
        return found.folder / "weights"

    file = made()
    assert made() == file
    assert len(exported) == 1, "what is whole is left as it is"
    file.write_bytes(b"1234")
    assert made().read_bytes() == b"12345678"
    file.unlink()
    assert made().read_bytes() == b"12345678"
    assert len(exported) == 3


def test_a_missing_engine_is_a_command_in_the_cell_and_measured_once_it_is_there(
    recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf", reason="the gguf package is not installed: pip install 'distill-lm[test]'")
    find = importlib.util.find_spec
    for module in ("distill.exporters.base", "distill.stages.evaluate.spec"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None if name == "llama_cpp" else find(name))
    recipe, said = recipe_of("{kind: gguf, round_to: q8_0}"), list[str]()
    the_run = run(recipe, tmp_path / "run", say=said.append)
    command = "CMAKE_ARGS=-DGGML_NATIVE=OFF pip install 'distill-lm[gguf]'"
    (row,) = rows_of(tmp_path)
    assert (row.install, row.engine, row.perplexity) == (command, None, None)
    assert row.weight_bytes == next((the_run.stage("export") / "tiny-prune").glob("*.gguf")).stat().st_size
    assert f"  export                   GGUF Q8_0, not measured: its engine is not installed: {command}" in said
    assert command in (the_run.stage("report") / "report.md").read_text()
    monkeypatch.setattr("distill.stages.evaluate.spec.find_spec", lambda name: object())
    assert recipe.stages["evaluate"].outdated(the_run.done("evaluate").figures) == (
        "made again, as llama_cpp is installed now"
    )


def test_only_stages_that_read_files_may_name_an_export(recipe_of: Any) -> None:
    text = recipe_of("huggingface").dump()
    describe(Recipe.from_text(text))
    with pytest.raises(RecipeError, match="'export' is of kind export, which makes no model"):
        Recipe.from_text(text.replace("teacher: teacher\n", "teacher: export\n"))


def test_an_export_that_was_edited_is_not_measured(recipe_of: Any, tmp_path: Path) -> None:
    recipe = recipe_of("huggingface")
    the_run = run(recipe, tmp_path / "run", only="prune", say=lambda line: None)
    run(recipe, tmp_path / "run", only="export", say=lambda line: None)
    file = the_run.stage("export") / "tiny-prune" / "config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(InputError, match=r"config\.json"):
        run(recipe, tmp_path / "run", only="evaluate", say=lambda line: None)


def test_no_model_outlives_its_stage(recipe_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among them the teacher of a training: the next stage, and the processes that measure, have its memory."""
    recipe = recipe_of("huggingface").dump().replace("  export:\n", f"  distill: {DISTILL}\n  export:\n", 1)
    alive: list[weakref.ref[PreTrainedModel]] = []
    made, seen = PreTrainedModel.__init__, dict[str, int]()

    def init(self: PreTrainedModel, *given: Any, **named: Any) -> None:
        made(self, *given, **named)
        alive.append(weakref.ref(self))

    def say(line: str) -> None:
        if line.startswith("["):
            seen[line] = sum(one() is not None for one in alive)

    monkeypatch.setattr(PreTrainedModel, "__init__", init)
    run(Recipe.from_text(recipe), tmp_path / "run", say=say)
    assert len(alive) > 5
    assert seen == dict.fromkeys(seen, 0)


DISTILL = "{kind: distill, student: prune, teacher: teacher, num_steps: 1, batch_size: 2}"


def rows_of(tmp_path: Path) -> list[Row]:
    return read_rows(tmp_path / "run" / "evaluate" / "rows.json")
