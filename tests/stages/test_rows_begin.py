"""A whole run of a teacher whose tokenizer puts a token before every text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.real_text import alone
from distill.data.tokenizer import load_tokenizer
from distill.recipe import Recipe
from distill.runner import run
from distill.stages.evaluate.stored_rows import rows_of
from distill.training.metrics import read_rows

RECIPE = """\
name: tiny
teacher: {teacher}
data:
  train: {{kind: jsonl, path: {text}}}
  validation: {{kind: jsonl, path: {validation}}}
  sequence_length: 16
  packing: {packing}
  calibration_sequences: 4
stages:
  prune: {{keep: {{intermediate_size: 32}}}}
  live: {{kind: distill, student: prune, num_steps: 3, batch_size: 4}}
  cache: {{kind: cache_teacher, codec: hidden}}
  cached: {{kind: distill, student: prune, teacher: cache, num_steps: 3, batch_size: 4}}
  own:
    {{kind: distill, student: prune, num_steps: 2, batch_size: 4,
     on_policy: {{share: 1.0, max_new_tokens: 4, prompt_tokens: 2}}}}
  evaluate: {{models: [teacher], speed: null}}
compute: {{accelerator: cpu, log_every_steps: 1}}
logging: {{wandb: disabled}}
"""


@pytest.mark.parametrize("packing", ["wrapped", "best_fit"])
def test_it_is_measured_trained_cached_and_sampled_from_as_it_reads(
    packing: str, new_teacher: Any, text: Path, tmp_path: Path
) -> None:
    folder = new_teacher(tmp_path / "model", seed=1, vocab_size=272, eos_token_id=0)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<begin> $A", pair="<begin> $A $B", special_tokens=[("<begin>", begin)]
    )
    tokenizer.save_pretrained(folder)
    validation, texts = tmp_path / "validation.jsonl", [f"words that nobody trains on, {i * i}" for i in range(7)]
    validation.write_text("".join(json.dumps({"text": line}) + "\n" for line in texts))
    recipe = Recipe.from_text(RECIPE.format(teacher=folder, text=text, validation=validation, packing=packing))
    said: list[str] = []
    the_run = run(recipe, tmp_path / "run", say=said.append)
    assert any("each row begins with '<begin>'" in line for line in said)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain, wrapped = AutoTokenizer.from_pretrained(folder), packing == "wrapped"
    expected = alone(model, plain, texts, 16, wrapped=wrapped, wanted={*range(10_000)})
    row = next(row for row in rows_of(the_run, ["evaluate"]) if row.name == "teacher")
    assert math.log(row.perplexity) == pytest.approx(sum(expected.values()) / len(expected), rel=1e-5)
    num_bytes = sum(len(text.encode()) for text in texts)  # all but what begins the piece of a longer document
    assert 0.7 * num_bytes < sum(expected.values()) / math.log(2) / row.bits_per_byte <= num_bytes

    live, cached, own = (read_rows(the_run.stage(name)) for name in ("live", "cached", "own"))
    for one, other in zip(live, cached, strict=True):
        for key in one:
            if key.endswith("kl"):
                assert other[key] == pytest.approx(one[key], rel=0.02), key
    assert all(row["on_policy/length"] > 0 for row in own if "lr" in row)  # every row had something to continue
