"""Trains over two processes and leaves what their optimizers saw, for test_distributed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from distill.data.loader import train_batches
from distill.data.micro_batches import MicroBatches
from distill.data.packed_rows import PackedRows
from distill.data.packing import TokenFile
from distill.data.teacher_cache.cache import CachedRows, CacheLocation
from distill.losses import LOSSES
from distill.training.cached_teacher import CachedTeacher
from distill.training.module import DistillationModule


class Watched(DistillationModule):
    spoilt = False

    def training_step(self, batch: Any, batch_index: int) -> torch.Tensor:
        bad = self.spoilt and self.trainer.global_rank == 1 and self.trainer.global_step == 0
        return super().training_step(batch, batch_index) * (float("nan") if bad else 1.0)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.seen = getattr(self, "seen", [])
        self.seen.append({name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None})


class Ranks(pl.LightningDataModule):
    """Either the batches of each rank, or a text and the cache of it that all ranks read."""

    def __init__(self, given: dict[str, Any]):
        super().__init__()
        self.given = given

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        rank = self.trainer.global_rank
        if "cache" in self.given:
            return train_batches(cached_rows(self.given["cache"]), 3, MicroBatches(2, 0, rank, 2))
        return DataLoader(self.given["batches"][rank], batch_size=None)


def cached_rows(cache: dict[str, Any]) -> CachedRows:
    blocks = PackedRows(TokenFile(**cache["tokens"]), cache["length"])
    return CachedRows(blocks, CacheLocation.there(Path(cache["folder"])))


def model(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    made = LlamaForCausalLM(LlamaConfig(**config))
    made.load_state_dict(weights)
    return made


def train(folder: Path) -> None:
    """Train what ``given.pt`` of the folder holds; in a process that has imported everything and run nothing."""
    given = torch.load(folder / "given.pt", weights_only=True)
    student, source = (model(given["config"][name], given[name]) for name in ("student", "teacher"))
    teacher: Any = source
    if "cache" in given:
        teacher = CachedTeacher(source.config.vocab_size, folder / "head.safetensors", whole=False)
    losses = [LOSSES[loss["kind"]].model_validate(loss) for loss in given["losses"]]
    module = Watched(student, losses, teacher)  # type: ignore[arg-type]
    module.spoilt = "spoilt" in given
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        max_steps=2,
        accumulate_grad_batches=given["accumulate"],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Keep(folder)],
    )
    trainer.fit(module, datamodule=Ranks(given))


class Keep(pl.Callback):
    def __init__(self, folder: Path):
        self.folder = folder

    def on_fit_end(self, trainer: pl.Trainer, module: Any) -> None:
        left = {"skipped": module.drain_skipped(), "seen": module.seen, "weights": module.state_dict()}
        torch.save(left, self.folder / f"rank{trainer.global_rank}.pt")
