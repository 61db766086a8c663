"""Losses whose settings change during the run: once an optimizer step, the same after a kill, and in the metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from distill.losses import CrossEntropy, ForwardKL, JensenShannon, LossSpec, Schedule
from distill.training.checkpoint import checkpoint_path
from distill.training.metrics import read_rows
from distill.training.module import DistillationModule
from distill.training.spec import OptimizerSpec

STEPS, BATCH = 6, 4


def losses() -> list[LossSpec]:
    return [
        ForwardKL(weight=0.7, temperature=Schedule(kind="linear", start=4, end=1, share=0.5)),
        JensenShannon(beta=Schedule(kind="cosine", start=0.1, end=0.9)),
        CrossEntropy(weight=Schedule(kind="linear", start=0, end=0.6)),
    ]


EXPECTED = {
    "forward_kl.temperature": [4, 3, 2, 1, 1, 1],
    "jensen_shannon.beta": [0.1, 0.153590, 0.3, 0.5, 0.7, 0.846410],
    "cross_entropy.weight": [0, 0.1, 0.2, 0.3, 0.4, 0.5],
}
"""Settings of steps 0 to 5 of 6."""


@pytest.fixture
def scheduled(student: Any, llama: Any) -> Any:
    def make(used: list[LossSpec] | None = None, num_steps: int | None = STEPS) -> DistillationModule:
        torch.manual_seed(3)
        optimizer = OptimizerSpec(lr=1e-2, warmup_steps=2)
        wrapped = student("full", attention_dropout=0.1).model
        return DistillationModule(wrapped, used or losses(), llama(1), optimizer=optimizer, num_steps=num_steps)

    return make


class Pulled(Exception):
    """Stands for a kill."""


def pull() -> None:
    raise Pulled


def test_the_settings_of_every_step_are_in_the_metrics(scheduled: Any, train: Any, tmp_path: Path) -> None:
    train(scheduled(), micro=2, log_every_steps=1)
    rows = [row for row in read_rows(tmp_path / "stage") if "lr" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for setting, expected in EXPECTED.items():
        assert [row[f"train/{setting}"] for row in rows] == pytest.approx(expected, abs=1e-5), setting
    assert "train/forward_kl.weight" not in rows[0]  # a plain number stands in the recipe
    assert {"train/forward_kl", "train/jensen_shannon", "train/cross_entropy", "train/kl"} <= set(rows[0])


def test_without_a_schedule_the_metrics_are_as_ever(module: Any, train: Any, tmp_path: Path) -> None:
    train(module(), log_every_steps=1)
    names = {key for row in read_rows(tmp_path / "stage") for key in row if key.startswith("train/")}
    assert names == {"train/forward_kl", "train/cross_entropy", "train/kl"}


def test_a_kill_changes_no_bit(scheduled: Any, train: Any, tmp_path: Path) -> None:
    """Checkpoint at step 3, killed at step 4."""
    train(scheduled(), "straight", log_every_steps=1)
    with pytest.raises(Pulled):
        train(scheduled(), "resumed", at={4 * BATCH: pull}, log_every_steps=1)
    assert train(scheduled(), "resumed", log_every_steps=1) == ["  resuming from step 3 of 6 (step=00000003.ckpt)"]
    ours, theirs = (
        torch.load(checkpoint_path(tmp_path / name / "checkpoints", STEPS), weights_only=True)["state_dict"]
        for name in ("resumed", "straight")
    )
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    timed = ("perf/", "memory/")
    rows = [
        [{k: v for k, v in row.items() if not k.startswith(timed)} for row in read_rows(tmp_path / name)]
        for name in ("resumed", "straight")
    ]
    assert rows[0] == rows[1]


class Settings(pl.Callback):
    """The settings of every micro-batch, and the gradient that the optimizer sees."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.gradients: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> None:
        self.seen.append(module.drain_terms().get("forward_kl.temperature", 0.0))

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        found = [p.grad.flatten().clone() for p in module.student.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(found))


def fit(module: DistillationModule, batches: Any, **settings: Any) -> Settings:
    watch = Settings()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=[watch], enable_model_summary=False, **quiet, **{"max_steps": 3} | settings
    )
    trainer.fit(module, batches)
    return watch


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"max_steps": -1, "max_epochs": 1}])
def test_all_micro_batches_of_a_step_share_its_settings(length: Any, scheduled: Any, loader: Any) -> None:
    """Also where the length is left to the Trainer."""
    used: list[LossSpec] = [ForwardKL(temperature=Schedule(kind="linear", start=4, end=1))]
    watch = fit(scheduled(used, None), loader(6), accumulate_grad_batches=2, **length)
    assert watch.seen == pytest.approx([4, 4, 3, 3, 2, 2])


def test_the_gradient_is_that_of_the_settings_of_the_step(scheduled: Any, loader: Any) -> None:
    """A constant schedule is the number; a moving one has the number's gradient at its first step and not after."""
    number, constant, moving = (
        fit(scheduled([ForwardKL(weight=0.5, temperature=temperature)]), loader(3)).gradients
        for temperature in (3.0, Schedule(kind="constant", start=3), Schedule(kind="linear", start=3, end=1))
    )
    assert all(torch.equal(a, b) for a, b in zip(constant, number, strict=True))
    assert torch.equal(moving[0], number[0])
    assert not torch.allclose(moving[1], number[1], rtol=1e-3)


def test_validation_does_not_depend_on_the_schedule(scheduled: Any, loader: Any) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    means = []
    for used in (losses(), [ForwardKL()]):
        model = scheduled(used)
        trainer.validate(model, loader(2), verbose=False)
        means.append(model.validation_means())
    assert means[0] == means[1]
    assert set(means[0]) == {"cross_entropy", "kl"}
