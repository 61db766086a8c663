"""Scores in whole runs: made once, found again by what they depend on, drawn, and what of them a plan may use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from distill.core.batch import causal_batch
from distill.core.errors import InputError, RecipeError
from distill.recipe import Recipe
from distill.runner import run
from distill.stages.prune import scoring
from distill.stages.prune.scoring import calibration_hash

RECIPE = """\
name: tiny
teacher: {teacher}
data:
  train: {{kind: jsonl, path: {text}}}
  sequence_length: 16
  validation_tokens: 100
  calibration_sequences: 6
stages:
{stages}
compute: {{accelerator: cpu}}
logging: {{wandb: disabled}}
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": f"row {i} of the text that a small model reads, and {i * i} more words"} for i in range(80)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from distill.data.tokenizer import train_tokenizer
    from distill.models.load import new_config, new_model

    folder = tmp_path_factory.mktemp("teacher") / "model"
    tokenizer = train_tokenizer(["row of the text that a small model reads, and more words"] * 5, 270, folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4}
    keys = {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3}
    new_model(new_config(keys | sizes | {"vocab_size": len(tokenizer)}), seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe_of(teacher: Path, text: Path, *stages: str) -> Recipe:
    return Recipe.from_text(RECIPE.format(teacher=teacher, text=text, stages="\n".join(f"  {s}" for s in stages)))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Kinds of the criteria of each time that a model is really scored."""
    seen: list[list[str]] = []
    score = scoring.score
    monkeypatch.setattr(
        scoring, "score", lambda criteria, *rest: seen.append([c.kind for c in criteria]) or score(criteria, *rest)
    )
    return seen


def test_scores_are_made_once_for_all_plans(teacher, text, tmp_path, passes):
    stages = [
        "one: {kind: prune, keep: {intermediate_size: 48, hidden_size: 24}, mlp_criterion: fluctuation}",
        "two: {kind: prune, keep: {intermediate_size: 32}, mlp_criterion: fluctuation, calibration_batch_size: 4}",
        "heads: {kind: prune, keep: {num_attention_heads: 2, num_hidden_layers: 3}}",
        "after: {kind: prune, model: two, keep: {intermediate_size: 24}}",
    ]
    the_run = run(recipe_of(teacher, text, *stages), tmp_path / "run")
    assert [sorted(kinds) for kinds in passes] == [["activation", "fluctuation"], ["block_influence"], ["activation"]]
    files = sorted((tmp_path / "run" / "scores").iterdir())
    assert [file.name.rpartition("-")[0] for file in files] == ["activation"] * 2 + ["block_influence", "fluctuation"]

    found = load_file(the_run.stage("two") / "scores.safetensors")
    assert found.keys() == {"mlp_neurons"}
    assert torch.equal(found["mlp_neurons"], load_file(files[-1])["mlp_neurons"])
    with safe_open(the_run.stage("one") / "scores.safetensors", "pt") as opened:
        about = opened.metadata()
    assert about["mlp_criterion"] == "fluctuation"
    assert about["criterion"] == "activation"
    assert len(about["calibration"]) == len(about["model"]) == 16
    with safe_open(files[-1], "pt") as opened:
        assert opened.metadata()["calibration"] == about["calibration"]
        assert opened.metadata()["model"] == about["model"]
        assert json.loads(opened.metadata()["criterion"]) == {"kind": "fluctuation"}
    assert (the_run.stage("one") / "scores_one_hidden_channels.png").read_bytes().startswith(b"\x89PNG")

    # another plan in the same run folder, and a file that was cut short
    passes.clear()
    files[-1].write_bytes(files[-1].read_bytes()[:100])
    run(recipe_of(teacher, text, stages[0].replace("48", "40"), *stages[1:]), tmp_path / "run")
    assert passes == [["fluctuation"]]

    # one bit of a score is another one
    passes.clear()
    content = bytearray(files[-1].read_bytes())
    content[-2] ^= 1
    files[-1].write_bytes(content)
    run(recipe_of(teacher, text, stages[0].replace("48", "44"), *stages[1:]), tmp_path / "run")
    assert passes == [["fluctuation"]]


def test_other_text_is_another_calibration_set(teacher, text, tmp_path, passes):
    stage = "prune: {keep: {intermediate_size: 48}}"
    run(recipe_of(teacher, text, stage), tmp_path / "run")
    other = tmp_path / "other.jsonl"
    other.write_text(text.read_text().replace("small", "large"))
    run(recipe_of(teacher, other, stage), tmp_path / "run")
    assert passes == [["activation"]] * 2


def test_the_calibration_hash_is_that_of_the_rows():
    ids, mask = torch.arange(24).view(4, 6), torch.ones(4, 6, dtype=torch.bool)
    one = calibration_hash([causal_batch(ids, mask)])
    split = [causal_batch(ids[:1], mask[:1]), causal_batch(ids[1:], mask[1:])]
    assert calibration_hash(split) == one
    assert calibration_hash(reversed(split)) != one
    mask = mask.clone()
    mask[2, 5] = False
    assert calibration_hash([causal_batch(ids, mask)]) != one
    # of encoders, targets and token types are no part of the tokens
    kinds = (torch.arange(6) > 3).long().expand(4, -1)
    padded = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mask": torch.ones(4, 1, dtype=torch.bool)}
    labels = torch.tensor([[0], [1], [1], [0]])
    given = [{"targets": labels}, {"targets": 1 - labels}, {"targets": labels, "token_type_ids": kinds}]
    assert len({calibration_hash([{**padded, **more}]) for more in given}) == 3


def test_a_contiguous_cut_is_measured_as_a_whole_and_drawn(teacher, text, tmp_path):
    stages = [
        "blocks: {kind: prune, keep: {num_hidden_layers: 3, layer_choice: contiguous}, depth_criterion: leave_one_out}",
        "evaluate: {speed: null}",
        "report: {prompts: []}",
    ]
    the_run = run(recipe_of(teacher, text, *stages), tmp_path / "run")
    scores = load_file(the_run.stage("blocks") / "scores.safetensors")
    assert {axis: tuple(t.shape) for axis, t in scores.items()} == {"layer_blocks": (4,)}
    layers = json.loads((the_run.stage("blocks") / "plan.json").read_text())["layers"]
    first = 1 + int(scores["layer_blocks"][1:3].argmin())
    assert layers == [layer for layer in range(5) if layer not in (first, first + 1)]
    page = (the_run.stage("report") / "index.html").read_text()
    assert "blocks: scores" in page
    assert "Hollow: the removed block." in page
    assert (the_run.stage("report") / "plots" / "scores_blocks_layer_blocks.png").is_file()

    wrong = stages[0].replace("leave_one_out", "{kind: leave_one_out, block_layers: 3}")
    with pytest.raises(InputError, match=r"stages\.blocks: depth_criterion\.block_layers \(3\) must equal .*\(2\)"):
        run(recipe_of(teacher, text, wrong), tmp_path / "wrong")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("prune: {keep: {hidden_size: 24}, criterion: fluctuation}", "fluctuation does not score hidden_channels"),
        ("prune: {keep: {hidden_size: 24}, mlp_criterion: wanda}", "mlp_criterion has no effect"),
        ("prune: {keep: {intermediate_size: 24}, mlp_criterion: block_influence}", "does not score mlp_neurons"),
        ("prune: {keep: {intermediate_size: 24}, mlp_criterion: wanda, criterion: taylor}", "criterion has no effect"),
        ("prune: {keep: {num_hidden_layers: 4}, depth_criterion: magnitude}", "magnitude does not score layers"),
        ("scores: {kind: prune, keep: {intermediate_size: 24}}", "'scores' cannot be the name of a stage"),
    ],
)
def test_what_a_criterion_does_not_score_is_refused_by_the_recipe(teacher, text, stage, message):
    with pytest.raises(RecipeError, match=message):
        recipe_of(teacher, text, stage)
