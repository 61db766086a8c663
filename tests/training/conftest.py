"""Tiny students and teachers, and rows whose numbers of counted tokens differ widely."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from distill.core.batch import causal_batch
from distill.losses import CrossEntropy, ForwardKL
from distill.models.layouts import layout_for
from distill.models.lora import LoraSpec
from distill.pruning.mask import apply_mask, freeze_zeros, masked_layers
from distill.quantization import Int8Channel, IntGroup
from distill.quantization.base import QuantizerSpec
from distill.training.assemble import Student, assemble
from distill.training.module import DistillationModule
from distill.training.spec import BudgetSpec, ComputeSpec, OptimizerSpec

VOCABULARY, LENGTH = 32, 8
Batch = dict[str, Tensor]


def row(position: int) -> Batch:
    """One sequence; every fifth counts for nothing, the others for one to seven tokens."""
    random = torch.Generator().manual_seed(1000 + position)
    mask = torch.arange(LENGTH) < (0 if position % 5 == 0 else 1 + position * 3 % 7)
    ids = torch.randint(0, VOCABULARY, (LENGTH,), generator=random)
    return causal_batch(ids, mask)


def rows(start: int, count: int) -> Batch:
    """``count`` sequences as a batch."""
    picked = [row(start + i) for i in range(count)]
    return {key: torch.stack([one[key] for one in picked]) for key in picked[0]}


class Stream:
    """Micro-batches without end; ``at`` runs a function when the batch that starts at a position is asked for."""

    def __init__(self, micro: int, consumed: int, at: dict[int, Callable[[], Any]] | None = None):
        self.micro, self.consumed, self.at = micro, consumed, at or {}

    def __iter__(self) -> Iterator[Batch]:
        for start in itertools.count(self.consumed, self.micro):
            if start in self.at:
                self.at[start]()
            yield rows(start, self.micro)


class Validation:
    """Two batches, of two rows and of one; ``at`` as above."""

    def __init__(self, at: dict[int, Callable[[], Any]]):
        self.at = at

    def __iter__(self) -> Iterator[Batch]:
        for start, count in ((500, 2), (502, 1)):
            if start in self.at:
                self.at[start]()
            yield rows(start, count)


@pytest.fixture
def batch() -> Callable[[int, int], Batch]:
    return rows


@pytest.fixture
def loader() -> Callable[..., DataLoader[Batch]]:
    """A finite loader of so many micro-batches."""

    def make(count: int, micro: int = 2, start: int = 0) -> DataLoader[Batch]:
        return DataLoader([rows(start + i * micro, micro) for i in range(count)], batch_size=None)  # type: ignore[arg-type]

    return make


@pytest.fixture
def llama() -> Callable[..., LlamaForCausalLM]:
    def make(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
        config = LlamaConfig(
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "initializer_range": 0.3,
                "eos_token_id": None,
                "bos_token_id": None,
                **settings,
            }
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(config)

    return make


@pytest.fixture
def student(llama: Callable[..., LlamaForCausalLM]) -> Callable[..., Student]:
    """The same student at every call, wrapped in one of the ways a stage knows."""

    def make(way: str = "full", **settings: Any) -> Student:
        head: QuantizerSpec = Int8Channel(skip=()) if "head" in way else Int8Channel()
        if "learned" in way:
            head = IntGroup(bits=3, group_size=8, scale="learned")
        targets = ("q_proj", "down_proj", "lm_head") if "head" in way else "all-linear"
        lora = LoraSpec(r=2, target_modules=targets, dropout=0.0 if "quant" in way else 0.1) if "lora" in way else None
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = llama(0, **settings)
            if "masked" in way:
                layers = masked_layers(model, layout_for("llama"))
                apply_mask(layers, "2:4", 0.5, {})
                freeze_zeros(layers)
            ends = Int8Channel() if "ends" in way else None
            return assemble(model, quantizer=head if "quant" in way else None, embeddings=ends, lora=lora)

    return make


@pytest.fixture
def module(
    llama: Callable[..., LlamaForCausalLM], student: Callable[..., Student]
) -> Callable[..., DistillationModule]:
    """A distillation of a student wrapped in some way, from the same teacher at every call."""

    def make(way: str = "full", lr: float = 1e-2, steps: int | None = None, **settings: Any) -> DistillationModule:
        losses = [ForwardKL(temperature=2.0), CrossEntropy(weight=0.5)]
        optimizer = OptimizerSpec(lr=lr, warmup_steps=2)
        steps_of = {key: int(step) for key, _, step in (word.partition("=") for word in way.split()) if step}
        return DistillationModule(
            student(way, **settings).model,
            losses,
            llama(1),
            optimizer=optimizer,
            num_steps=steps,
            quantized_from_step=steps_of.get("late", 0),
            held_from_step=steps_of.get("held"),
            log=False,
        )

    return make


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., list[str]]:
    """Run ``fit`` for 6 steps of 4 sequences; returns what it said."""
    from distill.training.trainer import fit

    def run(
        module: DistillationModule,
        folder: str | Path = "stage",
        *,
        micro: int = 2,
        at: dict[int, Callable[[], Any]] | None = None,
        num_steps: int = 6,
        validate_every_steps: int | None = 2,
        **compute: Any,
    ) -> list[str]:
        said: list[str] = []
        fit(
            module,
            BudgetSpec(
                num_steps=num_steps,
                batch_size=4,
                validate_every_steps=validate_every_steps,
                optimizer=module.optimizer_spec,
            ),
            ComputeSpec(
                **{"accelerator": "cpu", "micro_batch_size": micro, "checkpoint_every_steps": 3, "log_every_steps": 2}
                | compute
            ),
            name="distill",
            folder=tmp_path / folder,
            tokens_per_sequence=LENGTH,
            train_loader=lambda size, consumed: Stream(size, consumed, at),
            validation_loader=Validation(at or {}),
            say=said.append,
        )
        return said

    return run
