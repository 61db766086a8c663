"""The cache: shards, resuming, order, refusals."""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from math import isfinite, log
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from distill.core.errors import InputError, MachineError
from distill.data.loader import train_batches
from distill.data.micro_batches import MicroBatches
from distill.data.packed_rows import PackedRows
from distill.data.teacher_cache import CODECS, Hidden, Sampled, TopK
from distill.data.teacher_cache import write_cache as writing
from distill.data.teacher_cache.base import HIDDEN, IDS, PROBS, TAIL, CodecSpec
from distill.data.teacher_cache.cache import CachedRows, ids_of
from distill.data.teacher_cache.fidelity import measure
from distill.data.teacher_cache.head_file import head_file, seal
from distill.data.teacher_cache.shards import Coded, Shard, shard_file, write_shard
from distill.data.teacher_cache.verify import describe, verify
from distill.data.teacher_cache.write_cache import Live, fill
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
def test_what_is_read_is_what_the_teacher_says(codec: CodecSpec, blocks: PackedRows, tmp_path: Path) -> None:
    place = place_of(tmp_path / "cache", blocks, codec)
    fill_all(place, blocks)
    cached, teacher, numbers = CachedRows(blocks, place), Teacher(), [7, 19, 0]
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
def test_a_block_is_the_same_in_any_order_batch_and_process(
    codec: CodecSpec, blocks: PackedRows, tmp_path: Path
) -> None:
    place = place_of(tmp_path / "cache", blocks, codec)
    fill_all(place, blocks, [3, 11])  # two at first, the others later
    fill_all(place, blocks)
    cached = CachedRows(blocks, place)
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
def test_a_killed_writing_goes_on_to_the_same_files(codec: CodecSpec, blocks: PackedRows, tmp_path: Path) -> None:
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
def test_two_ranks_read_what_one_reads(codec: CodecSpec, blocks: PackedRows, tmp_path: Path) -> None:
    place = place_of(tmp_path / "cache", blocks, codec)
    fill_all(place, blocks)
    cached = CachedRows(blocks, place)
    one = list(islice(train_batches(cached, 3, MicroBatches(4)), 2))
    two = [list(islice(train_batches(cached, 3, MicroBatches(2, 0, rank, 2)), 2)) for rank in range(2)]
    for whole, *parts in zip(one, *two, strict=True):
        for key, values in whole.items():
            for part, expected in zip(parts, values.split(2), strict=True):
                assert torch.equal(part[key], expected[..., : part[key].shape[-1]])


def test_processes_that_fill_at_once_share_the_work(blocks: PackedRows, tmp_path: Path) -> None:
    whole, shared = (place_of(tmp_path / name, blocks, TopK(k=4)) for name in ("whole", "shared"))
    fill_all(whole, blocks)
    teachers = [Teacher(), Teacher()]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda teacher: fill_all(shared, blocks, teacher=teacher), teachers))
    assert files(shared.folder) == files(whole.folder)
    assert min(teacher.batches for teacher in teachers) == 0


def test_a_block_that_is_not_there_is_a_mistake_of_who_uses_it(blocks: PackedRows, tmp_path: Path) -> None:
    place = place_of(tmp_path / "cache", blocks, TopK(k=4))
    fill_all(place, blocks, [1, 2])
    cached = CachedRows(blocks, place)
    assert IDS in cached[[1, 2]]
    assert IDS not in cached[[1, 3]]  # a loader reads ahead, beyond the end of training
    with pytest.raises(InputError, match="not in the teacher's cache"):
        CachedTeacher(VOCABULARY, tmp_path, whole=False).signal(cached[[1, 3]])


def test_a_full_cache_loads_no_teacher(blocks: PackedRows, tmp_path: Path) -> None:
    place = place_of(tmp_path / "cache", blocks, TopK(k=4))
    said = fill_all(place, blocks)
    assert len(said) == 1
    assert "bytes per token" in said[0]
    assert "on disk" in said[0]

    def never() -> Live:
        raise AssertionError("loaded")

    fill(place, blocks.tokens, range(20), never, batch_size=2, what="train", say=said.append)
    assert said[1:] == ["train: all 20 rows are in the cache already"]


def test_a_cut_shard_is_written_anew_and_a_damaged_block_is_refused(blocks: PackedRows, tmp_path: Path) -> None:
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
        CachedRows(blocks, place)[list(range(20))]


def test_verify_names_every_damaged_file(blocks: PackedRows, tmp_path: Path) -> None:
    place = place_of(tmp_path / "cache" / "train", blocks, TopK(k=4))
    fill_all(place, blocks)
    assert "20 rows in" in verify(tmp_path / "cache")
    assert "every checksum is right" in verify(place.folder)
    for line in ("top_k (k 4, value_dtype float16)", "rows of 16 tokens", "311 tokens in", "bytes per token, KL"):
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


def test_another_text_teacher_tokenizer_or_codec_is_refused_by_name(blocks: PackedRows, tmp_path: Path) -> None:
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
            CachedRows(blocks, place)
    with pytest.raises(InputError, match="no teacher cache there"):
        CachedRows(blocks, place_of(tmp_path / "nowhere", blocks, TopK(k=4)))


