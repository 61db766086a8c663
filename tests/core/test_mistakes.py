"""What a recipe's mistakes say: where a key belongs, and what the right form looks like."""

from __future__ import annotations

import pytest

from distill.core.errors import RecipeError
from distill.recipe import Recipe

RECIPE = """\
name: tiny
teacher: builtin:quickstart-teacher
data:
  train: {kind: python_docs}
  sequence_length: 16
stages:
  prune:
    keep: {intermediate_size: 32}
  distill:
    {student: prune, num_steps: 1, batch_size: 2}
"""
DISTILL = "{student: prune, num_steps: 1, batch_size: 2}"


def said(old: str, new: str) -> str:
    """The one mistake of the recipe with a change in it."""
    assert old in RECIPE
    with pytest.raises(RecipeError) as caught:
        Recipe.from_text(RECIPE.replace(old, new), "r.yaml")
    assert len(caught.value.mistakes) == 1, caught.value.mistakes
    return caught.value.mistakes[0]


def in_distill(more: str) -> str:
    return said(DISTILL, f"{{student: prune, num_steps: 1, batch_size: 2, {more}}}")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("lr: 1e-3", "stages.distill.lr: unknown key here; write optimizer: {lr: 0.001}"),
        ("learning_rate: 1e-3", "write optimizer: {lr: 0.001}"),
        ("rank: 8", "write lora: {r: 8}"),
        ("temperature: 2", "write losses: [{kind: forward_kl, temperature: 2}]"),
        ("gpus: 4", "write compute: {devices: 4} at the top of the recipe"),
        ("gradient_accumulation_steps: 4", "write compute: {micro_batch_size: ...} at the top of the recipe"),
        ("max_steps: 9", "unknown key; it is called num_steps here"),
        ("batchsize: 4", "unknown key; did you mean 'batch_size'?"),
        ("nonsense: 4", "unknown key (expected one of kind, "),
    ],
)
def test_an_unknown_key_is_looked_for_in_the_whole_recipe(more: str, message: str) -> None:
    assert message in in_distill(more)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{intermediate_size: 32}", "{num_layers: 3}", "it is called num_hidden_layers here"),
        ("keep: {intermediate_size: 32}", "keep: {}\n    num_layers: 3", "write keep: {num_hidden_layers: 3}"),
        ("sequence_length: 16", "max_length: 16\n  sequence_length: 16", "it is called sequence_length here"),
        ("sequence_length: 16", "lr: 3\n  sequence_length: 16", "write optimizer: {lr: 3} in a stage (finetune, "),
    ],
)
def test_it_is_looked_for_from_every_section(old: str, new: str, message: str) -> None:
    assert message in said(old, new)


TEXT, LENGTH = "{kind: python_docs}", "sequence_length: 16"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (TEXT, f"[{TEXT}]", "must be one source, not a list; such as train: {kind: python_docs}"),
        (LENGTH, "sequence_length: two", "must be a whole number (got 'two')"),
        (LENGTH, "sequence_length: 0", "must be at least 2 (got 0)"),
        (LENGTH, f"{LENGTH}\n  packing: best", "'padded' (got 'best')"),
        ("student: prune", "student: {config: {}}", "must name a model: an earlier stage, teacher, "),
        ("student: prune", "student: distill", "a stage cannot read what it makes itself"),
        (
            "student: prune",
            "student: prune, lora: true",
            "such as lora: {} for its defaults, or lora: {r: ...} (got true)",
        ),
        (
            "student: prune",
            "student: prune, losses: reverse_kl",
            "must be a list, such as losses: [reverse_kl] (got 'reverse_kl')",
        ),
        ("student: prune", "student: prune, losses: [kl]", "no loss called 'kl'; it is called forward_kl here"),
        (
            "  distill:",
            "  mine:",
            "no stage called 'mine'. A stage with a name of its own says its kind, such as mine: {",
        ),
        (
            f"  distill:\n    {DISTILL}",
            "  export: my/model",
            "a stage needs a mapping of keys to values, such as export: {model: my/model}",
        ),
        ("  prune:\n    keep", "  prune:\n      a: 3\n    keep", "not valid YAML: this line is indented unlike those"),
    ],
)
def test_a_wrong_form_is_answered_with_the_right_one(old: str, new: str, message: str) -> None:
    assert message in said(old, new)


def test_a_quantizer_by_its_common_name() -> None:
    text = RECIPE + "  quantize: {student: distill, num_tokens: 0, quantizer: int4}\n"
    with pytest.raises(RecipeError, match="no quantizer called 'int4'; it is called int_group here"):
        Recipe.from_text(text)
    with pytest.raises(RecipeError, match=r"write quantizer: \{kind: int_group, bits: 4\}"):
        Recipe.from_text(text.replace("quantizer: int4", "bits: 4"))
    with pytest.raises(RecipeError, match=r"must be a list, such as layers: \[\{"):
        Recipe.from_text(text.replace("quantizer: int4", "layers: 4"))
    with pytest.raises(RecipeError, match=r"stages.quantize.layers.0.quantiser: unknown key; did you mean 'quantizer'"):
        Recipe.from_text(text.replace("quantizer: int4", "layers: [{quantiser: ternary}]"))
    with pytest.raises(RecipeError, match="stages: must not be empty"):
        Recipe.from_text(RECIPE, set=["stages={}"])
