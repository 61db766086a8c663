"""The stage in whole runs: every codec, students that share a cache, no teacher in memory, one line a refusal."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.core.errors import InputError, RecipeError
from distill.forecast import describe
from distill.recipe import Recipe
from distill.runner import run
from distill.training.metrics import read_rows

RECIPE = """\
name: tiny
teacher: {teacher}
data:
  train: {{kind: jsonl, path: {text}}}
  sequence_length: 16
  validation_tokens: 100
  calibration_sequences: 4
stages:
  prune:
    keep: {{intermediate_size: 32}}
  live:
    {{kind: distill, student: prune, num_steps: 4, batch_size: 4}}
  cache:
    {{kind: cache_teacher, codec: {codec}}}
  cached:
    {{kind: distill, student: prune, teacher: cache, num_steps: 4, batch_size: 4}}
compute: {{accelerator: cpu, log_every_steps: 1}}
logging: {{wandb: disabled}}
"""
CODECS = ("{kind: top_k, k: 300, value_dtype: float32}", "{kind: top_k, k: 8}", "sampled", "hidden")


@pytest.fixture(scope="module")
def begun(teacher: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first two stages, which no cache changes, are done."""
    recipe = Recipe.from_text(RECIPE.format(codec="sampled", teacher=teacher, text=text))
    kept = {name: recipe.stages[name].model_dump() for name in ("prune", "live")}
    folder = tmp_path_factory.mktemp("begun") / "run"
    return run(Recipe.model_validate(recipe.model_dump() | {"stages": kept}), folder, say=quiet).folder


@pytest.fixture
def after(begun: Path) -> Callable[[Path], Path]:
    """Copies that run to a folder, which is returned."""
    return lambda folder: Path(shutil.copytree(begun, folder))


@pytest.fixture
def recipe(teacher: Path, text: Path) -> Any:
    def make(codec: str = "sampled", set: tuple[str, ...] = (), **names: Any) -> Recipe:
        names = {"teacher": teacher, "text": text} | names
        return Recipe.from_text(RECIPE.format(codec=codec, **names), set=set)

    return make


def metrics(folder: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]


def quiet(line: str) -> None:
    pass


@pytest.mark.parametrize("codec", CODECS)
def test_a_cached_run_is_near_the_live_one(codec: str, recipe: Any, after: Any, tmp_path: Path) -> None:
    said: list[str] = []
    folder = run(recipe(codec), after(tmp_path / "run"), say=said.append).folder
    live, cached = (metrics(folder, stage) for stage in ("live", "cached"))
    assert len(live) == len(cached)
    close = {"{kind: top_k, k: 300, value_dtype: float32}": 1e-3, "hidden": 0.02}.get(codec)
    for one, other in zip(live, cached, strict=True):
        assert set(one) == set(other)
        for key in one:
            if key.endswith("kl") and close is not None:
                assert other[key] == pytest.approx(one[key], rel=close), key
    assert any("bytes per token" in line and "on disk" in line for line in said)
    lineage = json.loads((folder / "cached" / "model" / "distill.json").read_text())
    assert lineage["teacher"] == "teacher"


def test_the_same_text_elsewhere_has_the_same_cache(text: Path, recipe: Any, after: Any, tmp_path: Path) -> None:
    folder, there = after(tmp_path / "run"), tmp_path / "moved.jsonl"
    shared = (f"stages.cache.folder={tmp_path / 'shared'}",)
    run(recipe(set=shared), folder, say=quiet)
    weights = (folder / "cached" / "model" / "model.safetensors").read_bytes()
    there.write_bytes(text.read_bytes())
    said: list[str] = []
    run(recipe(set=shared, text=there), folder, say=said.append)
    assert sum("finished before" in line for line in said) == 4
    said.clear()
    run(recipe(set=shared, text=there), after(tmp_path / "other"), say=said.append)
    assert any("rows are in the cache already" in line for line in said)
    assert (tmp_path / "other" / "cached" / "model" / "model.safetensors").read_bytes() == weights


def test_students_share_a_cache_and_no_teacher_is_loaded(
    recipe: Any, after: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = after(tmp_path / "run")
    first = recipe(set=(f"stages.cache.folder={tmp_path / 'shared'}",))
    run(first, folder, say=quiet)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "shared").rglob("*.safetensors")}

    def never(*_: Any) -> Any:
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr("distill.stages.models.load_in_vocabulary", never)
    other = ("stages.cached.batch_size=2", "stages.cached.num_steps=8", "stages.prune.keep={intermediate_size: 16}")
    again = recipe(set=(f"stages.cache.folder={tmp_path / 'shared'}", *other, "compute.micro_batch_size=1"))
    without_live = Recipe.model_validate(
        again.model_dump() | {"stages": {k: v.model_dump() for k, v in again.stages.items() if k != "live"}}
    )
    run(without_live, tmp_path / "other", say=quiet)
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "shared").rglob("*.safetensors")}


def test_a_longer_training_adds_what_is_missing(recipe: Any, after: Any, tmp_path: Path) -> None:
    folder = after(tmp_path / "run")
    done = run(recipe(), folder, say=quiet).done("cache")
    assert done is not None
    place = Path(done.figures["folder"])
    before = {file.name: file.read_bytes() for file in place.glob("shard-*")}
    run(recipe(set=("stages.cached.num_steps=12",)), folder, say=quiet)
    now = {file.name: file.read_bytes() for file in place.glob("shard-*")}
    assert len(now) > len(before)
    assert before.items() <= now.items()


