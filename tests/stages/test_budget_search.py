"""A prune stage with a budget: what it chooses, what it leaves, and that a kill costs one candidate at most."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distill.core.errors import InputError, RecipeError
from distill.core.run_folder import Run
from distill.core.stored import CHECK
from distill.forecast import describe
from distill.recipe import Recipe
from distill.runner import run
from distill.stages.prune.search import clock, trials
from distill.stages.prune.search.clock import Clock
from distill.stages.prune.search.ranking import ranking as ranking_of

RECIPE = """\
name: tiny
teacher: {teacher}
data:
  train: {{kind: jsonl, path: {text}}}
  sequence_length: 16
  validation_tokens: 100
  calibration_sequences: 6
stages:
  prune: {{{keys}}}
{more}
compute: {{accelerator: cpu, checkpoint_every_steps: 1, log_every_steps: 1}}
logging: {{wandb: disabled}}
"""
SEARCH = (
    "search: {budget: {non_embedding_parameters: 70%, tolerance: 0.2}, axes: [hidden_size, intermediate_size], "
    "multiple_of: {hidden_size: 4, intermediate_size: 4}, num_measured: 4, num_sequences: 4, "
    "train: {num_candidates: 2, num_steps: 2, batch_size: 2}}"
)
KNOTS = 4 + 4
"""Cuts along one axis that this search measures first."""
CUT, TRAINED = 4 + 1, 2 + 1
"""Candidates that it then cuts and trains: the best and the uniform control."""


class PulledPlug(Exception):
    """Stands for a kill: nothing of ours may react to it."""


def recipe_of(teacher: Path, text: Path, keys: str = SEARCH, more: str = "") -> Recipe:
    return Recipe.from_text(RECIPE.format(teacher=teacher, text=text, keys=keys, more=more))


def left_by(the_run: Run) -> tuple[Any, bytes]:
    """The ranking without the clock, and the model."""
    found = json.loads((the_run.stage("prune") / "search.json").read_text())
    for row in found["ranking"]:
        (row["trained"] or {}).pop("training_seconds", None)
    return found, (the_run.stage("prune") / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def straight(teacher: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[str]]:
    said: list[str] = []
    report = "  evaluate: {speed: null}\n  report: {prompts: []}"
    return run(
        recipe_of(teacher, text, more=report), tmp_path_factory.mktemp("straight") / "run", say=said.append
    ), said


def test_the_best_after_training_is_cut_out_and_told(straight: tuple[Run, list[str]]) -> None:
    from distill.models.size import parameters_of

    the_run, said = straight
    found, _ = left_by(the_run)
    ranking, folder = found["ranking"], the_run.stage("prune")
    assert found["num_candidates"] > len(ranking) == CUT
    assert [row["trained"] is not None for row in ranking] == [True] * TRAINED + [False] * (CUT - TRAINED)
    assert all(found["least"] <= row["non_embedding_parameters"] <= found["most"] for row in ranking)
    assert [row["trained"]["kl"] for row in ranking[:TRAINED]] == sorted(
        row["trained"]["kl"] for row in ranking[:TRAINED]
    )
    best = [row["cut"]["kl"] for row in ranking[:TRAINED] if not row["uniform"]]
    assert max(best) <= ranking[TRAINED]["cut"]["kl"] <= ranking[-1]["cut"]["kl"]
    assert [row["trained"]["training_steps"] for row in ranking[:TRAINED]] == [2] * TRAINED

    assert parameters_of(folder / "model")[1] == ranking[0]["non_embedding_parameters"]
    config = json.loads((folder / "model" / "config.json").read_text())
    assert {key: config[key] for key in ranking[0]["keep"]} == ranking[0]["keep"]
    assert not (folder / "checkpoints").exists()

    table = ranking_of(folder / "search.json")
    assert len({len(line) for line in table}) == 1
    assert table[1][1:3] == [str(ranking[0]["keep"].get(key, "whole")) for key in table[0][1:3]]
    assert any(f"{ranking[0]['trained']['kl']:.4f}" in line for line in said)
    for page in ("index.html", "report.md"):
        text = (the_run.stage("report") / page).read_text()
        assert all(f"{row['cut']['kl']:.4f}" in text for row in ranking)


def killed_at(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Pull the plug instead of a method's call of that number."""
    calls, method = iter(range(number)), getattr(trials.Trials, name)

    def pull(self: Any, *arguments: Any) -> Any:
        if next(calls, None) is None:
            raise PulledPlug
        return method(self, *arguments)

    monkeypatch.setattr(trials.Trials, name, pull)


