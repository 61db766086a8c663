"""Codecs, a tiny teacher and its text, as the tests of the cache share them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.data.packed_rows import PackedRows
from distill.data.packing import store_tokens
from distill.data.teacher_cache import Hidden, Sampled, TopK
from distill.data.teacher_cache.base import CodecSpec
from distill.data.teacher_cache.cache import CacheLocation
from distill.data.teacher_cache.fidelity import signal_of
from distill.data.teacher_cache.identity import Identity
from distill.data.teacher_cache.write_cache import Live, fill
from distill.losses import forward_kl
from distill.losses.sparse import SparseSignal, sparse_forward_kl

VOCABULARY, WIDTH, LENGTH = 40, 8, 16


def logits_of(rows: int, vocabulary: int = VOCABULARY, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def coded(codec: CodecSpec, log_probs: Tensor, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The bytes, and what is decoded from them."""
    fields = codec.encode(log_probs, torch.Generator().manual_seed(seed))
    data = codec.pack(fields, log_probs.shape[-1])
    return data, codec.decode(data, *log_probs.shape)


def sparse(codec: CodecSpec, teacher: Tensor, seed: int = 0) -> SparseSignal:
    signal = signal_of(coded(codec, teacher.log_softmax(-1), seed)[1], teacher.shape[-1], None)
    assert isinstance(signal, SparseSignal)
    return signal


def value_and_gradient(student: Tensor, signal: Tensor | SparseSignal) -> tuple[float, Tensor]:
    student = student.clone().requires_grad_()
    on = torch.ones(len(student), dtype=torch.bool)
    term = (
        sparse_forward_kl(student, signal, on) if isinstance(signal, SparseSignal) else forward_kl(student, signal, on)
    )
    return float(term.sum.detach()), torch.autograd.grad(term.sum, student)[0]


def make_blocks(file: Path, seed: int = 0) -> PackedRows:
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, 19 * LENGTH + 7).astype(np.uint16)
    return PackedRows(store_tokens(file, [ids], 0), LENGTH)


class Teacher:
    """A frozen little model that notes what it was asked, and can be killed."""

    def __init__(self, dies_after: int | None = None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding = nn.Embedding(VOCABULARY, WIDTH)
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.batches = 0
        self.dies_after = dies_after

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        self.batches += 1
        if self.dies_after is not None and self.batches > self.dies_after:
            raise KeyboardInterrupt
        return self.embedding(batch["input_ids"])

    def __call__(self) -> Live:
        return Live(self.hidden, lambda rows: 3 * self.head(rows), torch.device("cpu"))


def place_of(
    folder: Path, blocks: PackedRows, codec: CodecSpec, teacher: str = "t", tokenizer: str = "k"
) -> CacheLocation:
    width = WIDTH if codec.reads == "hidden" else VOCABULARY
    return CacheLocation(folder, Identity.of(teacher, tokenizer, blocks, codec), codec, width, VOCABULARY)


every_codec = pytest.mark.parametrize("codec", [TopK(k=4), Sampled(draws=5), Hidden()], ids=lambda codec: codec.kind)


def fill_all(
    place: CacheLocation, blocks: PackedRows, wanted: Any = range(20), teacher: Teacher | None = None
) -> list[str]:
    said: list[str] = []
    wanted = place.needed(blocks, list(wanted))
    fill(place, blocks.tokens, wanted, teacher or Teacher(), batch_size=2, what="train", say=said.append)
    return said


def files(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("shard-*"))}
