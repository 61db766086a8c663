"""Twenty blocks of text, and shards so small that they need several."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.data.packed_rows import PackedRows
from distill.data.teacher_cache import write_cache as writing

from .caches import (
    make_blocks,
)


@pytest.fixture
def blocks(tmp_path: Path) -> PackedRows:
    """20 blocks, the last of them not full."""
    return make_blocks(tmp_path / "train.bin")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_SHARD_BYTES", 800)