@pytest.mark.parametrize(
    ("name", "number", "left"), [("_loss", 10, 10), ("_train", 1, KNOTS + CUT + 1), ("_loss", 14, 14)]
)
def test_a_kill_loses_one_candidate_and_changes_nothing(
    straight, teacher, text, tmp_path, monkeypatch, name, number, left
):
    with monkeypatch.context() as patch:
        killed_at(patch, name, number)
        with pytest.raises(PulledPlug):
            run(recipe_of(teacher, text), tmp_path / "run", say=lambda line: None)
    state = json.loads((tmp_path / "run" / "prune" / "checkpoints" / "search.json").read_text())
    assert len({*state} - {CHECK}) == left

    measured: list[int] = []
    loss = trials.Trials._loss
    monkeypatch.setattr(trials.Trials, "_loss", lambda self, *rest: measured.append(1) or loss(self, *rest))
    again = run(recipe_of(teacher, text), tmp_path / "run", say=lambda line: None)
    assert len(measured) == KNOTS + CUT + TRAINED - left
    assert left_by(again) == left_by(straight[0])


def test_the_teacher_is_loaded_once_for_all_trainings(teacher, text, tmp_path, monkeypatch) -> None:
    from distill.stages import models

    loads: list[str] = []
    load = models.load_in_vocabulary
    monkeypatch.setattr(models, "load_in_vocabulary", lambda *a: loads.append(a[1]) or load(*a))
    run(recipe_of(teacher, text), tmp_path / "run", say=lambda line: None)
    assert loads == [str(teacher)]


def is_slow(sizes: dict[str, int]) -> bool:
    """Shapes that a machine dislikes, though no size says so; none of those that a forecast starts from."""
    return (sizes["hidden_channels"] + sizes["mlp_neurons"]) % 8 != 0


def milliseconds(sizes: dict[str, int]) -> float:
    """A machine that never tires: a start, a time a layer, a time a weight."""
    per_layer = 0.2 + 1e-4 * sizes["hidden_channels"] * sizes["mlp_neurons"]
    return 0.5 + sizes["layers"] * per_layer + (1.0 if is_slow(sizes) else 0.0)


def test_a_budget_of_time_is_held_by_measurement(teacher, text, tmp_path, monkeypatch) -> None:
    calls: list[dict[str, int]] = []
    monkeypatch.setattr(Clock, "_measure", lambda self, sizes: calls.append(sizes) or milliseconds(sizes))
    keys = SEARCH.replace("non_embedding_parameters: 70%", "decode_ms_per_token: 80%")
    keys = keys.replace(", train: {num_candidates: 2, num_steps: 2, batch_size: 2}", "")
    said: list[str] = []
    found, _ = left_by(run(recipe_of(teacher, text, keys), tmp_path / "run", say=said.append))
    whole = {"layers": 2, "hidden_channels": 32, "mlp_neurons": 64}
    assert found["most"] == pytest.approx(0.8 * milliseconds(whole))
    assert found["ranking"]
    for row in found["ranking"]:
        sizes = {"hidden_channels": row["keep"].get("hidden_size", 32), "layers": 2}
        sizes["mlp_neurons"] = row["keep"].get("intermediate_size", 64)
        assert row["decode_ms_per_token"] == milliseconds(sizes) <= found["most"]
        assert not is_slow(sizes)
    assert any(map(is_slow, calls))  # forecast to fit, and does not
    assert len(calls) == len({tuple(sizes.items()) for sizes in calls})
    line = next(line for line in describe(recipe_of(teacher, text, keys)).splitlines() if "] prune:" in line)
    assert "for decode_ms_per_token at most 80%, measured on this machine" in line


def test_times_of_another_machine_are_not_taken_over(teacher, text, tmp_path, monkeypatch) -> None:
    calls: list[dict[str, int]] = []
    monkeypatch.setattr(Clock, "_measure", lambda self, sizes: calls.append(sizes) or milliseconds(sizes))
    keys = SEARCH.replace("non_embedding_parameters: 70%", "decode_ms_per_token: 80%")
    killed_at(monkeypatch, "end_of_cuts", 0)

    def calls_until_the_plug_is_pulled() -> int:
        calls.clear()
        with pytest.raises(PulledPlug):
            run(recipe_of(teacher, text, keys), tmp_path / "run", say=lambda line: None)
        return len(calls)

    assert calls_until_the_plug_is_pulled() > 4
    assert calls_until_the_plug_is_pulled() == 0
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    assert calls_until_the_plug_is_pulled() > 4


TIMED = SEARCH.replace("non_embedding_parameters: 70%", "decode_ms_per_token: 80%").replace(
    ", train: {num_candidates: 2, num_steps: 2, batch_size: 2}", ""
)


@pytest.mark.parametrize("disturbed", [(16, 64), (16, 32)])
def test_a_disturbed_time_is_measured_again(disturbed, teacher, text, tmp_path, monkeypatch) -> None:
    """A smaller model that takes longer than a larger one; once measured in peace the search goes its usual way."""
    left, calls = [disturbed], []

    def measured(self: Clock, sizes: dict[str, int]) -> float:
        calls.append(sizes)
        is_disturbed = (sizes["hidden_channels"], sizes["mlp_neurons"]) in left
        left[:] = [] if is_disturbed else left
        return milliseconds(sizes) * (10 if is_disturbed else 1)

    monkeypatch.setattr(Clock, "_measure", measured)
    said: list[str] = []
    found = left_by(run(recipe_of(teacher, text, TIMED), tmp_path / "run", say=said.append))
    assert any("1 of them took longer than larger ones" in line for line in said)
    num_calls = len(calls)
    assert left_by(run(recipe_of(teacher, text, TIMED), tmp_path / "peace", say=lambda line: None)) == found
    assert 2 * num_calls == len(calls) + 1


