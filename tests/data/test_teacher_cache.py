"""Codecs against the distribution that they were given, and the cache: shards, resuming, order, refusals."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from math import isfinite, lgamma, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from distill.core.errors import InputError, MachineError
from distill.data.blocks import Blocks
from distill.data.loader import train_batches
from distill.data.packing import TokenFile
from distill.data.teacher_cache import CODECS, Hidden, Sampled, TopK
from distill.data.teacher_cache import write as writing
from distill.data.teacher_cache.base import HIDDEN, IDS, PROBS, TAIL, CodecSpec
from distill.data.teacher_cache.cache import CachedBlocks, Place
from distill.data.teacher_cache.fidelity import measure, signal_of
from distill.data.teacher_cache.head_file import head_file, seal
from distill.data.teacher_cache.identity import Identity
from distill.data.teacher_cache.sorted_ids import num_bytes, pack_sorted, unpack_sorted
from distill.data.teacher_cache.verify import describe, verify
from distill.data.teacher_cache.write import Live, fill
from distill.losses import CrossEntropy, ForwardKL, ReverseKL, forward_kl
from distill.losses.head import KL, Head, head_losses
from distill.losses.sparse import SparseSignal, refusal, sparse_forward_kl
from distill.training.cached_teacher import CachedTeacher

VOCABULARY, WIDTH, LENGTH = 40, 8, 16


def logits_of(rows: int, vocabulary: int = VOCABULARY, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def coded(codec: CodecSpec, log_probs: Tensor, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The bytes, and what is decoded from them."""
    fields = codec.encode(log_probs, torch.Generator().manual_seed(seed))
    data = codec.pack(fields, log_probs.shape[-1])
    return data, codec.decode(data, *log_probs.shape)


def sparse(codec: CodecSpec, teacher: Tensor, seed: int = 0) -> SparseSignal:
    signal = signal_of(coded(codec, teacher.log_softmax(-1), seed)[1], teacher.shape[-1], None)
    assert isinstance(signal, SparseSignal)
    return signal


def value_and_gradient(student: Tensor, signal: Tensor | SparseSignal) -> tuple[float, Tensor]:
    student = student.clone().requires_grad_()
    on = torch.ones(len(student), dtype=torch.bool)
    term = (
        sparse_forward_kl(student, signal, on) if isinstance(signal, SparseSignal) else forward_kl(student, signal, on)
    )
    return float(term.sum.detach()), torch.autograd.grad(term.sum, student)[0]


# ---- codecs


@pytest.mark.parametrize("universe", [40, 4096, 16 * 128_256, 1 << 30])
@pytest.mark.parametrize("share", ["one", "few", "all"])
def test_rising_numbers_come_back_from_nearly_the_fewest_bits(universe: int, share: str) -> None:
    count = {"one": 1, "few": min(universe, 1024) // 2, "all": min(universe, 1024)}[share]
    if share == "one" and universe > 1 << 24:
        pytest.skip("more than 2**24 times the count")
    random = np.random.default_rng(universe)
    some = np.unique(random.integers(0, universe, count)) if universe > 4096 else np.arange(count)
    for values in (some, some + (universe - 1 - some[-1])):  # the lowest and the highest that there can be
        data = pack_sorted(values, universe)
        assert len(data) == num_bytes(len(values), universe)
        assert np.array_equal(unpack_sorted(np.append(data, np.uint8(255)), len(values), universe), values)
        fewest = (lgamma(universe + 1) - lgamma(len(values) + 1) - lgamma(universe - len(values) + 1)) / log(2)
        assert 8 * len(data) <= fewest + 2.1 * len(values) + 24


def test_numbers_of_few_bits_are_near_what_any_code_needs() -> None:
    values = np.sort(np.random.default_rng(0).choice(128_256, 64, replace=False))
    bits = 8 * len(pack_sorted(values, 128_256)) / 64
    assert bits < 13.3  # log2 of 128,256 over 64 is 12.4 a number; three bytes would be 24


def test_top_k_of_everything_is_exact() -> None:
    student, teacher = logits_of(6, seed=1), logits_of(6)
    value, gradient = value_and_gradient(student, sparse(TopK(k=VOCABULARY, value_dtype="float32"), teacher))
    expected, whole = value_and_gradient(student, teacher)
    assert value == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, whole, atol=1e-6, rtol=1e-5)