def test_other_validation_settings_keep_the_training_cache(recipe: Any, after: Any, tmp_path: Path) -> None:
    folder = after(tmp_path / "run")
    run(recipe(), folder, say=quiet)
    before = {file: file.stat().st_mtime_ns for file in (folder / "data").glob("teacher-*/train/shard-*")}
    run(recipe(set=("data.validation_tokens=60",)), folder, say=quiet)
    assert before == {file: file.stat().st_mtime_ns for file in (folder / "data").glob("teacher-*/train/shard-*")}


def test_a_cache_that_is_too_short_is_refused(recipe: Any, after: Any, tmp_path: Path) -> None:
    short = recipe(set=("stages.cache.num_sequences=5",))
    with pytest.raises(InputError, match=r"holds 5 training sequences and \d+ of the .* raise its num_sequences to 16"):
        run(short, after(tmp_path / "run"), say=quiet)


def test_the_plan_says_what_a_cache_holds_and_when_it_may_be_too_short(recipe: Any) -> None:
    assert "cache_teacher): reads teacher; sampled of all sequences that later stages take" in describe(recipe())
    plan = describe(recipe(set=("stages.cache.num_sequences=15",)))
    assert "sampled of 15 sequences - too few if the text has more: cached takes 16;" in plan
    assert "too few if" not in describe(recipe(set=("stages.cache.num_sequences=16",)))


def test_a_whole_cache_says_so(recipe: Any, after: Any, tmp_path: Path) -> None:
    shared = ("data.calibration_sequences=4", f"stages.cache.folder={tmp_path / 'shared'}")
    said: list[str] = []
    run(recipe(set=shared), after(tmp_path / "one"), say=quiet)
    run(recipe(set=shared), after(tmp_path / "two"), say=said.append)
    assert any(line.strip() == f"cache: {tmp_path / 'shared'}" for line in said)
    assert any("train: all 16 rows are in the cache already" in line for line in said)


def test_another_teachers_cache_is_refused_by_name(recipe: Any, after: Any, new_teacher: Any, tmp_path: Path) -> None:
    shared = f"stages.cache.folder={tmp_path / 'shared'}"
    run(recipe(set=(shared,)), after(tmp_path / "run"), say=quiet)
    other = new_teacher(tmp_path / "other" / "model", seed=1)
    with pytest.raises(InputError, match="written with another teacher"):
        run(recipe(set=(shared,), teacher=other), tmp_path / "again", say=quiet)


@pytest.mark.parametrize(
    ("set", "line"),
    [
        (("stages.cached.losses=[reverse_kl]",), "reverse_kl needs the teacher's whole distribution"),
        (("stages.cached.losses=[{kind: forward_kl, temperature: 2.0}]",), "forward_kl at temperature 2.0"),
        (("stages.cached.student=cache",), "'cache' is of kind cache_teacher, which makes no model"),
        (("data.train={kind: hub, path: who/text, streaming: true}",), "stages.cache: a stream has no positions"),
        (("stages.cache.teacher=prune", "stages.live.teacher=cache"), "'cache' must stand before this stage"),
    ],
)
def test_mistakes_are_found_before_anything_runs(set: tuple[str, ...], line: str, recipe: Any) -> None:
    with pytest.raises(RecipeError, match=re.escape(line)):
        recipe("{kind: top_k, k: 8}", set=set)


def test_hidden_takes_every_loss(recipe: Any, after: Any, tmp_path: Path) -> None:
    losses = "stages.cached.losses=[reverse_kl, {kind: forward_kl, temperature: 2.0}]"
    run(recipe("hidden", set=(losses, "stages.cached.num_steps=1")), after(tmp_path / "run"), say=quiet)
    (row,) = [row for row in read_rows(tmp_path / "run" / "cached") if "train/kl" in row]
    assert min(row["train/reverse_kl"], row["train/forward_kl"], row["train/kl"]) > 0


def test_rows_of_another_length_and_packing_read_the_cache_and_say_so(
    recipe: Any, after: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = f"stages.cache.folder={tmp_path / 'shared'}"
    run(recipe("hidden", set=(shared, "stages.cached.num_steps=100")), after(tmp_path / "run"), say=quiet)

    monkeypatch.setattr("distill.stages.models.load_in_vocabulary", None)
    other = ("data.sequence_length=24", "data.packing=documents", "stages.cached.num_steps=2")
    again = recipe("hidden", set=(shared, *other))
    without_live = Recipe.model_validate(
        again.model_dump() | {"stages": {k: v.model_dump() for k, v in again.stages.items() if k != "live"}}
    )
    said: list[str] = []
    run(without_live, tmp_path / "other", say=said.append)
    assert any("the teacher read wrapped rows of 16, this run has documents rows of 24" in line for line in said)


def test_a_window_of_its_own(recipe: Any, after: Any, tmp_path: Path) -> None:
    shared = f"stages.cache.folder={tmp_path / 'shared'}"
    done = run(recipe("hidden", set=(shared, "stages.cache.window=32")), after(tmp_path / "run"), say=quiet).done(
        "cache"
    )
    assert done is not None
    header = json.loads((Path(done.figures["folder"]) / "cache.json").read_text())
    assert header["identity"]["window"] == 32
    with pytest.raises(InputError, match=r"another window of the teacher \(32\), this run has 16"):
        run(recipe("hidden", set=(shared, "stages.cache.window=16")), after(tmp_path / "other"), say=quiet)
    with pytest.raises(InputError, match=r"the teacher's window \(33\) is longer than the model's 32 positions"):
        run(recipe("hidden", set=("stages.cache.window=33",)), after(tmp_path / "long"), say=quiet)
