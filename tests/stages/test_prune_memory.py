"""Where nothing is to be scored, no model is loaded: the stage reads one weight at a time."""

import json

import pytest
from transformers import AutoModelForCausalLM

import distill
from distill.core.errors import InputError
from distill.models import load
from distill.pruning import surgery

RECIPE = """\
name: tiny
teacher: builtin:quickstart-teacher
data:
  train: {{kind: jsonl, path: {text}}}
  sequence_length: 16
  validation_tokens: 100
stages:
  prune: {{keep: {keep}}}
compute: {{accelerator: cpu}}
logging: {{wandb: disabled}}
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(40)))

    def make(keep):
        file = tmp_path / "tiny.yaml"
        file.write_text(RECIPE.format(text=tmp_path / "text.jsonl", keep=keep))
        return distill.Recipe.load(str(file))

    return make


def test_named_layers_are_cut_without_a_whole_model(recipe, tmp_path, monkeypatch):
    def refuse(*arguments, **settings):
        raise AssertionError("the whole model was loaded")

    monkeypatch.setattr(load, "load_model", refuse)
    monkeypatch.setattr(surgery, "apply", refuse)
    distill.run(recipe("{layers: [0, 2]}"), run_dir=str(tmp_path / "run"))
    monkeypatch.undo()
    teacher = load.load_model("builtin:quickstart-teacher")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "prune" / "model")
    assert student.config.num_hidden_layers == 2
    assert student.dtype == teacher.dtype
    kept = dict(teacher.model.layers[2].named_parameters())
    assert all((kept[name] == parameter).all() for name, parameter in student.model.layers[1].named_parameters())


def test_a_size_that_cannot_be_is_refused_before_a_model_is_loaded(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "load_model", None)
    with pytest.raises(InputError, match=r"keep\.num_attention_heads \(7\) "):
        distill.run(recipe("{num_attention_heads: 7}"), run_dir=str(tmp_path / "run"))
