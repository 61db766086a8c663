"""A training too small for several threads runs on one, and the number that made a checkpoint is known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.core.threads import NUMBER
from distill.doctor import examine
from distill.training.checkpoint import checkpoint_path

WIDE = {"hidden_size": 2560, "head_dim": 8}
"""2 rows of 8 tokens are 40960 numbers, of which PyTorch gives each of two threads a part."""


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in NUMBER:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("settings", "users", "number"), [({}, None, 1), (WIDE, None, 2), ({}, "OMP_NUM_THREADS", 2)])
def test_a_small_step_runs_on_one_thread(
    module: Any, train: Any, settings: Any, users: str | None, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if users is not None:
        monkeypatch.setenv(users, "2")
    seen: list[int] = []
    train(module(**settings), at={4: lambda: seen.append(torch.get_num_threads())})
    assert seen == [number]
    assert torch.get_num_threads() == 2, "other stages have theirs back"


def test_doctor_says_when_a_training_runs_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.doctor._reachable", lambda host: False)
    monkeypatch.setattr("distill.tracking.wandb.resolve_mode", lambda logging: "offline")
    assert (
        "small models train on 1 thread: those whose layers have fewer than 32,768 outputs per micro-batch "
        "(tokens x hidden size)"
    ) in examine().splitlines()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert "small models train on as many threads as others (OMP_NUM_THREADS=2, set by you)" in examine().splitlines()


def test_an_error_gives_the_threads_back(module: Any, train: Any) -> None:
    def fail() -> None:
        raise KeyError(torch.get_num_threads())

    with pytest.raises(KeyError, match="1"):
        train(module(), at={4: fail})
    assert torch.get_num_threads() == 2


def test_a_kill_changes_no_bit_on_two_threads_and_another_number_is_said(
    module: Any, train: Any, tmp_path: Path
) -> None:
    def pull() -> None:
        raise KeyError

    torch.manual_seed(3)
    train(module(**WIDE), "straight")
    torch.manual_seed(3)
    with pytest.raises(KeyError):
        train(module(**WIDE), "resumed", at={16: pull})
    said = train(module(**WIDE), "resumed")
    assert len(said) == 1, said
    ours, theirs = (
        torch.load(checkpoint_path(tmp_path / name / "checkpoints", 6), weights_only=True)["state_dict"]
        for name in ("resumed", "straight")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    torch.set_num_threads(1)
    said = train(module(**WIDE), "resumed")
    assert said[-1] == (
        "  warning: the checkpoint was made with 2 CPU threads and this process has 1; the last bits may differ "
        "(OMP_NUM_THREADS=2 keeps them)"
    )


def test_a_small_training_goes_on_the_same_on_every_machine(module: Any, train: Any, tmp_path: Path) -> None:
    assert train(module(), "stage") == []
    torch.set_num_threads(4)
    assert len(train(module(), "stage")) == 1, "only that it goes on"