def test_top_k_is_the_kl_of_k_plus_one_outcomes() -> None:
    student, teacher = logits_of(6, seed=1), logits_of(6)
    value, _ = value_and_gradient(student, sparse(TopK(k=5, value_dtype="float32"), teacher))
    p, q = (x.double().softmax(-1).numpy() for x in (teacher, student))
    expected = 0.0
    for of_p, of_q in zip(p, q, strict=True):
        kept = np.argsort(-of_p)[:5]
        a, b = (np.append(x[kept], 1 - x[kept].sum()) for x in (of_p, of_q))
        expected += (a * np.log(a / b)).sum()
    assert value == pytest.approx(expected, rel=1e-5)
    assert value < value_and_gradient(student, teacher)[0]  # data processing


def test_top_k_gradient_against_finite_differences() -> None:
    signal = sparse(TopK(k=3, value_dtype="float32"), logits_of(2, 7))
    student = logits_of(2, 7, seed=1)
    _, gradient = value_and_gradient(student, signal)
    for row, column in ((0, 0), (0, 6), (1, 3)):
        step = torch.zeros_like(student)
        step[row, column] = 1e-2
        up, down = (value_and_gradient(student + sign * step, signal)[0] for sign in (1, -1))
        assert float(gradient[row, column]) == pytest.approx((up - down) / 2e-2, abs=2e-3)


@pytest.mark.parametrize("value_dtype", ["float16", "bfloat16"])
def test_top_k_keeps_a_sum_of_one_and_is_zero_at_the_teacher(value_dtype: Any) -> None:
    teacher = logits_of(50)
    _, decoded = coded(TopK(k=8, value_dtype=value_dtype), teacher.log_softmax(-1))
    torch.testing.assert_close(decoded[PROBS].sum(-1) + decoded[TAIL], torch.ones(50))
    value, gradient = value_and_gradient(teacher, sparse(TopK(k=8, value_dtype=value_dtype), teacher))
    assert 0 <= value / 50 < 1e-4
    assert gradient.abs().max() < 0.02


def test_tail_keeps_its_digits_when_the_student_is_sure() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 0] = 40.0  # 1 - q is below the resolution of fp32
    value, gradient = value_and_gradient(logits, sparse(TopK(k=1, value_dtype="float32"), logits))
    assert value == pytest.approx(0.0, abs=1e-6)
    assert torch.isfinite(gradient).all()


def test_sampled_is_right_on_average() -> None:
    student, teacher = logits_of(3, seed=1), logits_of(3)
    expected, whole = value_and_gradient(student, teacher)
    rounds = 10_000
    value, gradients = value_and_gradient(
        student.repeat(rounds, 1), sparse(Sampled(draws=10), teacher.repeat(rounds, 1))
    )
    error = (gradients.unflatten(0, (rounds, 3)).mean(0) - whole).abs()
    p = teacher.softmax(-1)
    one_draw = 1 / (10 * rounds)  # a rare token is drawn never or once, far from normally distributed
    assert bool((error <= 5 * (p * (1 - p) * one_draw).sqrt() + 3 * one_draw).all())
    log_q = student.log_softmax(-1)
    variance = ((p * log_q**2).sum(-1) - (p * log_q).sum(-1) ** 2).sum() * one_draw
    assert abs(value / rounds - expected) < 4 * float(variance.sqrt()) + 3e-3  # the entropy is stored in fp16


def test_sampled_counts_its_draws_and_is_small() -> None:
    data, decoded = coded(Sampled(draws=50), logits_of(200).log_softmax(-1))
    torch.testing.assert_close(decoded[PROBS].sum(-1), torch.ones(200))
    kept = decoded[PROBS] > 0
    ids = num_bytes(int(kept.sum()), 200 * VOCABULARY)
    assert len(data) == 2 * 200 + 200 * 50 // 8 + ids
    assert ids < int(kept.sum())
    for ids, on in zip(decoded[IDS], kept, strict=True):
        assert len(set(ids[on].tolist())) == int(on.sum())


