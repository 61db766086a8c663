"""A text and a teacher for whole runs of seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": f"row {i} of the text that a small model reads, and {i * i} more words"} for i in range(80)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "model", seed=0)


def make_teacher(folder: Path, seed: int, **more: int) -> Path:
    from distill.data.tokenizer import train_tokenizer
    from distill.models.load import new_config, new_model

    tokenizer = train_tokenizer(["row of the text that a small model reads, and more words"] * 5, 270, folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    keys = {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3}
    new_model(new_config(keys | sizes | {"vocab_size": len(tokenizer)} | more), seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def new_teacher() -> Callable[..., Path]:
    """Another one: (folder, seed, keys of its config) -> folder."""
    return make_teacher
