"""Ways to quantize in a whole run: grids per layer, chosen grids, activations, gptq, learned scales, a later start."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from distill.core.errors import DistillError, InputError, RecipeError
from distill.core.stored import write_checked
from distill.forecast import describe
from distill.recipe import Recipe
from distill.runner import run

RECIPE = """\
name: tiny
teacher: {teacher}
data:
  train: {{kind: jsonl, path: {text}}}
  sequence_length: 16
  validation_tokens: 100
  calibration_sequences: 8
stages:
{stages}
compute: {{accelerator: cpu, log_every_steps: 1}}
logging: {{wandb: disabled}}
"""
TRAINING = "num_steps: 3, batch_size: 2, optimizer: {lr: 1e-2}"
LEARNED = "quantizer: {kind: int_group, bits: 3, scale: learned}"


def recipe_of(teacher: Path, text: Path, *stages: str) -> Recipe:
    lines = "\n".join(f"  {stage}" for stage in stages)
    return Recipe.from_text(RECIPE.format(teacher=teacher, text=text, stages=lines))


def test_every_way_runs_and_is_verified(teacher, text, tmp_path):
    said: list[str] = []
    the_run = run(
        recipe_of(
            teacher,
            text,
            "by_layer: {kind: quantize, student: teacher, num_tokens: 0, "
            "layers: [{match: '*.down_proj', quantizer: int8_channel}, {match: k_proj, quantizer: fp8}]}",
            "mixed: {kind: quantize, student: teacher, num_tokens: 0, equalize: awq, mixed: {bits: 5, "
            "also: [{kind: int_group, bits: 2}, int8_channel], num_sequences: 2}}",
            "gptq: {kind: quantize, student: teacher, num_tokens: 0, rounding: gptq, quantizer: "
            "{kind: int_group, bits: 3, scale: mse}}",
            "w8a8: {kind: quantize, student: teacher, equalize: smooth_quant, quantizer: int8_channel, "
            "activations: static_int8, lora: {r: 2}, "
            f"{TRAINING}}}",
            "learned: {kind: quantize, student: teacher, teacher: self, lora: {r: 2}, from_step: 1, quantizer: "
            f"{{kind: int_group, bits: 2, scale: learned}}, freeze_scales: 0.7, {TRAINING}}}",
            f"from_gptq: {{kind: quantize, student: teacher, rounding: gptq, {LEARNED}, {TRAINING}}}",
            f"q4_0: {{kind: quantize, student: teacher, quantizer: q4_0, freeze_scales: 0.4, {TRAINING}}}",
            f"on_text: {{kind: quantize, student: teacher, losses: [cross_entropy], quantizer: q8_0, {TRAINING}}}",
            f"ends: {{kind: quantize, student: teacher, quantizer: q8_0, embeddings: int8, {TRAINING}}}",
            "evaluate: {speed: null}",
            "report: {prompts: []}",
        ),
        tmp_path / "run",
        say=said.append,
    )
    kept = (the_run.folder / "recipe.yaml").read_text(encoding="utf-8")
    assert Recipe.from_text(kept).dump() == kept  # what resuming, comparing and other processes read
    schemes = {
        "by_layer": "int4, group 32; *.down_proj: int8, per channel; k_proj: fp8, per channel; "
        "embeddings int8, group 32",
        "mixed": "int4, group 32; embeddings int8, group 32; awq; mixed, 5 bits",
        "gptq": "int3, group 32, mse; embeddings int8, group 32; gptq",
        "w8a8": "int8, per channel; smooth_quant; int8 activations, mse",
        "learned": "int2, group 32, learned; embeddings int8, group 32",
        "from_gptq": "int3, group 32, learned; embeddings int8, group 32; gptq",
        "q4_0": "Q4_0; embeddings Q8_0",
        "on_text": "Q8_0",
        "ends": "Q8_0; embeddings int8, per channel",
    }
    for name, scheme in schemes.items():
        figures = the_run.done(name).figures
        assert figures["scheme"] == scheme
        assert figures["verified_worst_kl"] <= 1e-9
        assert figures["quantized_layers"] == 14
    assert the_run.model("q4_0").lineage().teacher == "teacher"
    assert the_run.model("on_text").lineage().teacher is None
    config = json.loads((the_run.stage("by_layer") / "model" / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"].values()
    assert [(len(group["targets"]), group["format"]) for group in groups] == [
        (1, "naive-quantized"), (10, "pack-quantized"), (2, "naive-quantized"), (2, "pack-quantized"),
        (1, "pack-quantized"),
    ]  # fmt: skip
    scan = json.loads((the_run.stage("mixed") / "sensitivity.json").read_text())
    assert len(scan) == 14
    assert {row["chosen"] for row in scan} <= {"int4, group 32", "int2, group 32", "int8, per channel"}
    spent = sum(row["grids"][row["chosen"]]["bits"] * row["weights"] for row in scan)
    assert spent <= 5 * sum(row["weights"] for row in scan)
    assert (the_run.stage("mixed") / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert any("14 layers scanned" in line for line in said)
    (told,) = [line for line in said if "14 layers (" in line]  # the grids that were chosen, not the stage's own
    counts = Counter(row["chosen"] for row in scan)
    assert sorted(told[told.index("(") + 1 : told.index(")")].split("; ")) == sorted(
        f"{count} as {grid}" for grid, count in counts.items()
    )
    page = (the_run.stage("report") / "index.html").read_text()
    assert re.findall(r"<h3>(\w+): sensitivity of each layer", page) == ["mixed"]
    assert (the_run.stage("report") / "plots" / "sensitivity_mixed.png").is_file()
    rows = {row["name"]: row for row in json.loads((the_run.stage("evaluate") / "rows.json").read_text())}
    assert rows["gptq"]["perplexity"] != rows["teacher"]["perplexity"]


def test_what_has_no_effect_or_cannot_be_is_refused(teacher, text, tmp_path):
    start = "student: teacher, kind: quantize"
    for settings, message in (
        (f"layers: [{{match: k_proj, quantizer: {{kind: fp8, skip: []}}}}], {TRAINING}", "skip has no effect here"),
        (
            f"mixed: {{bits: 5, also: [{{kind: fp8, include: [embed_tokens]}}]}}, {TRAINING}",
            "include has no effect here",
        ),
        (f"layers: [{{match: k_proj, quantizer: fp8}}], mixed: {{bits: 5, also: [fp8]}}, {TRAINING}", "remove one"),
        (f"rounding: gptq, {TRAINING}", "gptq before a training needs scale: learned"),
        (f"rounding: gptq, from_step: 1, {LEARNED}, {TRAINING}", "which undoes rounding: gptq; remove one"),
        (f"rounding: gptq, lora: {{r: 2}}, {LEARNED}, {TRAINING}", "lora would leave as they are; remove one"),
        ("num_tokens: 0, quantizer: {kind: int_group, scale: learned}", "learned needs training"),
        (f"quantizer: fp8, activations: dynamic_int8, {TRAINING}", "which no engine multiplies"),
        ("num_tokens: 0, from_step: 2, freeze_scales: 0.9", "without effect: from_step, freeze_scales; remove"),
        (f"freeze_scales: 1, {TRAINING}", "freeze_scales"),
        (
            "num_tokens: 0, batch_size: 4, validate_every_steps: 9, max_skipped_steps: 2",
            "without effect: batch_size, validate_every_steps, max_skipped_steps; remove",
        ),
        (
            "num_tokens: 0, rounding: gptq, quantizer: ternary",
            r"gptq supports symmetric integer quantizers \(got ternary",
        ),
        (
            "num_tokens: 0, rounding: gptq, mixed: {bits: 5, also: [fp8]}",
            r"gptq supports symmetric integer quantizers \(got fp8",
        ),
        (f"lora: {{r: 2, dropout: 0.1}}, {TRAINING}", r"lora.dropout \(0.1\) has no effect on fake-quantized layers"),
        (f"losses: [cross_entropy], teacher: self, {TRAINING}", "so teacher has no effect"),
        (f"quantizer: {{kind: int_group, scale: learned, symmetry: asymmetric}}, {TRAINING}", "for symmetric codes"),
    ):
        with pytest.raises(RecipeError, match=message):
            recipe_of(teacher, text, f"quantize: {{{start}, {settings}}}")
    layers = "num_tokens: 0, rounding: gptq, layers: [{match: k_proj, quantizer: binary}]"
    with pytest.raises(RecipeError, match=r"k_proj: rounding: gptq supports symmetric integer quantizers \(got binary"):
        describe(recipe_of(teacher, text, f"quantize: {{{start}, {layers}}}"))
    for grid, message in (
        ("skip: [upproj]", "skip: 'upproj' matches no layer (the model has down_proj"),
        ("include: [wte]", "include: 'wte' matches no layer"),
    ):
        stage = f"quantize: {{{start}, {TRAINING}, quantizer: {{kind: int_group, {grid}}}}}"
        with pytest.raises(RecipeError, match=re.escape(f"stages.quantize: {message}")):
            describe(recipe_of(teacher, text, stage))
    wide = r"stages.quantize: Q6_K needs rows \(32\) to be a multiple of its block size \(256\); use q8_0"
    with pytest.raises(RecipeError, match=wide):
        describe(recipe_of(teacher, text, f"quantize: {{{start}, {TRAINING}, embeddings: q6_k}}"))
    both = f"{TRAINING}, quantizer: {{kind: int_group, include: [embed_tokens]}}, embeddings: q8_0"
    with pytest.raises(RecipeError, match=r"include puts embeddings on the grid of the layers.*remove one of them"):
        recipe_of(teacher, text, f"quantize: {{{start}, {both}}}")
    with pytest.raises(InputError, match=r"from_step \(3\) must be less than the stage's 3 steps"):
        run(recipe_of(teacher, text, f"quantize: {{{start}, from_step: 3, {TRAINING}}}"), tmp_path / "run")
    early = f"quantize: {{{start}, from_step: 2, freeze_scales: 0.5, {TRAINING}}}"
    with pytest.raises(InputError, match=r"freeze_scales \(0.5\) holds scales from step 1 on, before the weights are"):
        run(recipe_of(teacher, text, early), tmp_path / "early")
    mask = "sparsify: {pattern: '2:4'}"
    for settings in ("rounding: gptq", "quantizer: binary"):
        stage = f"quantize: {{kind: quantize, student: sparsify, num_tokens: 0, {settings}}}"
        with pytest.raises(InputError, match=r"masked \(2:4.*would fill"):
            run(recipe_of(teacher, text, mask, stage), tmp_path / "masked")


def test_before_its_step_training_is_in_full_precision(teacher, text, tmp_path):
    plain = f"plain: {{kind: distill, student: teacher, {TRAINING}}}"
    late = f"late: {{kind: quantize, student: teacher, from_step: 2, {TRAINING}}}"
    now = f"now: {{kind: quantize, student: teacher, {TRAINING}}}"
    the_run = run(recipe_of(teacher, text, plain, late, now), tmp_path / "run")

    def losses(name: str) -> list[float]:
        lines = (the_run.stage(name) / "metrics.jsonl").read_text().splitlines()
        return [row["train/forward_kl"] for row in map(json.loads, lines) if "train/forward_kl" in row]

    assert len(losses("late")) == 3
    assert losses("late")[:2] == losses("plain")[:2]
    assert losses("late")[2] != losses("plain")[2]
    assert losses("now")[0] != losses("plain")[0]


def test_what_is_not_what_was_trained_is_not_kept(teacher, text, tmp_path, monkeypatch):
    from distill.stages.quantize import run as stage

    save = stage.save

    def spoilt(model, folder, **settings):
        size = save(model, folder, **settings)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight_scale"][0] *= 1.5
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return size

    monkeypatch.setattr(stage, "save", spoilt)
    rounded = recipe_of(teacher, text, "quantize: {kind: quantize, student: teacher, num_tokens: 0}")
    with pytest.raises(DistillError, match="differs from the trained model: the largest KL"):
        run(rounded, tmp_path / "run")
    assert not (tmp_path / "run" / "quantize" / "DONE").exists()
    assert not (tmp_path / "run" / "quantize" / "model").exists()


def test_a_scan_is_made_once_for_the_same_inputs(teacher, text, tmp_path):
    def go(bits: float) -> list[dict]:
        mixed = f"{{bits: {bits}, also: [{{kind: int_group, bits: 2}}], num_sequences: 1}}"
        run(
            recipe_of(teacher, text, f"mixed: {{kind: quantize, student: teacher, num_tokens: 0, mixed: {mixed}}}"),
            run_dir,
        )
        return json.loads((run_dir / "mixed" / "sensitivity.json").read_text())

    run_dir = tmp_path / "run"
    scan = go(4)
    assert {row["chosen"] for row in scan} == {"int4, group 32", "int2, group 32"}
    # what another process, or this one before it was killed, has found is what is done
    (run_dir / "mixed" / "DONE").unlink()
    for row in scan:
        row["chosen"] = "int2, group 32"
    write_checked(run_dir / "mixed" / "checkpoints" / "sensitivity.json", {"layers": scan})
    (run_dir / "mixed" / "sensitivity.json").write_text(json.dumps(scan))
    assert go(4) == scan
    config = json.loads((run_dir / "mixed" / "model" / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"].values()
    assert [group["weights"]["num_bits"] for group in groups] == [8, 2, 8]  # of embeddings, layers and head
    # another budget is another scan
    assert {row["chosen"] for row in go(4.5)} == {"int4, group 32"}
    assert (run_dir / "mixed.old-1").is_dir()


def test_a_cache_is_trained_for_and_stays_with_the_model(new_teacher, text, tmp_path):
    """Through quantization, a stage after it, and evaluation; a head that its blocks do not divide is found before."""
    wide = new_teacher(tmp_path / "wide", 0, head_dim=32)
    start = "cache: {kind: quantize, student: teacher, kv_cache: q4_0, quantizer: q8_0"
    rounded = "rounded: {kind: quantize, student: teacher, kv_cache: q4_0, quantizer: q8_0, num_tokens: 0}"
    plain = "plain: {kind: quantize, student: teacher, quantizer: q8_0, num_tokens: 0}"
    late = f"late: {{kind: quantize, student: teacher, kv_cache: q4_0, from_step: 2, {TRAINING}}}"
    stages = (f"{start}, {TRAINING}}}", rounded, plain, late, f"on: {{kind: distill, student: cache, {TRAINING}}}")
    the_run = run(recipe_of(wide, text, *stages, "evaluate: {speed: null}"), tmp_path / "run")
    for name in ("cache", "rounded", "late"):
        assert the_run.done(name).figures["verified_worst_kl"] <= 1e-9
    assert the_run.done("cache").figures["scheme"] == "Q8_0; cache q4_0"
    for name in ("cache", "on"):
        config = json.loads((the_run.stage(name) / "model" / "config.json").read_text())
        assert config["kv_cache_type"] == "q4_0"
    measured = json.loads((the_run.stage("evaluate") / "rows.json").read_text())
    rows = {row["name"]: row["perplexity"] for row in measured}
    assert abs(rows["rounded"] / rows["teacher"] - 1) > 4 * abs(rows["plain"] / rows["teacher"] - 1)
    narrow = recipe_of(new_teacher(tmp_path / "narrow", 0), text, f"{start}, {TRAINING}}}")
    with pytest.raises(RecipeError, match=r"q4_0 needs head_dim \(8\) to be a multiple of its block size"):
        describe(narrow)
    with pytest.raises(InputError, match=r"q4_0 needs head_dim \(8\) to be a multiple of its block size"):
        run(narrow, tmp_path / "narrow-run")
