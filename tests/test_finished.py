"""What finished stages left is believed by its content: damage is made again, what may be an edit is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.api.open_run import open_run
from distill.compare import answer_prompts, report_runs
from distill.core.errors import InputError
from distill.recipe import Recipe
from distill.runner import run
from tests.stages.conftest import make_teacher

RECIPE = """\
name: kept
teacher: {teacher}
data: {{train: {{kind: jsonl, path: {text}}}, sequence_length: 16, validation_tokens: 60, calibration_sequences: 4}}
stages:
  base: {{kind: prune, keep: {{intermediate_size: 32}}}}
  student: {{kind: distill, student: base, num_steps: 1, batch_size: 2}}
  evaluate: {{speed: null}}
  export: {{model: student}}
  report: {{prompts: []}}
compute: {{accelerator: cpu}}
logging: {{wandb: disabled}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    place = tmp_path_factory.mktemp("recipe")
    rows = [{"text": f"row {i} of the text that a small model reads, and {i * i} more words"} for i in range(40)]
    (place / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Recipe.from_text(RECIPE.format(teacher=make_teacher(place / "model", seed=0), text=place / "text.jsonl"))


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(recipe, tmp_path_factory.mktemp("finished") / "run", say=lambda line: None).folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A finished run to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def flip(file: Path) -> None:
    """Change one bit; the size and the time of writing stay."""
    content, status = bytearray(file.read_bytes()), file.stat()
    content[-9] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def edit(file: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def said_by(recipe: Recipe, folder: Path, **options: Any) -> list[str]:
    said: list[str] = []
    run(recipe, folder, say=said.append, **options)
    return said


def rope(config: dict[str, Any]) -> None:
    config["rope_parameters"]["rope_theta"] = 90000.0


def test_a_finished_run_is_skipped_and_left_alone(recipe: Recipe, folder: Path) -> None:
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}
    said = said_by(recipe, folder)
    assert sum("finished before" in line for line in said) == 5
    assert not [line for line in said if "changed since" in line]
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize("start", ["export", None])
def test_damaged_weights_are_made_again(recipe: Recipe, folder: Path, start: str | None) -> None:
    """One flipped bit: an export would have been verified against it."""
    weights = folder / "student" / "model" / "model.safetensors"
    whole = weights.read_bytes()
    flip(weights)
    if start is None:
        os.utime(weights)  # nobody reads the model then, so it is looked at because it was written to
    damaged = weights.read_bytes()
    said = said_by(recipe, folder, start=start)
    (line,) = [line for line in said if "[2/5] student (distill): " in line]
    assert f"{weights}: is not what stage student made (SHA-256 " in line
    assert "what is left of it is now student.old-1" in line
    assert weights.read_bytes() == whole
    assert (folder / "student.old-1" / "model" / "model.safetensors").read_bytes() == damaged
    assert next((folder / "export").rglob("model.safetensors")).read_bytes() == whole
    assert sum("finished before" in line for line in said) == 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", rope),
        ("tokenizer.json", lambda content: content["model"]["merges"].pop()),
        ("distill.json", lambda content: content.update(parent="elsewhere")),
    ],
    ids=["rope_theta", "tokenizer", "lineage"],
)
def test_what_may_be_an_edit_is_refused(recipe: Recipe, folder: Path, name: str, change: Callable[[Any], None]) -> None:
    file = folder / "base" / "model" / name
    edit(file, change)
    edited = file.read_bytes()
    expected = rf"^{file}: is not what stage base made \(.*\); put it back, or run the stage again by --from base$"
    for start in ("student", "evaluate"):
        with pytest.raises(InputError, match=expected):
            run(recipe, folder, start=start)
    assert file.read_bytes() == edited
    assert (folder / "report" / "DONE").exists()  # nothing was begun
    with pytest.raises(InputError, match=expected):
        run(recipe, folder, only="student")
    with pytest.raises(InputError, match=expected):
        answer_prompts(folder, ["row"], new_tokens=1)
    said = said_by(recipe, folder)
    assert [line for line in said if "base (prune): finished before" in line and f"changed since: model/{name}" in line]


