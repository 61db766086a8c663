"""Two processes over gloo take the step that one process takes over all of their tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from distill.training.module import DistillationModule


class Seen(pl.Callback):
    """Gradients as the optimizer takes them, which nothing clips here."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_zero_grad(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        kept = {name: p.grad.clone() for name, p in module.student.named_parameters() if p.grad is not None}
        if kept:
            self.steps.append(kept)


def test_two_ranks_take_the_step_of_one(tmp_path: Path, module: Any, llama: Any, batch: Any) -> None:
    # 2 steps x 2 micro-batches x 2 ranks; the ranks' micro-batches count 0 to 14 tokens, one of them none at all
    pieces = [batch(5, 1), batch(0, 2), batch(6, 2), batch(2, 3), batch(8, 1), batch(11, 2), batch(16, 2), batch(20, 1)]
    sizes = [int(piece["mask"].sum()) for piece in pieces]
    assert min(sizes) == 0
    assert len(set(sizes)) > 4
    single: DistillationModule = module()
    given = {
        "config": {
            k: v for k, v in single.student.config.to_diff_dict().items() if isinstance(v, int | float | bool | None)
        },
        "student": single.student.state_dict(),
        "teacher": single.teacher.model.state_dict(),  # type: ignore[union-attr]
        "accumulate": 2,
        "batches": [pieces[0::2], pieces[1::2]],
    }
    torch.save(given, tmp_path / "given.pt")
    script = Path(__file__).with_name("two_ranks.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]

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
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert [len(rank["seen"]) for rank in ranks] == [2, 2]
    assert len(seen.steps) == 2
    for step, expected in enumerate(seen.steps):
        for name, gradient in expected.items():
            for rank in ranks:
                torch.testing.assert_close(rank["seen"][step][name], gradient, rtol=1e-4, atol=1e-6)
    for name, weight in single.student.state_dict().items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name])
        torch.testing.assert_close(ranks[0]["weights"][name], weight, rtol=1e-4, atol=1e-5)
