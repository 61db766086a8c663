"""A student of fewer tokens than its teacher: cut, trained either way, measured, and plain for everybody else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.core.artifact import Artifact
from distill.core.errors import InputError
from distill.core.run_folder import Run
from distill.data.tokenizer import train_tokenizer
from distill.forecast import describe
from distill.models.load import new_config, new_model
from distill.recipe import Recipe
from distill.runner import run

RECIPE = """\
name: tiny
teacher: {teacher}
data:
  train: {{kind: jsonl, path: {text}}}
  sequence_length: 16
  validation_tokens: 200
  calibration_sequences: 6
stages:
{stages}
compute: {{accelerator: cpu}}
logging: {{wandb: disabled}}
"""
STAGES = """\
  same: {kind: prune, keep: {vocabulary: used}}
  prune: {keep: {vocabulary: 265, intermediate_size: 32}}
  again: {kind: prune, model: prune, keep: {vocabulary: 262}}
  distill: {student: prune, num_steps: 2, batch_size: 2}
  finetune: {model: prune, num_steps: 2, batch_size: 2}
  evaluate: {speed: null}
  report: {prompts: [row of the text]}
"""
TOKENS = 280


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with some tokens that the text never uses, and rows for more than it has."""
    folder = tmp_path_factory.mktemp("big") / "model"
    texts = ["row of the text that a small model reads, and more words", "zebra zigzag quiz"]
    tokenizer = train_tokenizer(texts * 5, TOKENS, folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    keys = {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    new_model(new_config(keys | sizes | ends | {"vocab_size": TOKENS + 8}), seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe_of(teacher: Path, text: Path, stages: str = STAGES) -> Recipe:
    return Recipe.from_text(RECIPE.format(teacher=teacher, text=text, stages=stages))


@pytest.fixture(scope="module")
def done(big: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(recipe_of(big, text), tmp_path_factory.mktemp("done") / "run", say=lambda line: None)


def test_every_model_loads_with_its_own_tokens(done: Run) -> None:
    sizes = {}
    for name in ("same", "prune", "again", "distill", "finetune"):
        folder = done.stage(name) / "model"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        sizes[name] = len(tokenizer)
        assert model.config.vocab_size == len(tokenizer) == model.get_output_embeddings().weight.size(0)
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        lineage = Artifact(name, str(folder)).lineage()
        assert lineage is not None
        assert lineage.num_tokens == len(tokenizer)
        ids = tokenizer("row of the text ∑", return_tensors="pt")
        made = model.generate(ids.input_ids, max_new_tokens=4, do_sample=False)
        assert tokenizer.decode(made[0]).startswith("row of the text ∑")
    assert 258 < sizes.pop("same") < TOKENS
    assert sizes == {"prune": 265, "again": 262, "distill": 265, "finetune": 265}


def test_the_cut_model_says_what_its_teacher_does_of_the_tokens_that_stay(done: Run, big: Path) -> None:
    folder = done.stage("same") / "model"
    model, whole = (AutoModelForCausalLM.from_pretrained(place) for place in (folder, big))
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(big)
    text = "row 7 of the text that a small model reads"
    ids = theirs(text).input_ids
    rows = theirs.convert_tokens_to_ids(ours.convert_ids_to_tokens(list(range(len(ours)))))
    assert [rows[id_] for id_ in ours(text).input_ids] == ids
    with torch.no_grad():
        got = model(torch.tensor([ours(text).input_ids])).logits
        expected = whole(torch.tensor([ids])).logits[..., rows]
    torch.testing.assert_close(got, expected)


def test_models_are_measured_in_their_own_tokens_against_the_teacher_s_words_in_them(done: Run) -> None:
    rows = {row["name"]: row for row in json.loads((done.stage("evaluate") / "rows.json").read_text())}
    assert rows["same"]["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert rows["same"]["top1_agreement"] == 1
    assert rows["again"]["kl_to_teacher"] > 0
    assert rows["distill"]["kl_to_teacher"] != rows["prune"]["kl_to_teacher"]
    assert rows["same"]["bits_per_byte"] < rows["teacher"]["bits_per_byte"]  # no share is lost on tokens that are gone
    assert "vocabulary cut to 265 tokens" in rows["finetune"]["notes"]
    assert rows["teacher"]["notes"] == ""


def test_check_forecasts_the_size(big: Path, text: Path) -> None:
    plan = describe(recipe_of(big, text))
    assert "prune: reads teacher; keeps intermediate_size 32, vocabulary 265; makes 0.03M parameters" in plan
    assert "keeps vocabulary used; makes at most 0.04M" in plan


def test_the_whole_vocabulary_s_cache_is_refused_for_a_student_of_fewer_tokens(
    big: Path, text: Path, tmp_path: Path
) -> None:
    stages = """\
  cache: {kind: cache_teacher, num_sequences: 4}
  prune: {keep: {vocabulary: 265}}
  distill: {student: prune, teacher: cache, num_steps: 2, batch_size: 2}
"""
    with pytest.raises(InputError, match="the cache 'cache' holds what teacher says in 280 tokens, and the student"):
        run(recipe_of(big, text, stages), tmp_path / "run", say=lambda line: None)


def test_a_student_of_all_tokens_cannot_learn_from_a_teacher_of_fewer(big: Path, text: Path, tmp_path: Path) -> None:
    stages = """\
  small: {kind: prune, keep: {vocabulary: 265}}
  distill: {student: teacher, teacher: small, num_steps: 1, batch_size: 1}
"""
    with pytest.raises(InputError, match="the model has 265 embeddings for the 280 tokens"):
        run(recipe_of(big, text, stages), tmp_path / "run", say=lambda line: None)