def test_hidden_is_exact_to_bf16() -> None:
    hidden = torch.randn(9, WIDTH)
    data, decoded = coded(Hidden(), hidden)
    assert len(data) == 9 * WIDTH * 2
    assert torch.equal(decoded[HIDDEN], hidden.bfloat16())


@pytest.mark.parametrize("codec", [TopK(k=50), Sampled()])
def test_wider_teacher_is_compared_over_the_shared_tokens(codec: CodecSpec) -> None:
    teacher = logits_of(4, VOCABULARY + 8)
    teacher[:, VOCABULARY:] = -30.0  # padding
    student = logits_of(4, seed=1)
    value, gradient = value_and_gradient(student, sparse(codec, teacher))
    if codec.kind == "top_k":
        expected, whole = value_and_gradient(student, teacher)
        assert value == pytest.approx(expected, rel=1e-2)
        torch.testing.assert_close(gradient, whole, atol=1e-2, rtol=0)
    wider = torch.cat([student, torch.full((4, 20), 5.0)], -1)
    assert value_and_gradient(wider, sparse(codec, teacher[:, :VOCABULARY]))[0] == pytest.approx(
        value_and_gradient(student, sparse(codec, teacher[:, :VOCABULARY]))[0], rel=1e-5
    )


def test_losses_that_need_more_are_refused_by_name() -> None:
    assert refusal([ForwardKL(), CrossEntropy()]) is None
    assert "reverse_kl needs" in str(refusal([ForwardKL(), ReverseKL()]))
    assert "temperature 2.0" in str(refusal([ForwardKL(temperature=2.0)]))


@pytest.mark.parametrize("codec", [TopK(k=6), Sampled()])
def test_chunks_and_masks_change_nothing(codec: CodecSpec) -> None:
    head, hidden = nn.Linear(WIDTH, VOCABULARY), torch.randn(2, 12, WIDTH)
    signal = sparse(codec, logits_of(24))
    signal = SparseSignal(
        *(x.unflatten(0, (2, 12)) for x in (signal.ids, signal.probs)),
        VOCABULARY,
        *(None if x is None else x.unflatten(0, (2, 12)) for x in (signal.tail, signal.entropy)),
    )
    mask, targets = torch.rand(2, 12) < 0.6, torch.zeros(2, 12, dtype=torch.int64)
    losses = [("forward_kl", ForwardKL()), ("cross_entropy", CrossEntropy(weight=0.5))]
    results = []
    for chunk in (5, 512):
        hidden = hidden.detach().requires_grad_()
        total, terms = head_losses(
            hidden, Head(head, tuple(head.parameters())), signal, targets, mask, losses, chunk_tokens=chunk
        )
        assert terms[KL].sum == pytest.approx(float(terms["forward_kl"].sum), rel=1e-5)
        results.append((total.detach(), torch.autograd.grad(total, hidden)[0]))
    torch.testing.assert_close(results[0], results[1])
    assert float(results[0][1][~mask].abs().max()) == 0.0
    total, _ = head_losses(hidden, Head(head), signal, targets, torch.zeros_like(mask), losses)
    total.backward()
    assert float(total.detach()) == 0.0


@pytest.mark.parametrize("vocabulary", [VOCABULARY, VOCABULARY + 8])
@pytest.mark.parametrize("codec", [TopK(k=6), TopK(k=99, value_dtype="float32"), Sampled()], ids=str)
def test_the_chunked_gradient_is_that_of_the_loss(codec: CodecSpec, vocabulary: int) -> None:
    student = torch.cat([logits_of(20, seed=1), 30 * logits_of(20, seed=2)])  # some of them sure of a token
    teacher = logits_of(40, vocabulary)
    teacher[:, VOCABULARY:] -= 3  # some of a padded head's mass is where the student has no token
    few = sparse(codec, teacher)
    expected, gradient = value_and_gradient(student.double(), few)
    eye = torch.eye(VOCABULARY)
    hidden = student.unsqueeze(0).requires_grad_()
    batch = SparseSignal(
        *(x.unsqueeze(0) for x in (few.ids, few.probs)),
        vocabulary,
        *(None if x is None else x.unsqueeze(0) for x in (few.tail, few.entropy)),
    )
    on, targets = torch.ones(1, 40, dtype=torch.bool), torch.zeros(1, 40, dtype=torch.int64)
    losses = [("forward_kl", ForwardKL())]
    total, _ = head_losses(hidden, Head(lambda rows: rows @ eye), batch, targets, on, losses, chunk_tokens=16)
    total.backward()
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad[0], gradient.float(), rtol=1e-4, atol=1e-5)


