"""Two processes over gloo take the step that one process takes over all of their tokens."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from distill.data.loader import train_batches
from distill.data.micro_batches import MicroBatches
from distill.data.packed_rows import PackedRows
from distill.data.packing import store_tokens
from distill.data.teacher_cache import Sampled
from distill.data.teacher_cache.cache import CachedRows, CacheLocation
from distill.data.teacher_cache.identity import Identity
from distill.data.teacher_cache.write_cache import Live, fill
from distill.losses import AttentionRelation, CrossEntropy, ForwardKL, HiddenCosine, HiddenMSE
from distill.models.head import hidden_states, output_head, save_head
from distill.training.cached_teacher import CachedTeacher
from distill.training.module import DistillationModule
from tests.faults.workers import Workers
from tests.training import two_ranks

VOCABULARY, LENGTH = 32, 8  # of the student in conftest


class Seen(pl.Callback):
    """Gradients as the optimizer takes them, which nothing clips here."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_zero_grad(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        kept = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        if kept:
            self.steps.append(kept)


ON_STATES = [ForwardKL(), HiddenMSE(weight=0.5), HiddenCosine(), AttentionRelation(layers="auto")]


@pytest.mark.parametrize("inner", [False, True], ids=["predictions", "states"])
def test_two_ranks_take_the_step_of_one(inner: bool, tmp_path: Path, module: Any, llama: Any, batch: Any) -> None:
    # 2 steps x 2 micro-batches x 2 ranks; the ranks' micro-batches count 0 to 14 tokens, one of them none at all
    pieces = [batch(5, 1), batch(0, 2), batch(6, 2), batch(2, 3), batch(8, 1), batch(11, 2), batch(16, 2), batch(20, 1)]
    sizes = [int(piece["mask"].sum()) for piece in pieces]
    assert min(sizes) == 0
    assert len(set(sizes)) > 4
    single: DistillationModule = module()
    if inner:  # with a map that is learned, which is of no rank's student
        single = DistillationModule(llama(0), ON_STATES, llama(1, hidden_size=24, num_hidden_layers=2))
    assert single.teacher is not None
    given = {**described(single, single.teacher.model), "batches": [pieces[0::2], pieces[1::2]]}
    hold_against_two_ranks(single, pieces, given, tmp_path)


def test_two_ranks_read_one_cache_and_take_the_step_of_one(tmp_path: Path, llama: Any) -> None:
    student, teacher = llama(0), llama(1)
    ids = np.random.default_rng(0).integers(1, VOCABULARY, 30 * LENGTH).astype(np.uint16)
    tokens = store_tokens(tmp_path / "train.bin", np.array_split(ids, 2 * LENGTH - 3), 0)
    codec, read = Sampled(draws=20), PackedRows(tokens, 2 * LENGTH, packing="documents")
    place = CacheLocation(tmp_path / "cache", Identity.of("t", "k", read, codec), codec, VOCABULARY, VOCABULARY)
    live = Live(lambda batch: hidden_states(teacher, **batch), output_head(teacher).logits, torch.device("cpu"))
    blocks = PackedRows(tokens, LENGTH)  # not the rows that the teacher read
    wanted = place.needed(blocks, range(len(blocks)))
    fill(place, tokens, wanted, lambda: live, batch_size=4, what="train", say=lambda line: None)
    save_head(teacher, tmp_path / "head.safetensors")
    cached = CachedTeacher(VOCABULARY, tmp_path / "head.safetensors", whole=False)
    single = DistillationModule(student, [ForwardKL(), CrossEntropy(weight=0.5)], cached)
    given = {
        **described(single, teacher),
        "cache": {"tokens": asdict(tokens), "length": LENGTH, "folder": str(place.folder)},
    }
    pieces = list(islice(train_batches(CachedRows(blocks, place), 3, MicroBatches(2)), 8))
    hold_against_two_ranks(single, pieces, given, tmp_path)


def described(module: DistillationModule, teacher: Any) -> dict[str, Any]:
    """What the script makes a module again from, beside what it trains on."""
    models = {"student": module.student, "teacher": teacher}
    return {
        "config": {
            name: {k: v for k, v in model.config.to_diff_dict().items() if isinstance(v, int | float | bool | None)}
            for name, model in models.items()
        },
        **{name: model.state_dict() for name, model in models.items()},
        "losses": [loss.model_dump() for _, loss in module.losses],
        "accumulate": 2,
    }


def test_a_bad_gradient_on_one_rank_is_passed_over_by_both(tmp_path: Path, module: Any, batch: Any) -> None:
    single: DistillationModule = module()
    assert single.teacher is not None
    pieces = [batch(2 * i, 2) for i in range(8)]
    given = {**described(single, single.teacher.model), "batches": [pieces[0::2], pieces[1::2]], "spoilt": True}
    first, second = in_two_processes(given, tmp_path)
    assert first["skipped"] == second["skipped"] == [True, False]
    for name in first["weights"]:
        assert torch.equal(first["weights"][name], second["weights"][name])
        assert first["weights"][name].isfinite().all()
    assert any(not torch.equal(first["weights"][name], w) for name, w in single.state_dict().items())


def in_two_processes(given: dict[str, Any], tmp_path: Path) -> list[dict[str, Any]]:
    """Train what is given, and what each rank leaves."""
    torch.save(given, tmp_path / "given.pt")
    with Workers() as workers:
        workers.call(two_ranks.train, tmp_path, log=tmp_path / "log", seconds=240)
    return [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def hold_against_two_ranks(
    single: DistillationModule, pieces: list[Any], given: dict[str, Any], tmp_path: Path
) -> None:
    """Train ``single`` on all pieces, and what was ``given`` in two processes; steps and weights must be the same."""
    ranks = in_two_processes(given, tmp_path)
    seen = Seen()
    from torch.utils.data import DataLoader

    single.optimizer_spec = type(single.optimizer_spec)()  # the script's: the defaults
    pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        accumulate_grad_batches=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[seen],
    ).fit(single, DataLoader(pieces, batch_size=None))  # type: ignore[arg-type]
    seen.on_before_zero_grad(single.trainer, single, None)
    assert [len(rank["seen"]) for rank in ranks] == [2, 2]
    assert len(seen.steps) == 2
    for step, expected in enumerate(seen.steps):
        for name, gradient in expected.items():
            for rank in ranks:
                torch.testing.assert_close(rank["seen"][step][name], gradient, rtol=1e-4, atol=1e-6)
    for name, weight in single.state_dict().items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name])
        torch.testing.assert_close(ranks[0]["weights"][name], weight, rtol=1e-4, atol=1e-5)
