"""Rows of documents in whole runs: every stage reads them alike, and a model that mixes documents is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.core.batch import model_inputs
from distill.core.errors import InputError
from distill.data.corpus import Corpus
from distill.forecast import describe
from distill.models.load import load_model, new_config, new_model
from distill.recipe import Recipe
from distill.runner import run
from distill.training.metrics import read_rows

RECIPE = """\
name: tiny
teacher: {teacher}
data:
  train: {{kind: jsonl, path: {text}}}
  sequence_length: 32
  validation_tokens: 200
  packing: {packing}
stages:
  cache: {{kind: cache_teacher, codec: hidden}}
  prune: {{keep: {{intermediate_size: 48}}, calibration_batch_size: 4}}
  live: {{kind: distill, student: prune, {budget}}}
  cached: {{kind: distill, student: prune, teacher: cache, {budget}}}
  evaluate: {{models: [teacher, live], speed: null}}
compute: {{accelerator: cpu, micro_batch_size: 2, log_every_steps: 1}}
logging: {{wandb: disabled}}
"""
TOKENS = 400
BUDGET = f"num_tokens: {TOKENS}, batch_size: 4, validate_every_steps: 1"


@pytest.fixture
def short_text(tmp_path: Path) -> Path:
    """Documents of 5 to 60 bytes, that is, about as many tokens."""
    file = tmp_path / "text.jsonl"
    rows = [{"text": " ".join(["row", "text", "model", "words"] * 3)[: 4 + i * 7 % 53] + f" {i}"} for i in range(90)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe(teacher: Path, text: Path, packing: str) -> Recipe:
    return Recipe.from_text(RECIPE.format(teacher=teacher, text=text, packing=packing, budget=BUDGET))


@pytest.mark.parametrize("packing", ["documents", "best_fit", "padded"])
def test_every_stage_reads_each_document_alone(packing: str, teacher: Path, short_text: Path, tmp_path: Path) -> None:
    plan = recipe(teacher, short_text, packing)
    done = run(plan, tmp_path / "run", say=lambda _: None)
    model = load_model(str(teacher), dtype="float32")
    from distill.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(teacher))
    corpus = Corpus.open(plan.data, tokenizer, done.folder / "data", plan.seed, len(tokenizer))

    rows = {row["name"]: row for row in json.loads((done.stage("evaluate") / "rows.json").read_text())}
    ids = torch.from_numpy(corpus.validation.tokens.ids().astype("int64"))
    nats, count = 0.0, 0
    with torch.no_grad():
        for number in range(len(corpus.validation)):
            for start, size in corpus.validation.pieces(number):
                if size > 1:
                    alone = ids[start : start + size].unsqueeze(0)
                    nats += (size - 1) * float(model(input_ids=alone, labels=alone).loss)
                    count += size - 1
    assert rows["teacher"]["loss_nats"] == pytest.approx(nats / count, rel=1e-4)

    live, cached = (read_rows(done.stage(name)) for name in ("live", "cached"))
    steps = math.ceil(TOKENS / (4 * corpus.tokens_per_sequence))
    assert [row["step"] for row in live if "train/kl" in row] == list(range(1, steps + 1))
    for ours, theirs in zip(live, cached, strict=True):
        for key in ("train/kl", "val/kl", "val/cross_entropy"):
            if key in ours:
                assert ours[key] == pytest.approx(theirs[key], rel=0.02, abs=1e-3)  # hidden states in bf16
    final = [row["val/cross_entropy"] for row in live if "val/cross_entropy" in row][-1]
    assert rows["live"]["loss_nats"] == pytest.approx(final, rel=1e-3)


def test_calibration_reads_packed_rows_too(teacher: Path, short_text: Path, tmp_path: Path) -> None:
    """What the criterion sees of a document does not depend on what stands before it."""
    from distill.data.tokenizer import load_tokenizer

    tokenizer, plan = load_tokenizer(str(teacher)), recipe(teacher, short_text, "best_fit")
    corpus = Corpus.open(plan.data, tokenizer, tmp_path / "data", plan.seed, len(tokenizer))
    batch = next(iter(corpus.calibration_loader(batch_size=4)))
    assert set(model_inputs(batch)) == {"input_ids", "position_ids"}


@pytest.mark.parametrize(
    ("packing", "line"),
    [
        ("documents", "512 tokens = 4 steps of 4 x 32"),
        ("best_fit", "400 tokens = at least 4 steps of 4 x 32"),
        ("padded", "400 tokens = at least 4 steps of 4 x 32"),
    ],
)
def test_the_plan_says_what_it_cannot_know_yet(packing: str, line: str, teacher: Path, short_text: Path) -> None:
    plan = describe(recipe(teacher, short_text, packing))
    assert line in plan
    assert f"rows of 32 tokens ({packing})" in plan


def test_a_model_that_mixes_documents_is_refused(teacher: Path, short_text: Path, tmp_path: Path) -> None:
    from distill.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(teacher))
    sizes: dict[str, Any] = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = new_config({"model_type": "opt", "vocab_size": len(tokenizer), "word_embed_proj_dim": 16} | sizes)
    folder = tmp_path / "opt"
    new_model(config, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tail = RECIPE[RECIPE.index("compute:") :]
    stages = {
        "evaluate": "  evaluate: {{speed: null}}\n",
        "student": "  finetune: {{model: teacher, num_steps: 1, batch_size: 2}}\n",
        "cache": "  cache_teacher: {{codec: hidden}}\n",
    }
    for name, stage in stages.items():
        text = (RECIPE[: RECIPE.index("  cache:")] + stage + tail).format(
            teacher=folder, text=short_text, packing="documents"
        )
        with pytest.raises(InputError, match="OPTForCausalLM does not separate the documents in one row"):
            run(Recipe.from_text(text), tmp_path / name, say=lambda _: None)
