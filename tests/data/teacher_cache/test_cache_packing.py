"""One cache serves rows that are cut in any way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.core.errors import InputError
from distill.data.packed_rows import PackedRows
from distill.data.packing import TokenFile, store_tokens
from distill.data.teacher_cache import Hidden, Sampled, TopK
from distill.data.teacher_cache.base import HIDDEN, CodecSpec
from distill.data.teacher_cache.cache import CachedRows
from distill.data.teacher_cache.identity import hash_of_tokens
from distill.data.teacher_cache.shards import open_shards

from .caches import (
    LENGTH,
    VOCABULARY,
    Teacher,
    every_codec,
    files,
    fill_all,
    place_of,
)


class Remembers(Teacher):
    """A teacher whose hidden states say what it has seen before each token: in the row, or in its document there."""

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        there = torch.arange(ids.shape[1]).expand(ids.shape)
        starts = there - batch.get("position_ids", there)
        seen = (there.unsqueeze(1) <= there.unsqueeze(2)) & (there.unsqueeze(1) >= starts.unsqueeze(2))
        return seen.float() @ super().hidden(batch)


def text_of(folder: Path, *, documents_of_one: bool = False, start: tuple[int, ...] = ()) -> TokenFile:
    """Documents of 2 to 24 tokens and one of 40, end to end; 0 ends each. Cut at 24, none leaves a token alone. More,
    where a tokenizer puts some before each."""
    random, file = np.random.default_rng(4), folder / "documents.bin"
    sizes = [1, 5] if documents_of_one else [*random.integers(2, 24, 14), 40]
    documents = [np.array([*start, *random.integers(1, VOCABULARY, size - 1), 0], np.uint16) for size in sizes]
    return store_tokens(file, documents, 0, start=start)


def said(teacher: Teacher, rows: PackedRows) -> dict[int, Tensor]:
    """Position in the file -> hidden state, by running the teacher on each of its rows."""
    found = {}
    for number in range(len(rows)):
        states = teacher.hidden(rows[number])[0][rows.columns(number)]
        at = [start + i for start, size in rows.rows.spans(number) for i in range(size)]
        found |= dict(zip(at, states, strict=False))
    return found


PACKINGS = ("wrapped", "documents", "best_fit", "padded")


@pytest.mark.parametrize("start", [(), (7,)], ids=["plain", "with-a-first-token"])
@pytest.mark.parametrize("read", PACKINGS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_one_cache_serves_rows_cut_in_any_way(read: Any, packing: Any, start: Any, tmp_path: Path) -> None:
    tokens, codec = text_of(tmp_path, start=start), Hidden()
    place = place_of(tmp_path / "cache", PackedRows(tokens, 24, packing=read), codec)
    expected = said(Remembers(), place.rows(tokens))
    for length in (24, 10, 33):
        blocks = PackedRows(tokens, length, packing=packing)
        fill_all(place, blocks, range(len(blocks)), Remembers())
        cached = CachedRows(blocks, place)
        numbers = list(range(len(blocks)))[::-1]
        batch = cached[numbers]
        for number, states, mask in zip(numbers, batch[HIDDEN], batch["mask"], strict=True):
            at = (blocks.predicted(number) - 1).tolist()
            assert len(at) == int(mask.sum()) > 0
            assert torch.equal(states[mask], torch.stack([expected[position] for position in at]).bfloat16())
    before = files(place.folder)
    fill_all(place, blocks, range(len(blocks)), Remembers(dies_after=0))  # every token is there
    assert files(place.folder) == before


@pytest.mark.parametrize("read", ["best_fit", "padded"])
@pytest.mark.parametrize("packing", ["best_fit", "padded"])
def test_of_text_that_is_learned_from_in_part_only_what_counts_is_cached(
    read: Any, packing: Any, tmp_path: Path
) -> None:
    whole, random = text_of(tmp_path), np.random.default_rng(5)
    bounds, ids = np.asarray(whole.bounds()), np.asarray(whole.ids())
    learned = random.random(len(ids)) < 0.4
    learned[bounds[:-1]] = False  # nothing predicts what begins
    learned[bounds[3] : bounds[4]] = False
    (tmp_path / "part").mkdir()
    tokens = store_tokens(
        tmp_path / "part" / "train.bin", np.split(ids, bounds[1:-1]), 0, np.split(learned, bounds[1:-1])
    )
    place = place_of(tmp_path / "cache", PackedRows(tokens, 40, packing=read), Hidden())
    expected = said(Remembers(), place.rows(tokens))
    blocks = PackedRows(tokens, 48, packing=packing)
    fill_all(place, blocks, range(len(blocks)), Remembers())
    assert sum(int(shard.sizes.sum()) for shard in open_shards(place.folder)) == learned.sum() == tokens.num_learned
    numbers = list(range(len(blocks)))[::-1]
    batch = CachedRows(blocks, place)[numbers]
    for number, states, mask in zip(numbers, batch[HIDDEN], batch["mask"], strict=True):
        at = blocks.predicted(number) - 1
        assert torch.equal(
            states[mask],
            torch.stack([expected[position] for position in at.tolist()] or [states[0]])[: len(at)].bfloat16(),
        )
        assert not states[~mask].any()


@pytest.mark.parametrize("start", [(), (7,), (7, 8)], ids=["plain", "with-a-first-token", "with-two"])
def test_rows_like_the_teachers_hold_what_a_live_one_says(start: Any, tmp_path: Path) -> None:
    for packing in PACKINGS:
        blocks = PackedRows(text_of(tmp_path, start=start), 24, packing=packing)  # type: ignore[arg-type]
        place = place_of(tmp_path / packing, blocks, Hidden())
        numbers = list(range(len(blocks)))
        fill_all(place, blocks, numbers, Remembers())
        batch = CachedRows(blocks, place)[numbers]
        live = Remembers().hidden(blocks[numbers])
        assert torch.equal(batch[HIDDEN][batch["mask"]], live[batch["mask"]].bfloat16())


@pytest.mark.parametrize("codec", [TopK(k=4), Sampled(draws=5)], ids=lambda codec: codec.kind)
def test_a_row_over_several_of_the_teachers_joins_them(codec: CodecSpec, blocks: PackedRows, tmp_path: Path) -> None:
    place = place_of(tmp_path / "cache", blocks, codec)
    longer = PackedRows(blocks.tokens, 3 * LENGTH - 5)
    fill_all(place, longer, range(len(longer)))
    whole = CachedRows(longer, place)[0]
    parts = CachedRows(blocks, place)[[0, 1, 2]]
    for key in set(whole) - {"input_ids", "mask"}:
        for row in range(3):
            at = whole[key][0, row * LENGTH : (row + 1) * LENGTH - 1][: 3 * LENGTH - 6 - row * LENGTH]
            there = parts[key][row, : len(at)]
            most = min(at.shape[-1], there.shape[-1]) if at.ndim == 2 else None
            assert torch.equal(at[..., :most] if most else at, there[..., :most] if most else there)
            assert not most or not (at[..., most:].any() or there[..., most:].any())


@every_codec
def test_a_row_that_predicts_nothing_has_an_empty_signal(codec: CodecSpec, tmp_path: Path) -> None:
    documents = [
        np.array(ids, np.uint16) for ids in ([3, 0], [0], [0], [0], [5])
    ]  # the second row holds two of one token
    blocks = PackedRows(store_tokens(tmp_path / "few.bin", documents, 0), 2, packing="documents")
    place = place_of(tmp_path / "cache", blocks, codec)
    fill_all(place, blocks, [0])
    cached = CachedRows(blocks, place)
    alone, among = cached[1], cached[[0, 1]]
    assert not alone["mask"].any()
    for key in set(among) - {"input_ids", "mask", "position_ids"}:
        assert not alone[key].any()
        assert not among[key][1].any()
        assert among[key][0].any()


def test_text_that_the_teachers_packing_leaves_out_is_refused(tmp_path: Path) -> None:
    tokens = text_of(tmp_path, documents_of_one=True)
    place = place_of(tmp_path / "cache", PackedRows(tokens, 24, packing="best_fit"), Hidden())
    with pytest.raises(InputError, match="packing best_fit, which leaves out what is a single token in its row"):
        place.needed(PackedRows(tokens, 24), [0])


def test_documents_that_end_elsewhere_are_another_text_though_their_ids_are_the_same(tmp_path: Path) -> None:
    def hash_of(name: str, *documents: list[int]) -> str:
        return hash_of_tokens(store_tokens(tmp_path / name, [np.array(ids, np.uint16) for ids in documents], 0))

    plain = hash_of("plain.bin", [3, 4, 0], [5, 0])
    assert plain == hash_of("again.bin", [3, 4, 0], [5, 0])
    assert hash_of("whole.bin", [3, 4, 0, 5, 0]) != plain
    assert hash_of("one.bin", [3, 4], [5, 6]) != hash_of("other.bin", [3], [4, 5, 6])


def test_another_window_or_packing_of_the_teacher_is_another_cache(blocks: PackedRows, tmp_path: Path) -> None:
    fill_all(place_of(tmp_path / "cache", blocks, TopK(k=4)), blocks)
    for name, other in {
        "another window": PackedRows(blocks.tokens, LENGTH + 1),
        "another packing": PackedRows(blocks.tokens, LENGTH, packing="documents"),
    }.items():
        with pytest.raises(InputError, match=f"written with {name}"):
            place_of(tmp_path / "cache", other, TopK(k=4)).header()
