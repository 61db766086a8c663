"""A mask in a whole run: set once, still there after training, rounding and export, and told as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.core.errors import InputError, RecipeError
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
{stages}
compute: {{accelerator: cpu}}
logging: {{wandb: disabled}}
"""
TRAINING = "num_steps: 3, batch_size: 2, optimizer: {lr: 1e-2}"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from distill.data.tokenizer import train_tokenizer
    from distill.models.load import new_config, new_model

    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": f"row {i} of the text that a small model reads, and {i * i} more words"} for i in range(80)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path_factory.mktemp("teacher") / "model"
    tokenizer = train_tokenizer(["row of the text that a small model reads, and more words"] * 5, 270, folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    keys = {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3}
    new_model(new_config(keys | sizes | {"vocab_size": len(tokenizer)}), seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"teacher": folder, "text": file}


def recipe_of(start: dict[str, Path], *stages: str) -> Recipe:
    return Recipe.from_text(RECIPE.format(**start, stages="\n".join(f"  {stage}" for stage in stages)))


def linear_weights(folder: Path) -> dict[str, torch.Tensor]:
    from distill.models.load import load_model

    model = load_model(str(folder), dtype="float32")
    return {name: p.detach() for name, p in model.named_parameters() if "layers" in name and p.ndim == 2}


def test_the_mask_outlives_training_rounding_and_export(start, tmp_path):
    the_run = run(
        recipe_of(
            start,
            "sparsify: {pattern: '2:4'}",
            f"distill: {{student: sparsify, {TRAINING}}}",
            f"labels: {{kind: finetune, model: sparsify, {TRAINING}}}",
            f"forgotten: {{kind: distill, student: sparsify, weights: random, {TRAINING}}}",
            f"int4: {{kind: quantize, student: distill, quantizer: {{kind: int_group, group_size: 8}}, {TRAINING}}}",
            "evaluate: {speed: null}",
            "export: {model: distill}",
        ),
        tmp_path / "run",
    )
    masked = linear_weights(the_run.stage("sparsify") / "model")
    assert len(masked) == 14
    export = the_run.stage("export") / "tiny-distill"
    for folder in (*(the_run.stage(name) / "model" for name in ("distill", "labels")), export):
        trained = linear_weights(folder)
        for name, weight in masked.items():
            assert ((weight.unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all()
            assert torch.equal(trained[name] == 0, weight == 0), name
            assert not torch.equal(trained[name], weight)
    rounded = linear_weights(the_run.stage("int4") / "model")
    assert all((rounded[name][weight == 0] == 0).all() for name, weight in masked.items())
    assert (linear_weights(the_run.stage("forgotten") / "model")["model.layers.0.mlp.up_proj.weight"] != 0).all()

    rows = {row["name"]: row for row in json.loads((the_run.stage("evaluate") / "rows.json").read_text())}
    model = AutoModelForCausalLM.from_pretrained(the_run.stage("distill") / "model")
    share = 1 - sum(w.numel() for w in masked.values()) / 2 / sum(p.numel() for p in model.parameters())
    assert rows["distill"]["nonzero_share"] == pytest.approx(share, abs=1e-6)
    assert rows["distill"]["notes"] == "mask 2:4, stored and run as dense"
    assert rows["distill"]["weight_bytes"] == rows["teacher"]["weight_bytes"]
    assert rows["int4"]["nonzero_share"] < share + 1e-6
    assert rows["teacher"]["nonzero_share"] is rows["forgotten"]["nonzero_share"] is None


def test_what_would_break_the_mask_is_refused(start, tmp_path):
    mask = "sparsify: {pattern: unstructured, share: 0.5, criterion: magnitude}"
    lora = f"distill: {{student: sparsify, lora: {{r: 2}}, {TRAINING}}}"
    with pytest.raises(InputError, match=r"masked \(unstructured, 50% zeros\), and a merged adapter would fill"):
        run(recipe_of(start, mask, lora), tmp_path / "run")
    with pytest.raises(InputError, match="which a cut would break; cut first, mask then"):
        run(recipe_of(start, mask, "prune: {model: sparsify, keep: {intermediate_size: 32}}"), tmp_path / "run")


@pytest.mark.parametrize("settings", ["{pattern: unstructured}", "{pattern: '2:4', share: 0.5}", "{share: 0.5}"])
def test_a_share_goes_with_unstructured_alone(start, settings):
    with pytest.raises(RecipeError, match="share: "):
        recipe_of(start, f"sparsify: {settings}")
