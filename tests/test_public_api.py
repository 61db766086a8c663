"""What people import: it stays, it is light, and it works with a plain Lightning Trainer."""

from __future__ import annotations

import subprocess
import sys

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import distill
from distill.core.batch import causal_batch


def test_the_public_names_are_there() -> None:
    assert set(distill.__all__) >= {"Recipe", "run", "DistillationModule", "losses", "pruning", "quantization"}
    for name in distill.__all__:
        assert getattr(distill, name) is not None
    assert distill.DistillationModule.__module__ == "distill.training.module"
    assert callable(distill.run)
    assert distill.losses.ForwardKL(temperature=2.0).temperature == 2.0
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        distill.nothing  # noqa: B018


def test_importing_costs_nothing() -> None:
    """Settings of every training part can be read and checked without torch."""
    code = (
        "import sys, distill, distill.losses, distill.pruning, distill.quantization, distill.training.spec, "
        "distill.models.lora, distill.recipe, distill.forecast, distill.listing, distill.compare, distill.cli\n"
        "heavy = {'torch', 'transformers', 'pytorch_lightning', 'datasets', 'numpy', 'matplotlib', 'peft'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_module_trains_in_a_plain_trainer() -> None:
    def model(seed: int, layers: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, num_key_value_heads=1))

    random = torch.Generator().manual_seed(0)
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[:, -1] = False
    batches = [causal_batch(torch.randint(0, 32, (4, 8), generator=random), mask) for _ in range(20)]
    module = distill.DistillationModule(
        student=model(0, 1), teacher=model(1, 2), losses=[distill.losses.ForwardKL(temperature=2.0)]
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.validate(module, loader, verbose=False)
    before = module.validation_means()["kl"]
    trainer.fit(module, loader)
    assert trainer.global_step == 20
    trainer.validate(module, loader, verbose=False)
    assert module.validation_means()["kl"] < before
