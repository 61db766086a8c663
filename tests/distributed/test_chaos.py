"""Killed again and again, at chosen points and at any time, a run ends in the very weights of one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.campaign import ANY_TIME, Campaign
from tests.faults.workers import Workers


@pytest.mark.parametrize("num_kills", [5, pytest.param(25, marks=pytest.mark.exhaustive)])
def test_kills_lose_nothing(num_kills: int, workers: Workers, chaos: Path, tmp_path: Path) -> None:
    toll = Campaign(workers, chaos, "train", tmp_path).run(num_kills=num_kills)
    assert toll.kills.total() == num_kills
    assert len(toll.kills) > num_kills // 8, "the kills are spread over points"
    assert toll.kills[ANY_TIME] > 0 or num_kills < 25, "and some come at no point in particular"
    assert toll.lost == []
    assert toll.exact == toll.finished >= 1


@pytest.mark.exhaustive
def test_nor_do_kills_while_checkpoints_are_written_behind(workers: Workers, chaos: Path, tmp_path: Path) -> None:
    options = ["--set", "compute.write_checkpoints=behind"]
    toll = Campaign(workers, chaos, "train", tmp_path, options=options, seed=1).run(num_kills=6)
    assert toll.kills.total() == 6
    assert toll.lost == []
    assert toll.exact == toll.finished >= 1
