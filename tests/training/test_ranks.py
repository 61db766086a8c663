"""How processes meet and part, and what each rank has for itself: its part of the text, its state in a checkpoint."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from distill.core.errors import InputError, MachineError
from distill.core.world import ADDRESS, PORT, World
from distill.losses import LossTerm
from distill.training import rank_state, ranks
from distill.training.rank_batches import RankBatches
from distill.training.ranks import Ranks, meet
from distill.training.spec import BudgetSpec, ComputeSpec, split_batch


def test_a_batch_is_split_over_processes() -> None:
    def split(batch_size: int, micro: int | None, processes: int) -> tuple[int, int]:
        return split_batch(
            BudgetSpec(num_steps=1, batch_size=batch_size), ComputeSpec(micro_batch_size=micro), processes
        )

    assert split(16, None, 4) == (4, 1)
    assert split(16, 2, 4) == (2, 2)
    with pytest.raises(InputError, match=r"batch_size \(6\) must be a multiple of the 4 processes"):
        split(6, None, 4)
    with pytest.raises(InputError, match=r"batch_size \(16 / 4 processes\) must be a multiple of .* \(3\)"):
        split(16, 3, 4)


@pytest.mark.parametrize("count", [1, 5, 6])
def test_validation_is_shared_without_loss_or_repetition(count: int, batch: Any) -> None:
    batches = [batch(2 * i, 2) for i in range(count)]
    parts = [list(RankBatches(batches, World(rank, 3, rank, 3))) for rank in range(3)]
    assert len({len(part) for part in parts}) == 1, "all ranks run as many forward passes"
    assert len(parts[0]) == -(-count // 3)
    counted = [one for part in parts for one in part if one["mask"].any()]
    assert sorted(int(one["input_ids"].sum()) for one in counted) == sorted(
        int(one["input_ids"].sum()) for one in batches if one["mask"].any()
    )
    assert [list(RankBatches(batches, World()))[i] is one for i, one in enumerate(batches)] == [True] * count


def state(tokens: int, **terms: float) -> dict[str, Any]:
    counted = {name: LossTerm(torch.tensor(value), torch.tensor(tokens)) for name, value in terms.items()}
    return rank_state.of(counted, torch.tensor(tokens))


@pytest.mark.parametrize("now", [1, 2, 3])
def test_what_was_counted_before_a_checkpoint_is_counted_once(now: int) -> None:
    saved = [state(3, kl=1.0, ce=4.0), state(4, kl=2.0)]
    taken = [rank_state.for_rank(saved, rank, now) for rank in range(now)]
    assert {frozenset(terms) for terms, _, _ in taken} == {frozenset({"kl", "ce"})}
    assert sum(float(terms["kl"].sum) for terms, _, _ in taken) == 3.0
    assert sum(int(terms["kl"].count) for terms, _, _ in taken) == 7
    assert sum(int(tokens) for _, tokens, _ in taken) == 7
    assert [random is not None for _, _, random in taken] == [True, True, False][:now]
    if now == 2:
        assert float(taken[1][0]["kl"].sum) == 2.0


def test_random_state_is_taken_up_where_it_was() -> None:
    kept = state(0)
    drawn = torch.rand(3)
    rank_state.set_random(rank_state.for_rank([kept], 0, 1)[2] or {})
    assert torch.equal(torch.rand(3), drawn)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """A store to meet by, held here."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv(ADDRESS, "127.0.0.1")
    monkeypatch.setenv(PORT, str(store.port))
    return store


FIRST, SECOND = World(0, 2, 0, 2), World(1, 2, 1, 2)


def test_the_holder_of_the_store_stays_until_all_have_heard(place: TCPStore) -> None:
    first, second = Ranks(FIRST, 30, place), Ranks(SECOND, 30)
    first.tell({"exit": 2})
    with ThreadPoolExecutor() as pool:
        leaving = pool.submit(first.leave, 30)
        time.sleep(0.2)
        assert not leaving.done()
        assert second.hear() == {"exit": 2}
        second.leave()
        leaving.result(5)


def test_one_that_ends_badly_is_missed_but_not_waited_for(place: TCPStore) -> None:
    first, second = Ranks(FIRST, 0.5, place), Ranks(SECOND, 0.5)
    second.fail()
    assert "rank 1 (process" in (first._silent({1: (b"0", time.monotonic() - 1)}) or "")
    with ThreadPoolExecutor() as pool:
        pool.submit(first.leave, 60).result(5)


def test_a_store_that_is_gone_is_one_line(place: TCPStore) -> None:
    class Gone:
        def check(self, keys: Any) -> Any:
            raise torch.distributed.DistNetworkError("Broken pipe\nand more")

    second = Ranks(SECOND, 30)
    second._store = Gone()  # type: ignore[assignment]
    with pytest.raises(
        MachineError, match=r"^rank 1: another process is gone \(Broken pipe\); the same command goes on$"
    ):
        second.hear()


def test_whoever_is_silent_is_named_unless_it_has_left(place: TCPStore) -> None:
    first, second = Ranks(FIRST, 0.5), Ranks(SECOND, 0.5)
    heard = {1: (b"0", time.monotonic() - 1)}
    assert "rank 1 (process" in (first._silent(heard) or "")
    second.leave()
    assert first._silent(heard) is None


def test_a_gpu_is_chosen_before_anything_is_loaded(place: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ranks.Ranks, "watch", lambda ranks: None)

    def come(world: World) -> list[int]:
        with meet(world, 30, "cuda"):
            return list(chosen)

    with ThreadPoolExecutor() as pool:
        for met in pool.map(come, (FIRST, SECOND)):
            assert met
    assert sorted(chosen) == [0, 1]


def test_a_few_processes_watch_each_one() -> None:
    for size in (2, 3, 8, 64):
        watching = {rank: ranks.watched(World(rank, size, rank, size)) for rank in range(size)}
        assert all(len(heard) <= ranks.NUM_WATCHED + 1 for heard in watching.values())
        for rank in range(size):
            watchers = [other for other, heard in watching.items() if rank in heard]
            assert len(watchers) >= min(ranks.NUM_WATCHED, size - 1)
            assert rank not in watchers
        assert all(0 in heard for rank, heard in watching.items() if rank)


def test_whoever_does_not_watch_a_silent_process_hears_of_it(place: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 4 of 9 is silent; rank 3 watches it, and rank 5 does not."""
    monkeypatch.setattr(ranks, "BEAT_S", 0.02)
    processes = {rank: Ranks(World(rank, 9, rank, 9), 0.3) for rank in range(9)}
    gave_up: dict[int, str] = {}
    for rank, process in processes.items():
        monkeypatch.setattr(process, "_give_up", lambda why, rank=rank: gave_up.setdefault(rank, why))
        if rank != 4:
            process.watch()
    assert 4 not in ranks.watched(processes[5].world)
    until = time.monotonic() + 10
    while len(gave_up) < 8 and time.monotonic() < until:
        time.sleep(0.02)
    for process in processes.values():
        process._closed.set()
    assert sorted(gave_up) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert all("rank 4 (process" in why for why in gave_up.values())
