"""A step that is not finite changes nothing, is kept, and does not count; too many of them in a row end the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill.core.errors import DistillError
from distill.training.metrics import read_rows

BATCH = 4


def spoil(module: Any, steps: set[int]) -> Any:
    """Make the loss of these steps (from 0) infinite, or their gradient."""
    whole = module.batch_losses

    def spoilt(batch: Any, losses: Any) -> Any:
        total, terms = whole(batch, losses)
        if module.training and module.trainer.global_step in steps:
            total = total * float("nan")
        return total, terms

    module.batch_losses = spoilt
    return module


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.student.named_parameters()}


def test_a_bad_step_is_passed_over_and_kept(module: Any, train: Any, batch: Any, tmp_path: Path) -> None:
    trained = spoil(module(), {2})
    seen: list[dict[str, torch.Tensor]] = []
    at = {position: lambda: seen.append(weights(trained)) for position in (2 * BATCH + 2, 3 * BATCH + 2)}
    said = train(trained, at=at, log_every_steps=1)
    assert len(seen) == 3, "and once to read the batch again"
    before, after = seen[0], seen[-1]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert said == [f"  warning: loss or gradient not finite, skipped: step 3 (see {tmp_path}/stage/bad-batches)"]
    (file,) = (tmp_path / "stage" / "bad-batches").iterdir()
    assert file.name == "step=00000003.rank=0.safetensors"
    kept = load_file(file)
    assert torch.equal(kept["0.input_ids"], batch(2 * BATCH, 2)["input_ids"])
    assert torch.equal(kept["1.mask"], batch(2 * BATCH + 2, 2)["mask"])
    for row in read_rows(tmp_path / "stage"):
        assert all(value == value for value in row.values())
    assert all(p.isfinite().all() for p in trained.student.parameters())
    moved = weights(trained)
    assert any(not torch.equal(after[name], moved[name]) for name in moved)


def test_too_many_in_a_row_end_the_run(module: Any, train: Any, tmp_path: Path) -> None:
    trained = spoil(module(), {1, 2, 3, 4, 5})
    with pytest.raises(
        DistillError, match=r"not finite in 5 steps in a row, the last at step 6; no weight was changed"
    ):
        train(trained, log_every_steps=1, checkpoint_every_steps=1)
    kept = sorted(path.name for path in (tmp_path / "stage" / "checkpoints").iterdir())
    assert kept == ["step=00000004.ckpt", "step=00000005.ckpt"]


def test_a_gap_begins_the_count_anew(module: Any, train: Any, tmp_path: Path) -> None:
    said = train(spoil(module(), {0, 1, 2, 4, 5}), log_every_steps=2)
    assert [line.partition(": step ")[2].partition(" (see")[0] for line in said] == ["1, 2", "3", "5, 6"]
    assert len(list((tmp_path / "stage" / "bad-batches").iterdir())) == 5


@pytest.mark.parametrize("every", [1, 2, 6])
def test_a_kill_does_not_begin_the_count_anew(every: int, module: Any, train: Any) -> None:
    """Neither of what was looked at before the checkpoint of step 3, nor of what was not looked at yet."""

    def pull() -> None:
        raise KeyError("the plug")

    with pytest.raises(KeyError):
        train(spoil(module(), {1, 2, 3, 4, 5}), at={4 * BATCH: pull}, log_every_steps=every)
    with pytest.raises(DistillError, match=r"not finite in 5 steps in a row, the last at step 6"):
        train(spoil(module(), {1, 2, 3, 4, 5}), log_every_steps=every)