def test_a_moved_text_keeps_its_cache(blocks: PackedRows, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    assert place_of(tmp_path, make_blocks(tmp_path / "moved" / "x.bin"), TopK()).identity == (
        place_of(tmp_path, blocks, TopK()).identity
    )


def test_a_disk_without_room_is_refused_before_anything_is_written(
    blocks: PackedRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_of(tmp_path / "cache", blocks, TopK(k=4))
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    said: list[str] = []
    with pytest.raises(MachineError, match="GB are free"):
        fill(place, blocks.tokens, range(20), Teacher(), batch_size=2, what="train", say=said.append)
    assert not files(place.folder)
    assert re.search(r"[\d.]+ bytes per token.* KL .* MB on disk", said[0]), (
        "its cost and its loss, before it is written"
    )


def test_a_very_sure_teacher_has_a_fidelity_too() -> None:
    """Most of its probabilities are 0 in fp32; the report is read before hours of writing, and must say a number."""
    hidden, codec = 500 * logits_of(6), TopK(k=4)
    data, _ = coded(codec, hidden.log_softmax(-1))
    found = measure([(hidden, data)], codec, VOCABULARY, VOCABULARY, lambda rows: rows)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert isfinite(found.gradient_cosine)


def test_the_fidelity_report_tells_the_codecs_apart(blocks: PackedRows, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("data", ["noise", "zeros", "ones", "shorter", "longer", "nothing"])
@every_codec
def test_a_row_that_no_teacher_can_have_said_is_found_though_its_checksum_is_right(
    codec: CodecSpec, data: str, blocks: PackedRows, tmp_path: Path
) -> None:
    place = place_of(tmp_path / "cache", blocks, codec)
    fill_all(place, blocks)
    file = shard_file(place.folder, 0)
    shard, generator = Shard(file), torch.Generator().manual_seed(0)
    rows = []
    for index, (number, size) in enumerate(zip(shard.rows.tolist(), shard.sizes.tolist(), strict=True)):
        whole = shard.read(index, ids_of(place.rows(blocks.tokens), number))
        wrong = {
            "noise": torch.randint(0, 256, whole.shape, dtype=torch.uint8, generator=generator),
            "zeros": torch.zeros_like(whole),
            "ones": torch.full_like(whole, 255),
            "shorter": whole[: len(whole) // 3],
            "longer": torch.cat([whole[1:], whole]),
            "nothing": whole[:0],
        }
        if codec.whole and data in ("noise", "zeros"):
            pytest.skip("any finite numbers may be hidden states")
        rows.append(Coded(number, size, int(shard.checks[index, 0]), wrong[data] if index == 1 else whole))
    write_shard(file, rows)
    number = rows[1].number
    with pytest.raises(
        InputError, match=rf"^{file}: row {number} is not what {codec.kind} writes \(.*\); remove"
    ) as one:
        CachedRows(blocks, place)[[number]]
    assert "\n" not in str(one.value)
    with pytest.raises(MachineError, match=rf"{file}: not what {codec.kind} writes.* \(rows {number}\)"):
        verify(place.folder)


def test_a_row_of_a_size_that_no_row_has_is_found(blocks: PackedRows, tmp_path: Path) -> None:
    place = place_of(tmp_path / "cache", blocks, Sampled(draws=4))
    fill_all(place, blocks)
    file = shard_file(place.folder, 0)
    for size in (-1, 10**12):
        write_shard(file, [Coded(3, size, 0, torch.zeros(40, dtype=torch.uint8))])
        with pytest.raises(MachineError, match=rf"{file}: not what sampled writes"):
            verify(place.folder)


def test_a_damaged_row_is_one_line_from_a_worker_too(blocks: PackedRows, tmp_path: Path) -> None:
    place = place_of(tmp_path / "cache", blocks, TopK(k=4))
    fill_all(place, blocks)
    file = shard_file(place.folder, 0)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    cached = CachedRows(blocks, place)
    with pytest.raises(MachineError) as refusal:
        list(islice(train_batches(cached, 3, MicroBatches(4), 1), 5))
    assert str(refusal.value).startswith(f"{file}: row ")
    assert "\n" not in str(refusal.value)


def test_an_edited_header_is_refused(blocks: PackedRows, tmp_path: Path) -> None:
    place = place_of(tmp_path / "cache", blocks, TopK(k=4))
    fill_all(place, blocks)
    header = place.folder / "cache.json"
    content = json.loads(header.read_text())
    content["fidelity"]["gradient_cosine"] = 1.0
    header.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"{header}: not the header of a teacher cache, or damaged"):
        fill_all(place, blocks)


def test_a_pipe_in_the_place_of_a_shard_is_not_waited_for(blocks: PackedRows, tmp_path: Path) -> None:
    place = place_of(tmp_path / "cache", blocks, TopK(k=4))
    fill_all(place, blocks)
    file = shard_file(place.folder, 0)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(MachineError, match=f"{file}: no regular file"):
        verify(place.folder)