# ---- the cache


@pytest.fixture
def blocks(tmp_path: Path) -> Blocks:
    """20 blocks, the last of them not full."""
    return make_blocks(tmp_path / "train.bin")


def make_blocks(file: Path, seed: int = 0) -> Blocks:
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, 19 * LENGTH + 7).astype(np.uint16)
    ids.tofile(file)
    return Blocks(TokenFile(str(file), "uint16", len(ids), 1, 1, VOCABULARY - 1, 0), LENGTH)


class Teacher:
    """A frozen little model that notes what it was asked, and can be killed."""

    def __init__(self, dies_after: int | None = None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding = nn.Embedding(VOCABULARY, WIDTH)
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.batches = 0
        self.dies_after = dies_after

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        self.batches += 1
        if self.dies_after is not None and self.batches > self.dies_after:
            raise KeyboardInterrupt
        return self.embedding(batch["input_ids"])

    def __call__(self) -> Live:
        return Live(self.hidden, lambda rows: 3 * self.head(rows), torch.device("cpu"))


def place_of(folder: Path, blocks: Blocks, codec: CodecSpec, teacher: str = "t", tokenizer: str = "k") -> Place:
    width = WIDTH if codec.reads == "hidden" else VOCABULARY
    return Place(folder, Identity.of(teacher, tokenizer, blocks, codec), codec, width, VOCABULARY)


every_codec = pytest.mark.parametrize("codec", [TopK(k=4), Sampled(draws=5), Hidden()], ids=lambda codec: codec.kind)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_SHARD_BYTES", 800)


def fill_all(place: Place, blocks: Blocks, wanted: Any = range(20), teacher: Teacher | None = None) -> list[str]:
    said: list[str] = []
    wanted = place.needed(blocks, list(wanted))
    fill(place, blocks.tokens, wanted, teacher or Teacher(), batch_size=2, what="train", say=said.append)
    return said


def files(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("shard-*"))}


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


# ---- one cache, any rows


class Remembers(Teacher):
    """A teacher whose hidden states say what it has seen before each token: in the row, or in its document there."""

    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]
        there = torch.arange(ids.shape[1]).expand(ids.shape)
        starts = there - batch.get("position_ids", there)
        seen = (there.unsqueeze(1) <= there.unsqueeze(2)) & (there.unsqueeze(1) >= starts.unsqueeze(2))
        return seen.float() @ super().hidden(batch)


def text_of(folder: Path, *, documents_of_one: bool = False) -> TokenFile:
    """Documents of 2 to 24 tokens and one of 40, end to end; 0 ends each. Cut at 24, none leaves a token alone."""
    random, file = np.random.default_rng(4), folder / "documents.bin"
    sizes = [1, 5] if documents_of_one else [*random.integers(2, 24, 14), 40]
    ids = np.concatenate([np.append(random.integers(1, VOCABULARY, size - 1), 0) for size in sizes]).astype(np.uint16)
    ids.tofile(file)
    return TokenFile(str(file), "uint16", len(ids), len(sizes), 1, VOCABULARY - 1, 0)


def said(teacher: Teacher, rows: Blocks) -> dict[int, Tensor]:
    """Position in the file -> hidden state, by running the teacher on each of its rows."""
    found = {}
    for number in range(len(rows)):
        states = teacher.hidden(rows[number])[0]
        at = [start + i for start, size in rows.rows.spans(number) for i in range(size)]
        found |= dict(zip(at, states, strict=False))
    return found


PACKINGS = ("wrapped", "documents", "best_fit", "padded")


