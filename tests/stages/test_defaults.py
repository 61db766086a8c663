"""What stages do where a recipe says nothing: in which precision they store, whom they measure, who answers."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distill.recipe import Recipe
from distill.runner import run

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
  whole: {{kind: prune, keep: {{intermediate_size: 48}}, save_dtype: float32}}
  distill: {{student: prune, num_steps: 1, batch_size: 2}}
  half: {{kind: finetune, model: prune, num_steps: 1, batch_size: 2, save_dtype: float16}}
  new:
    kind: finetune
    num_steps: 1
    batch_size: 2
    model: {{config: {{model_type: llama, hidden_size: 16, intermediate_size: 16, num_attention_heads: 2}}}}
  sparsify: {{model: distill}}
  evaluate: {{speed: null, controls: [new]}}
  export: {{model: distill}}
  report: {{prompts: [a row of], new_tokens: 2}}
compute: {{accelerator: cpu}}
logging: {{wandb: disabled}}
"""


def test_what_a_recipe_leaves_out(teacher: Path, text: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher).bfloat16()
    model.save_pretrained(tmp_path / "teacher")
    for file in teacher.glob("tokenizer*"):
        (tmp_path / "teacher" / file.name).write_bytes(file.read_bytes())
    done = run(Recipe.from_text(RECIPE.format(teacher=tmp_path / "teacher", text=text)), tmp_path / "run")

    def stored(stage: str) -> str:
        weights = load_file(done.stage(stage) / "model" / "model.safetensors")
        (dtype,) = {weight.dtype for weight in weights.values()}
        assert json.loads((done.stage(stage) / "model" / "config.json").read_text())["dtype"] == str(dtype)[6:]
        return str(dtype)[6:]

    assert {stage: stored(stage) for stage in ("prune", "distill", "sparsify")} == dict.fromkeys(
        ("prune", "distill", "sparsify"), "bfloat16"
    ), "that of the model that it starts from"
    assert (stored("whole"), stored("half"), stored("new")) == ("float32", "float16", "float32")

    plan = json.loads((done.stage("prune") / "plan.json").read_text())
    same = ("layers", "attention_heads", "hidden_channels")
    assert all(plan["before"][axis] == plan["after"][axis] for axis in same), "what is not named stays whole"

    rows = json.loads((done.stage("evaluate") / "rows.json").read_text())
    assert [row["name"] for row in rows] == ["teacher", "prune", "whole", "distill", "half", "new", "sparsify"]
    assert [row["name"] for row in rows if row["role"] == "control"] == ["new"]
    assert (done.stage("export") / "tiny-distill" / "model.safetensors").is_file()
    text = (done.stage("report") / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"^\*\*(\w+)\*\* \(", text, re.M) == ["teacher", "distill", "half"], "students that were trained"
