"""What a small model learns of a document: closed book before, by prompt distillation, by training on text, and open.

    python -m benchmarks.knowledge --model FOLDER --qna FILE --controls FILE... --out FOLDER [--seeds 3] [--steps 60]

Five passages of one document are taught by `knowledge_questions.jsonl` (46 pairs written for this benchmark) and by
questions that the model itself writes. The exam is the pairs of the qna.yaml, which nobody trains on; the questions of
the controls are about documents that are not trained. All trainings have the same steps, batch and adapters.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from benchmarks.result import write
from distill.data.documents import plain
from distill.data.qna import read_qna
from distill.recipe import Recipe
from distill.runner import run

PAIRS = Path(__file__).with_name("knowledge_questions.jsonl")
ARMS = {
    "prompt_distillation": "prompt distillation",
    "text_training": "training on the same rows",
    "raw_document": "training on the raw document",
}
TRAIN = "num_steps: {steps}, batch_size: 4, optimizer: {{lr: {lr}, weight_decay: 0}}, lora: {{r: 16, alpha: 32}}"
RECIPE = """\
name: knowledge
teacher: {model}
seed: {seed}
data:
  train: {{kind: chat, path: {folder}/replay.jsonl}}
  sequence_length: 512
  packing: padded
stages:
  facts:
    kind: synthesize
    make:
      {{kind: qna, path: {folder}/qna.yaml, documents: {folder}/document.md, views: [text], questions_per_view: 5,
       max_new_tokens: 96, answer_tokens: 48, chunk_words: 220,
       exam: {{pairs_per_seed: 0, files: ["{folder}/exam.yaml"], controls: {controls}}}}}
    batch_size: 10
"""
STAGES = """\
  prompt_distillation:
    {{kind: distill, student: teacher, teacher: self, teacher_reads: document, {train}, data: {rows}}}
  text_training:
    {{kind: finetune, model: teacher, {train}, data: {rows}}}
  raw_document:
    kind: finetune
    model: teacher
    {train_lines}
    data:
      train: {{kind: text_files, path: {folder}/document.md}}
      validation: {{kind: text_files, path: {folder}/exam.txt}}
      sequence_length: 256
      packing: wrapped
  exam: {{questions: facts, models: [teacher, prompt_distillation, text_training, raw_document], baseline: teacher}}
compute: {{accelerator: cpu, checkpoint_every_steps: 1000, log_every_steps: 5}}
logging: {{wandb: disabled, hardware: false}}
"""