@pytest.mark.parametrize("read", PACKINGS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_one_cache_serves_rows_cut_in_any_way(read: Any, packing: Any, tmp_path: Path) -> None:
    tokens, codec = text_of(tmp_path), Hidden()
    place = place_of(tmp_path / "cache", Blocks(tokens, 24, packing=read), codec)
    expected = said(Remembers(), place.rows(tokens))
    for length in (24, 10, 33):
        blocks = Blocks(tokens, length, packing=packing)
        fill_all(place, blocks, range(len(blocks)), Remembers())
        cached = CachedBlocks(blocks, place)
        numbers = list(range(len(blocks)))[::-1]
        batch = cached[numbers]
        for number, states, mask in zip(numbers, batch[HIDDEN], batch["mask"], strict=True):
            at = [start + i for start, size in blocks.pieces(number) for i in range(size - 1)]
            assert torch.equal(states[mask], torch.stack([expected[position] for position in at]).bfloat16())
    before = files(place.folder)
    fill_all(place, blocks, range(len(blocks)), Remembers(dies_after=0))  # every token is there
    assert files(place.folder) == before


def test_rows_like_the_teachers_hold_what_a_live_one_says(tmp_path: Path) -> None:
    for packing in PACKINGS:
        blocks = Blocks(text_of(tmp_path), 24, packing=packing)  # type: ignore[arg-type]
        place = place_of(tmp_path / packing, blocks, Hidden())
        numbers = list(range(len(blocks)))
        fill_all(place, blocks, numbers, Remembers())
        batch = CachedBlocks(blocks, place)[numbers]
        live = Remembers().hidden(blocks[numbers])
        assert torch.equal(batch[HIDDEN][batch["mask"]], live[batch["mask"]].bfloat16())


@pytest.mark.parametrize("codec", [TopK(k=4), Sampled(draws=5)], ids=lambda codec: codec.kind)
def test_a_row_over_several_of_the_teachers_joins_them(codec: CodecSpec, blocks: Blocks, tmp_path: Path) -> None:
    place = place_of(tmp_path / "cache", blocks, codec)
    longer = Blocks(blocks.tokens, 3 * LENGTH - 5)
    fill_all(place, longer, range(len(longer)))
    whole = CachedBlocks(longer, place)[0]
    parts = CachedBlocks(blocks, place)[[0, 1, 2]]
    for key in set(whole) - {"input_ids", "mask"}:
        for row in range(3):
            at = whole[key][0, row * LENGTH : (row + 1) * LENGTH - 1][: 3 * LENGTH - 6 - row * LENGTH]
            there = parts[key][row, : len(at)]
            most = min(at.shape[-1], there.shape[-1]) if at.ndim == 2 else None
            assert torch.equal(at[..., :most] if most else at, there[..., :most] if most else there)
            assert not most or not (at[..., most:].any() or there[..., most:].any())


@every_codec
def test_a_row_that_predicts_nothing_has_an_empty_signal(codec: CodecSpec, tmp_path: Path) -> None:
    ids = np.array([3, 0, 0, 0, 0, 5], np.uint16)  # documents of one token fill the second row
    ids.tofile(tmp_path / "few.bin")
    blocks = Blocks(TokenFile(str(tmp_path / "few.bin"), "uint16", 6, 5, 1, VOCABULARY - 1, 0), 2, packing="documents")
    place = place_of(tmp_path / "cache", blocks, codec)
    fill_all(place, blocks, [0])
    cached = CachedBlocks(blocks, place)
    alone, among = cached[1], cached[[0, 1]]
    assert not alone["mask"].any()
    for key in set(among) - {"input_ids", "mask", "position_ids"}:
        assert not alone[key].any()
        assert not among[key][1].any()
        assert among[key][0].any()


def test_text_that_the_teachers_packing_leaves_out_is_refused(tmp_path: Path) -> None:
    tokens = text_of(tmp_path, documents_of_one=True)
    place = place_of(tmp_path / "cache", Blocks(tokens, 24, packing="best_fit"), Hidden())
    with pytest.raises(InputError, match="packing best_fit, which leaves out what is a single token in its row"):
        place.needed(Blocks(tokens, 24), [0])


def test_another_window_or_packing_of_the_teacher_is_another_cache(blocks: Blocks, tmp_path: Path) -> None:
    fill_all(place_of(tmp_path / "cache", blocks, TopK(k=4)), blocks)
    for name, other in {
        "another window": Blocks(blocks.tokens, LENGTH + 1),
        "another packing": Blocks(blocks.tokens, LENGTH, packing="documents"),
    }.items():
        with pytest.raises(InputError, match=f"written with {name}"):
            place_of(tmp_path / "cache", other, TopK(k=4)).header()
