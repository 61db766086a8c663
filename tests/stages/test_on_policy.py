"""On-policy stages in whole runs, and one line for each mistake before anything is trained."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.core.errors import InputError, RecipeError
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
stages:
  distill:
    student: {student}
    num_steps: 3
    batch_size: 4
    losses: [jensen_shannon, {{kind: cross_entropy, weight: 0.1}}]
    on_policy: {{share: 0.5, prompt_tokens: 4, max_new_tokens: 8}}
  quantize:
    {{student: distill, num_steps: 1, batch_size: 4, lora: {{r: 2}}, losses: [reverse_kl],
     on_policy: {{share: 1, prompt_tokens: 4, max_new_tokens: 8}}}}
compute: {{accelerator: cpu, log_every_steps: 1, micro_batch_size: 2, gradient_checkpointing: true}}
logging: {{wandb: disabled}}
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": f"row {i} of the text that a small model reads, and {i * i} more words"} for i in range(80)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_model(folder: Path, **config: Any) -> Path:
    from distill.data.tokenizer import train_tokenizer
    from distill.models.load import new_config, new_model

    tokenizer = train_tokenizer(["row of the text that a small model reads, and more words"] * 5, 270, folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    keys = {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3}
    ends = {"eos_token_id": tokenizer.eos_token_id}
    new_model(new_config(keys | sizes | {"vocab_size": len(tokenizer)} | ends | config), seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("teacher") / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("student") / "model")


@pytest.fixture
def recipe(teacher: Path, student: Path, text: Path) -> Any:
    def make(set: tuple[str, ...] = (), **names: Any) -> Recipe:
        return Recipe.from_text(
            RECIPE.format(**{"teacher": teacher, "student": student, "text": text} | names), set=set
        )

    return make


def test_weights_and_then_adapters_under_fake_quant_learn_from_own_sequences(recipe: Any, tmp_path: Path) -> None:
    done = run(recipe(set=("seed=3",)), tmp_path / "run", say=lambda line: None)
    for stage, steps in (("distill", 3), ("quantize", 1)):
        rows = [row for row in read_rows(done.stage(stage)) if "lr" in row]
        shares = [row["on_policy/generated_share"] for row in rows]
        own = [share > 0 for share in shares]
        assert len(own) == steps
        assert any(own)
        assert (False in own) == (stage == "distill")
        assert [own_step == ("on_policy/kl" in row) for own_step, row in zip(own, rows, strict=True)] == [True] * steps
        assert done.done(stage).figures["training_tokens"] == rows[-1]["tokens"] < steps * 4 * 16  # type: ignore[union-attr]
        text_steps = [row for row in rows if "train/cross_entropy" in row]
        assert len(text_steps) == own.count(False)  # it has no meaning on own sequences


@pytest.mark.parametrize(
    ("set", "line"),
    [
        (
            ("stages.distill.on_policy.max_new_tokens=13",),
            "stages.distill.on_policy: prompt_tokens (4) + max_new_tokens (13) = 17 must fit a row",
        ),
        (
            ("stages.distill.on_policy.share=2",),
            "stages.distill.on_policy.share: must be at most 1",
        ),
        (
            ("stages.quantize.num_steps=0",),
            "nothing is trained (a budget of 0), so without effect: batch_size, losses, on_policy, lora; remove",
        ),
    ],
)
def test_mistakes_in_the_recipe(set: tuple[str, ...], line: str, recipe: Any) -> None:
    with pytest.raises(RecipeError, match=re.escape(line)):
        recipe(set=set)


def test_a_cache_cannot_say_what_nobody_has_asked_it(recipe: Any) -> None:
    stages = {"cache": {"kind": "cache_teacher", "codec": "hidden"}}
    stages |= {name: stage.model_dump() for name, stage in recipe().stages.items()}
    stages["distill"]["teacher"] = "cache"
    text = json.dumps(recipe().model_dump(mode="json") | {"stages": stages}, default=str)
    with pytest.raises(RecipeError, match="'cache' holds what its teacher says of the text, and on_policy asks about"):
        Recipe.from_text(text)


def test_unlike_ends_are_exit_code_2_before_anything_runs(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from distill.cli import main

    base = make_model(tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    (tmp_path / "tiny.yaml").write_text(recipe(student=base).dump())
    for verb in ("check", "run"):
        monkeypatch.setattr(sys, "argv", ["distill", verb, str(tmp_path / "tiny.yaml")])
        with pytest.raises(SystemExit) as stopped:
            main()
        lines = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2
        assert len(lines) == 2  # the quantize stage would start from that student
        for stage, line in zip(("distill", "quantize"), lines, strict=True):
            assert (
                f"stages.{stage}: on_policy: the student ends a text with token 0 or 5, the teacher with 0, so" in line
            )
    # whoever comes past the check meets it again before the training
    with pytest.raises(InputError, match=r"stages.distill: on_policy: the student ends a text with token 0 or 5"):
        run(recipe(student=base), tmp_path / "run", say=lambda line: None)


def test_models_that_end_unlike_the_text_are_refused(recipe: Any, tmp_path: Path) -> None:
    both = {name: make_model(tmp_path / name, eos_token_id=7) for name in ("student", "teacher")}
    with pytest.raises(InputError, match=r"both models end a text with token 7, the run's tokenizer with 0"):
        run(recipe(**both), tmp_path / "run", say=lambda line: None)
