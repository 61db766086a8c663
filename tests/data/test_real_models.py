"""Rows of text against real models: what they say in our rows is what transformers says of each document alone.

``DISTILL_MODELS`` names a folder with models in the layout of transformers, such as ``gemma3-270m``; without it these
tests are skipped, as the repository has no such model.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.real_text import PACKINGS, in_rows, pieces_alone
from distill.data.base import Document
from distill.data.encoder import TextEncoder
from distill.data.packed_rows import PackedRows
from distill.data.packing import write_tokens
from distill.data.python_docs import PythonDocs
from distill.data.tokenizer import load_tokenizer
from distill.evaluation.quality import measure_quality
from distill.models.load import load_model

MODELS = Path(os.environ.get("DISTILL_MODELS", "."))
LENGTH = 64
BEGINS = {"gemma3-270m": ["<bos>"], "smollm2-135m": []}


@pytest.fixture(scope="module", params=BEGINS)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, our model, transformers' model, texts, their token file)"""
    folder = MODELS / request.param
    if "DISTILL_MODELS" not in os.environ or not folder.is_dir():
        pytest.skip(f"DISTILL_MODELS names no folder with {request.param} in it")
    topics = [document.text for document in PythonDocs(parts="topics").documents()]
    texts = [topics[0][:700], topics[1][:90], topics[2][:200], topics[3][:40]]
    tokenizer, place = load_tokenizer(folder), tmp_path_factory.mktemp("tokens")
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    file = write_tokens(place / "text-0.bin", documents, TextEncoder(tokenizer), len(tokenizer), with_bytes=True)
    assert tokenizer.convert_ids_to_tokens(list(file.start)) == BEGINS[request.param]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return folder, load_model(str(folder), dtype=torch.float32), theirs, texts, file


@pytest.mark.parametrize("packing", PACKINGS)
def test_losses_in_rows_are_those_of_each_piece_alone(real: Any, packing: Any) -> None:
    folder, model, theirs, texts, file = real
    blocks = PackedRows(file, LENGTH, packing=packing)
    ours = in_rows(model, blocks, len(blocks))
    expected = pieces_alone(theirs, AutoTokenizer.from_pretrained(folder), texts, blocks, LENGTH, {*ours})
    assert ours.keys() == expected.keys()
    assert max(abs(ours[token] - expected[token]) for token in ours) < 2e-3
    quality = measure_quality(model, None, [blocks[[number]] for number in range(len(blocks))], 1)
    assert quality.tokens == len(expected)
    assert quality.loss_nats == pytest.approx(sum(expected.values()) / len(expected), abs=1e-4)


def test_without_its_first_token_gemma_does_not_know_the_text(real: Any) -> None:
    folder, model, _, _, file = real
    if not BEGINS[folder.name]:
        pytest.skip("its tokenizer puts nothing before a text")
    blocks, bare = PackedRows(file, LENGTH), PackedRows(replace(file, start=()), LENGTH)
    now, before = in_rows(model, blocks, len(blocks)), in_rows(model, bare, len(bare))
    both = now.keys() & before.keys()
    means = [sum(losses[token] for token in both) / len(both) for losses in (before, now)]
    assert means[0] - means[1] > 0.5  # nats; so much does a row without it cost
