"""The cache: shards, resuming, order, refusals."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from math import isfinite, log
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from distill.core.errors import InputError, MachineError
from distill.data.blocks import Blocks
from distill.data.loader import train_batches
from distill.data.teacher_cache import CODECS, Hidden, Sampled, TopK
from distill.data.teacher_cache import write as writing
from distill.data.teacher_cache.base import HIDDEN, IDS, PROBS, TAIL, CodecSpec
from distill.data.teacher_cache.cache import CachedBlocks
from distill.data.teacher_cache.fidelity import measure
from distill.data.teacher_cache.head_file import head_file, seal
from distill.data.teacher_cache.verify import describe, verify
from distill.data.teacher_cache.write import Live, fill
from distill.training.cached_teacher import CachedTeacher

from .caches import (
    VOCABULARY,
    WIDTH,
    Teacher,
    coded,
    every_codec,
    files,
    fill_all,
    logits_of,
    make_blocks,
    place_of,
)


def test_every_codec_is_tested() -> None:
    assert {"top_k", "sampled", "hidden"} == set(CODECS)


@every_codec
def test_what_is_read_is_what_the_teacher_says(codec: CodecSpec, blocks: Blocks, tmp_path: Path) -> None:
    place = place_of(tmp_path / "cache", blocks, codec)
    fill_all(place, blocks)
    cached, teacher, numbers = CachedBlocks(blocks, place), Teacher(), [7, 19, 0]
    batch = cached[numbers]
    assert torch.equal(batch["input_ids"], blocks[numbers]["input_ids"])
    mask = batch["mask"]
    live = teacher.hidden(batch)
    if codec.reads == "hidden":
        assert torch.equal(batch[HIDDEN][mask], live[mask].bfloat16())
        assert not batch[HIDDEN][~mask].any()
        return
    expected = (3 * teacher.head(live)).softmax(-1)
    assert not batch[PROBS][~mask].any()
    if codec.kind == "top_k":
        top = expected.topk(4, -1)
        ids, order = top.indices.sort(-1)
        assert torch.equal(batch[IDS][mask], ids[mask])
        torch.testing.assert_close(batch[PROBS][mask], top.values.gather(-1, order)[mask], atol=0, rtol=5e-3)
        torch.testing.assert_close(batch[TAIL][mask], 1 - top.values.sum(-1)[mask], atol=1e-3, rtol=5e-3)
    else:
        torch.testing.assert_close(batch[PROBS].sum(-1)[mask], torch.ones(int(mask.sum())))


@every_codec
def test_a_block_is_the_same_in_any_order_batch_and_process(codec: CodecSpec, blocks: Blocks, tmp_path: Path) -> None:
    place = place_of(tmp_path / "cache", blocks, codec)
    fill_all(place, blocks, [3, 11])  # two at first, the others later
    fill_all(place, blocks)
    cached = CachedBlocks(blocks, place)
    alone = cached[5]
    among = cached[[9, 5, 19]]
    workers = DataLoader(cached, sampler=[[5], [9, 5, 19]], batch_size=None, num_workers=2)  # type: ignore[arg-type]
    for read in (cached[[5]], *list(workers)[:1]):
        assert all(torch.equal(read[key], alone[key]) for key in alone)
    for key, values in alone.items():
        most = values.shape[2:] and slice(values.shape[2])
        row = among[key][1]
        assert torch.equal(row[:, most] if most else row, values[0])


@every_codec
def test_a_killed_writing_goes_on_to_the_same_files(codec: CodecSpec, blocks: Blocks, tmp_path: Path) -> None:
    whole, torn = (place_of(tmp_path / name, blocks, codec) for name in ("whole", "torn"))
    fill_all(whole, blocks)
    with pytest.raises(KeyboardInterrupt):
        fill_all(torn, blocks, teacher=Teacher(dies_after=7))
    left = files(torn.folder)
    assert 0 < len(left) < len(files(whole.folder))
    (torn.folder / ".shard-00099.safetensors.writing").write_bytes(b"half")
    asked = Teacher()
    fill_all(torn, blocks, teacher=asked)
    assert files(torn.folder) == files(whole.folder)
    assert not list(torn.folder.glob(".shard*"))
    assert asked.batches < 10  # what was there was not asked again


@every_codec
def test_two_ranks_read_what_one_reads(codec: CodecSpec, blocks: Blocks, tmp_path: Path) -> None:
    place = place_of(tmp_path / "cache", blocks, codec)
    fill_all(place, blocks)
    cached = CachedBlocks(blocks, place)
    one = list(train_batches(cached, 3, 4, end_sequences=8))
    two = [list(train_batches(cached, 3, 2, rank=rank, world_size=2, end_sequences=8)) for rank in range(2)]
    for whole, *parts in zip(one, *two, strict=True):
        for key, values in whole.items():
            for part, expected in zip(parts, values.split(2), strict=True):
                assert torch.equal(part[key], expected[..., : part[key].shape[-1]])


def test_processes_that_fill_at_once_share_the_work(blocks: Blocks, tmp_path: Path) -> None:
    whole, shared = (place_of(tmp_path / name, blocks, TopK(k=4)) for name in ("whole", "shared"))
    fill_all(whole, blocks)
    teachers = [Teacher(), Teacher()]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda teacher: fill_all(shared, blocks, teacher=teacher), teachers))
    assert files(shared.folder) == files(whole.folder)
    assert min(teacher.batches for teacher in teachers) == 0


def test_a_block_that_is_not_there_is_a_mistake_of_who_uses_it(blocks: Blocks, tmp_path: Path) -> None:
    place = place_of(tmp_path / "cache", blocks, TopK(k=4))
    fill_all(place, blocks, [1, 2])
    cached = CachedBlocks(blocks, place)
    assert IDS in cached[[1, 2]]
    assert IDS not in cached[[1, 3]]  # a loader reads ahead, beyond the end of training
    with pytest.raises(InputError, match="not in the teacher's cache"):
        CachedTeacher(VOCABULARY, tmp_path, whole=False).signal(cached[[1, 3]])


def test_a_full_cache_loads_no_teacher(blocks: Blocks, tmp_path: Path) -> None:
    place = place_of(tmp_path / "cache", blocks, TopK(k=4))
    said = fill_all(place, blocks)
    assert len(said) == 1
    assert "bytes a token" in said[0]
    assert "on disk" in said[0]

    def never() -> Live:
        raise AssertionError("loaded")

    fill(place, blocks.tokens, range(20), never, batch_size=2, what="train", say=said.append)
    assert said[1:] == ["train: all 20 rows are in the cache already"]


def test_a_cut_shard_is_written_anew_and_a_damaged_block_is_refused(blocks: Blocks, tmp_path: Path) -> None:
    place = place_of(tmp_path / "cache", blocks, TopK(k=4))
    fill_all(place, blocks)
    before = files(place.folder)
    file = place.folder / "shard-00001.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-5])
    assert place.missing(range(20))
    fill_all(place, blocks)
    assert files(place.folder) == before
    damaged = bytearray(data)
    damaged[-3] ^= 1  # in whichever tensor stands last
    file.write_bytes(damaged)
    with pytest.raises(MachineError, match=r"damaged|other text"):
        CachedBlocks(blocks, place)[list(range(20))]


def test_verify_names_every_damaged_file(blocks: Blocks, tmp_path: Path) -> None:
    place = place_of(tmp_path / "cache" / "train", blocks, TopK(k=4))
    fill_all(place, blocks)
    assert "20 rows in" in verify(tmp_path / "cache")
    assert "every checksum is right" in verify(place.folder)
    for line in ("top_k (k 4, value_dtype float16)", "rows of 16 tokens", "311 tokens in", "bytes a token, KL"):
        assert line in describe(place)
    whole = {file: file.read_bytes() for file in sorted(place.folder.glob("shard-*"))}
    first, second, *_ = whole
    header_bytes = 8 + int.from_bytes(whole[first][:8], "little")
    for where in range(header_bytes, len(whole[first]), 7):  # rows, sizes, offsets, checks, payload
        data = bytearray(whole[first])
        data[where] ^= 1
        first.write_bytes(data)
        with pytest.raises(MachineError, match=r"shard-00000.*: damaged"):
            verify(tmp_path / "cache")
    second.write_bytes(whole[second][:-5])
    with pytest.raises(MachineError) as raised:
        verify(tmp_path / "cache")
    assert [line.rpartition(": ")[0] for line in str(raised.value).splitlines()[:2]] == [str(first), str(second)]
    assert "remove these" in str(raised.value)
    first.write_bytes(whole[first])
    second.write_bytes(whole[second])
    assert "20 rows in" in verify(tmp_path / "cache")
    head = head_file(tmp_path / "cache")
    head.parent.mkdir()
    head.write_bytes(bytes(1000))
    seal(head)
    assert "20 rows in" in verify(tmp_path / "cache")
    head.write_bytes(bytes(999) + b"\x01")
    with pytest.raises(MachineError, match=r"head\.safetensors: damaged\nremove it"):
        verify(place.folder)
    head.unlink()
    for file in whole:
        file.unlink()
    with pytest.raises(MachineError, match="train: holds nothing"):
        verify(tmp_path / "cache")
    with pytest.raises(InputError, match="no teacher cache there"):
        verify(tmp_path)


def test_another_text_teacher_tokenizer_or_codec_is_refused_by_name(blocks: Blocks, tmp_path: Path) -> None:
    fill_all(place_of(tmp_path / "cache", blocks, TopK(k=4)), blocks)
    (tmp_path / "other").mkdir()
    other = make_blocks(tmp_path / "other" / "train.bin", seed=1)
    wrong = {
        "another teacher": place_of(tmp_path / "cache", blocks, TopK(k=4), teacher="u"),
        "another tokenizer": place_of(tmp_path / "cache", blocks, TopK(k=4), tokenizer="l"),
        "another text": place_of(tmp_path / "cache", other, TopK(k=4)),
        "a codec": place_of(tmp_path / "cache", blocks, TopK(k=5)),
    }
    for name, place in wrong.items():
        with pytest.raises(InputError, match=f"written with {name}"):
            fill_all(place, blocks)
        with pytest.raises(InputError, match=f"written with {name}"):
            CachedBlocks(blocks, place)
    with pytest.raises(InputError, match="no teacher cache there"):
        CachedBlocks(blocks, place_of(tmp_path / "nowhere", blocks, TopK(k=4)))


def test_a_moved_text_keeps_its_cache(blocks: Blocks, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    assert place_of(tmp_path, make_blocks(tmp_path / "moved" / "x.bin"), TopK()).identity == (
        place_of(tmp_path, blocks, TopK()).identity
    )


def test_a_disk_without_room_is_refused_before_anything_is_written(
    blocks: Blocks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_of(tmp_path / "cache", blocks, TopK(k=4))
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(MachineError, match="GB are free"):
        fill_all(place, blocks)
    assert not files(place.folder)


def test_a_very_sure_teacher_has_a_fidelity_too() -> None:
    """Most of its probabilities are 0 in fp32; the report is read before hours of writing, and must say a number."""
    hidden, codec = 500 * logits_of(6), TopK(k=4)
    data, _ = coded(codec, hidden.log_softmax(-1))
    found = measure([(hidden, data)], codec, VOCABULARY, VOCABULARY, lambda rows: rows)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert isfinite(found.gradient_cosine)


def test_the_fidelity_report_tells_the_codecs_apart(blocks: Blocks, tmp_path: Path) -> None:
    found = {}
    for codec in (TopK(k=2), TopK(k=20), TopK(k=40, value_dtype="float32"), Sampled(draws=50), Hidden()):
        folder = tmp_path / f"cache{len(found)}"
        fill_all(place_of(folder, blocks, codec), blocks)
        found[len(found)] = json.loads((folder / "cache.json").read_text())["fidelity"]
    few, many, exact, sampled, hidden = found.values()
    assert few["kl"] > many["kl"] > exact["kl"] >= -1e-6
    assert exact["kl"] < 1e-6
    assert exact["gradient_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert few["gradient_cosine"] < many["gradient_cosine"] <= 1.0001
    assert sampled["kl"] is None
    assert sampled["gradient_cosine"] < sampled["summed_cosine"] <= 1.0
    assert hidden["kl"] < 1e-3
    assert hidden["bytes_per_token"] == 2 * WIDTH
    assert few["bytes_per_token"] == pytest.approx(3 * 2 + 2 * (log(VOCABULARY / 2, 2) + 2.5) / 8, abs=0.5)