def test_times_that_led_to_a_refusal_are_not_believed_again(teacher, text, tmp_path, monkeypatch) -> None:
    """The larger a disturbed model, the less can be told of it; the next run finds out."""
    noise = 10
    monkeypatch.setattr(
        Clock, "_measure", lambda self, sizes: milliseconds(sizes) * (noise if sizes["mlp_neurons"] == 64 else 1)
    )
    with pytest.raises(InputError, match=r"decode_ms_per_token: .*(cuts nothing|no architecture)"):
        run(recipe_of(teacher, text, TIMED), tmp_path / "run", say=lambda line: None)
    noise = 1
    run(recipe_of(teacher, text, TIMED), tmp_path / "run", say=lambda line: None)


def test_latency_is_that_of_the_candidate_s_own_config(teacher, text, tmp_path, monkeypatch) -> None:
    from distill.evaluation import speed

    asked: list[dict[str, Any]] = []

    def measured(folder: Path, **settings: Any) -> Any:
        asked.append(json.loads((folder / "config.json").read_text()) | settings)
        return speed.Speed("real", "", speed.SpeedSettings(), "cpu", decode_tokens_per_s_p50=500.0)

    monkeypatch.setattr(clock, "measure_speed", measured)
    keys = SEARCH.replace("non_embedding_parameters: 70%", "decode_ms_per_token: 3")
    with pytest.raises(InputError, match=r"the model took 2\.000 ms, and 2\.000 ms by what smaller ones took"):
        run(recipe_of(teacher, text, keys), tmp_path / "run", say=lambda line: None)
    sizes = [(one["hidden_size"], one["intermediate_size"]) for one in asked]
    assert sizes == [size for size in [(32, 64), (16, 64), (32, 32), (16, 32)] for _ in range(3)]
    assert {(one["weights"], one["prompt_tokens"], one["new_tokens"]) for one in asked} == {("random", 8, 8)}


def test_without_training_the_cut_decides(teacher: Path, text: Path, tmp_path: Path) -> None:
    keys = SEARCH.replace(", train: {num_candidates: 2, num_steps: 2, batch_size: 2}", "")
    the_run = run(recipe_of(teacher, text, keys), tmp_path / "run", say=lambda line: None)
    ranking = left_by(the_run)[0]["ranking"]
    assert [row["trained"] for row in ranking] == [None] * CUT
    assert [row["cut"]["kl"] for row in ranking] == sorted(row["cut"]["kl"] for row in ranking)


def test_check_shows_the_space_and_how_many_fit(straight: tuple[Run, list[str]], teacher: Path, text: Path) -> None:
    line = next(line for line in describe(recipe_of(teacher, text)).splitlines() if "] prune:" in line)
    assert "searches hidden_size 16 to 32 (5 sizes), intermediate_size 32 to 64 (9 sizes)" in line
    num = left_by(straight[0])[0]["num_candidates"]
    assert f"{num} candidates with non_embedding_parameters at most 70%; measures 4 of them, trains 2 on 64 tok" in line
    assert "makes at most" in line


def test_check_and_run_refuse_a_budget_out_of_reach_alike(teacher: Path, text: Path, tmp_path: Path) -> None:
    recipe = recipe_of(teacher, text, SEARCH.replace("70%", "5%"))
    message = r"stages\.prune: search\.budget\.non_embedding_parameters: the smallest architecture of the search has"
    with pytest.raises(RecipeError, match=message):
        describe(recipe)
    with pytest.raises(InputError, match=message):
        run(recipe, tmp_path / "run", say=lambda line: None)
    assert not (tmp_path / "run" / "scores").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("", "say what stays once: keep with its sizes, or search"),
        ("keep: {}", "keep names no size, so nothing would be cut"),
        ("keep: {intermediate_size: 32}, " + SEARCH, r"say what stays once: .*--set stages\.prune\.keep=null"),
        (SEARCH + ", depth_criterion: leave_one_out", "depth_criterion has no effect: search cuts nothing"),
        (
            SEARCH.replace("num_measured: 4", "num_measured: 1"),
            r"train\.num_candidates \(2\) is more than num_measured",
        ),
        (SEARCH.replace("[hidden_size, ", "["), r"multiple_of\.hidden_size has no effect"),
        (SEARCH.replace("num_measured", "layer_choice: contiguous, num_measured"), "layer_choice 'contiguous' has no"),
        (SEARCH.replace("70%", "much"), r"stages\.prune\.search\.budget\.non_embedding_parameters: expected a number"),
    ],
)
def test_settings_without_effect_are_refused(teacher: Path, text: Path, keys: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(teacher, text, keys)