def test_a_file_that_was_added_to_a_model_is_refused(recipe: Recipe, folder: Path) -> None:
    (folder / "base" / "model" / ".DS_Store").write_bytes(b"of no one's interest")
    added = folder / "base" / "model" / "adapter_config.json"
    added.write_text("{}")
    with pytest.raises(InputError, match=f"{added}: is not of stage base, .*; take it away, or run the stage again"):
        run(recipe, folder, start="student")
    said = said_by(recipe, folder)
    assert [line for line in said if "changed since: model/adapter_config.json" in line]


def test_an_edited_copy_that_the_recipe_names_is_gone_on_with(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(folder / "base" / "model", tmp_path / "mine"))
    edit(mine / "config.json", rope)
    student = recipe.stages["student"].model_copy(update={"student": str(mine)})
    other = recipe.model_copy(update={"stages": {"student": student}})
    run(other, tmp_path / "other", say=lambda line: None)
    config = json.loads((tmp_path / "other" / "student" / "model" / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 90000.0


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_damaged_model_of_another_run_is_refused(recipe: Recipe, folder: Path, tmp_path: Path, when: str) -> None:
    file = folder / "base" / "model" / "model.safetensors"
    student = recipe.stages["student"].model_copy(update={"student": str(folder / "base")})
    other = recipe.model_copy(update={"stages": {"student": student}})
    if when == "before":
        flip(file)
    with pytest.raises(InputError, match=f"{file}: is not what stage base made"):
        run(other, tmp_path / "other", say=lambda line: flip(file) if "student (distill)" in line else None)
    assert not (tmp_path / "other" / "student" / "DONE").exists()


def test_a_damaged_model_is_not_handed_out(recipe: Recipe, folder: Path) -> None:
    model = folder / "base" / "model"
    assert open_run(folder).model("base") == model
    flip(model / "model.safetensors")
    with pytest.raises(InputError, match="is not what stage base made"):
        open_run(folder).model("base")


def test_what_changes_while_a_run_goes_on_is_seen_too(recipe: Recipe, folder: Path) -> None:
    file = folder / "base" / "model" / "model.safetensors"

    def say(line: str) -> None:
        if "student (distill)" in line:
            flip(file)

    with pytest.raises(InputError, match=f"{file}: is not what stage base made"):
        run(recipe, folder, start="student", say=say)


def test_an_edited_plan_says_nothing_of_where_channels_were(recipe: Recipe, folder: Path) -> None:
    file = folder / "base" / "plan.json"
    edit(file, lambda plan: plan["hidden_channels"].reverse())
    with pytest.raises(InputError, match=f"stages.student: {file}: is not what stage base made"):
        run(recipe, folder, start="student")


def test_an_edited_row_is_not_reported(recipe: Recipe, folder: Path) -> None:
    file = folder / "evaluate" / "rows.json"
    edit(file, lambda rows: rows[0].update(perplexity=1.0))
    for report in (
        lambda: run(recipe, folder, start="report"),
        lambda: run(recipe, folder, start="export"),
        lambda: report_runs([folder], folder / "comparison"),
    ):
        with pytest.raises(InputError, match=f"^{file}: is not what stage evaluate made .*--from evaluate$"):
            report()


def test_rows_that_are_gone_are_measured_again(recipe: Recipe, folder: Path) -> None:
    file = folder / "evaluate" / "rows.json"
    rows = file.read_bytes()
    file.unlink()
    for report in (lambda: report_runs([folder], folder / "comparison"), lambda: run(recipe, folder, only="report")):
        with pytest.raises(InputError, match=f"{file}: is gone, and stage evaluate made it; put it back, or run"):
            report()
    said_by(recipe, folder)
    assert file.read_bytes() == rows


def test_a_report_leaves_out_and_names_what_has_changed(recipe: Recipe, folder: Path) -> None:
    """Nothing that was measured hangs on a picture."""
    flip(folder / "base" / "scores.safetensors")
    (folder / "student" / "metrics.jsonl").write_text('{"step": 1, "tokens": 32, "val/kl": 0.0}\n')
    said = said_by(recipe, folder, start="report")
    for name, stage in (("base/scores.safetensors", "base"), ("student/metrics.jsonl", "student")):
        line = f"left out of this report: {folder / name}: is not what stage {stage} made"
        assert [one for one in said if line in one]
        assert line in (folder / "report" / "report.md").read_text()
    assert "scores_base" not in (folder / "report" / "index.html").read_text()
    table, _ = report_runs([folder], folder / "comparison")
    assert f"left out of this report: {folder / 'student/metrics.jsonl'}" in table


@pytest.mark.parametrize("fault", ["edited", "cut", "another stage's", "of an older version", "a pipe"])
def test_a_marker_that_is_not_as_it_was_written_is_refused(recipe: Recipe, folder: Path, fault: str) -> None:
    marker = folder / "base" / "DONE"
    match fault:
        case "edited":
            edit(marker, lambda done: done["figures"].update(plan=["nothing was cut"]))
        case "cut":
            marker.write_text(marker.read_text()[:40])
        case "another stage's":
            shutil.copy2(folder / "student" / "DONE", marker)
        case "of an older version":
            marker.write_text(json.dumps({"input_hash": "x", "seconds": 1.0, "figures": {}, "sizes": {}}))
        case "a pipe":
            marker.unlink()
            os.mkfifo(marker)
    weights = (folder / "base" / "model" / "model.safetensors").read_bytes()
    for use in (
        lambda: run(recipe, folder),
        lambda: run(recipe, folder, only="report"),
        lambda: report_runs([folder], folder / "comparison"),
    ):
        with pytest.raises(InputError, match=f"^{marker}: .*(--from base|put the file in its place)$"):
            use()
    assert (folder / "base" / "model" / "model.safetensors").read_bytes() == weights


def test_a_stage_whose_marker_was_damaged_can_be_run_again(recipe: Recipe, folder: Path) -> None:
    (folder / "export" / "DONE").write_text("{")
    assert sum("finished before" in line for line in said_by(recipe, folder, start="export")) == 3


def test_a_training_that_was_left_is_not_begun_anew_over_damage(recipe: Recipe, folder: Path) -> None:
    (folder / "student" / "DONE").unlink()
    (folder / "student" / "checkpoints").mkdir()
    (folder / "student" / "checkpoints" / "step=00000001.ckpt").write_bytes(b"worth hours")
    flip(folder / "base" / "model" / "model.safetensors")
    with pytest.raises(InputError, match=r"and student, which was left in the middle of a training, would start again"):
        run(recipe, folder)
    assert (folder / "student" / "checkpoints" / "step=00000001.ckpt").read_bytes() == b"worth hours"
    assert (folder / "base" / "model" / "model.safetensors").exists()


def test_what_a_kill_left_is_cleared_away(recipe: Recipe, folder: Path) -> None:
    """Between DONE and the checkpoints' removal, in the middle of a write, and between two renames."""
    leftovers = [
        folder / "student" / "checkpoints" / "step=00000001.ckpt",
        folder / "base" / ".model.writing" / "model.safetensors",
        folder / "base" / ".model.old" / "config.json",
        folder / "evaluate" / ".rows.json.writing",
        folder / ".recipe.yaml.writing",
        folder / "scores" / ".activation.safetensors.writing",
    ]
    for file in leftovers:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"half")
    said = said_by(recipe, folder)
    assert sum("finished before" in line for line in said) == 5
    assert not [
        file for file in leftovers if file.exists() or file.parent.name.startswith(".model.") * file.parent.exists()
    ]
    assert not (folder / "student" / "checkpoints").exists()


def test_what_a_kill_had_moved_is_put_back(recipe: Recipe, folder: Path) -> None:
    (folder / "base" / "model").rename(folder / "base" / ".model.old")
    said = said_by(recipe, folder)
    assert [line for line in said if f"{folder / 'base' / 'model'}: put back" in line]
    assert sum("finished before" in line for line in said) == 5
