"""Memory of a tile: what is handed out belongs to one caller alone, for as long as it says."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.losses.tile import LogitTile, Workspace


def storages(*tensors: Tensor) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def test_no_two_callers_get_the_same_memory() -> None:
    workspace, like, narrow = Workspace(), torch.empty(4, 6), torch.empty(4, 5)
    first = workspace.take(like)
    with workspace.borrow(like) as outer:
        second = workspace.take(like)  # taken while another is borrowed, and kept after it has gone back
        with workspace.borrow(like) as inner, workspace.borrow(narrow) as other:
            assert len(storages(first, second, outer, inner, other)) == 5
    again = workspace.take(like)
    assert not storages(again) & storages(first, second)
    assert storages(again) == storages(outer)  # what was borrowed is free, and the first to be used


def test_a_tile_reuses_the_memory_of_the_last_one() -> None:
    workspace, like = Workspace(), torch.empty(4, 6)
    taken = [workspace.take(like) for _ in range(3)]
    workspace.begin()
    again = [workspace.take(like) for _ in range(3)]
    assert [storages(tensor) for tensor in again] == [storages(tensor) for tensor in taken]
    workspace.begin()
    assert workspace.take(torch.empty(2, 6)).shape == (2, 6)  # of a last tile with fewer tokens
    larger = workspace.take(torch.empty(7, 6))
    assert larger.shape == (7, 6)
    assert not storages(larger) & storages(*taken)


def test_distributions_are_computed_once_and_shared() -> None:
    tile = LogitTile(torch.randn(4, 9), torch.randn(4, 7), torch.zeros(4, dtype=torch.int64))
    assert tile.pair(2.0) is tile.pair(2.0)
    assert tile.pair(2.0) is not tile.pair(1.0)
    assert tile.forward_kl(1.0) is tile.forward_kl(1.0)
    assert tile.own() is tile.own()
    assert tile.own().probs.shape == (4, 9)
    assert tile.pair(1.0).q.shape == tile.pair(1.0).p.shape == (4, 7)
