"""A tokenizer that puts tokens before a text: every stretch that a model reads by itself begins with them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from benchmarks.real_text import _apart, _wrapped
from distill.core.errors import InputError
from distill.data.corpus import Corpus
from distill.data.encoder import TextEncoder
from distill.data.first_tokens import around, written_start
from distill.data.loader import calibration_batches
from distill.data.micro_batches import MicroBatches
from distill.data.packed_rows import PackedRows
from distill.data.packing import store_tokens
from distill.data.rows import belongs_to_start
from distill.data.spec import DataSpec
from distill.data.stream import Stream
from distill.data.teacher_cache.identity import hash_of_tokens
from distill.data.tokenizer import load_tokenizer
from distill.training.sampling_prompts import of_text

END, LENGTH = 0, 16
SIZES = [3, 16, 9, 4, 40, 5, 17, 7, 11, 32, 4, 6, 33, 15]
PACKINGS: tuple[Any, ...] = ("wrapped", "documents", "best_fit", "padded")


def make(folder: Path, start: Sequence[int]) -> Any:
    """A file of documents of :data:`SIZES` tokens, each with its start and end, in which no other token comes twice."""
    ids = np.arange(100, 100 + sum(SIZES), dtype=np.uint16)
    bounds = np.cumsum([0, *SIZES])
    ids[bounds[1:] - 1] = END
    for at in bounds[:-1]:
        ids[at : at + len(start)] = start
    path = folder / "train-0.bin"
    tokens = store_tokens(path, np.split(ids, bounds[1:-1]), END, start=start)
    sizes = (ids % 5).astype(np.uint32)
    sizes[belongs_to_start(start, bounds, ids, np.arange(len(ids)))] = 0
    sizes.tofile(path.with_suffix(".bytes"))
    return tokens


@pytest.fixture(params=[(7,), (7, 8)], ids=["one", "two"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return make(tmp_path, request.param)


def expected(file: Any, length: int, packing: str) -> dict[int, list[int]]:
    """Token of the file that counts -> all that the model reads before it, by a plain loop; see the benchmark."""
    ids, bounds, begin = file.ids().tolist(), file.bounds().tolist(), list(file.start)
    documents = [ids[a:b] for a, b in itertools.pairwise(bounds)]
    cut = _wrapped if packing in ("wrapped", "documents") else _apart
    found: dict[int, list[int]] = {}
    for at, read, skipped in cut(documents, begin, length):
        begins = 0
        for i in range(1, len(read)):
            place = at + i - skipped
            if packing == "documents" and place in bounds:
                begins = i
            if i > skipped and not any(place - bound in range(len(begin)) for bound in bounds):
                found[place] = read[begins:i]
    return found


@pytest.mark.parametrize("length", [LENGTH, 6, 64])
@pytest.mark.parametrize("packing", PACKINGS)
def test_what_counts_and_what_stands_before_it_is_that_of_a_plain_loop(file: Any, packing: Any, length: int) -> None:
    blocks, ids, found = PackedRows(file, length, packing=packing), file.ids(), {}
    batch = blocks[list(range(len(blocks)))]
    places = batch.get("position_ids", torch.arange(batch["mask"].shape[1]).expand(batch["mask"].shape))
    for number in range(len(blocks)):
        counted = torch.nonzero(batch["mask"][number]).flatten().tolist()
        assert len(counted) == len(blocks.predicted(number))
        for column, place in zip(counted, blocks.predicted(number).tolist(), strict=True):
            seen = batch["input_ids"][number, column - places[number, column] : column + 1]
            assert place not in found
            found[place] = seen.tolist()
            assert batch["targets"][number, column] == ids[place]
            assert tuple(seen[: len(file.start)].tolist()) == file.start
    assert found == expected(file, length, packing)
    assert blocks.num_predictions() == len(found)
    assert blocks.bytes_of_rows().sum() == file.bytes_of_tokens()[sorted(found)].sum()
    assert blocks.lengths().max() <= length


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_token_of_the_file_stands_in_one_row_and_columns_find_it(file: Any, packing: Any) -> None:
    blocks, ids = PackedRows(file, LENGTH, packing=packing), file.ids()
    seen: list[int] = []
    for number in range(len(blocks)):
        at = [start + i for start, size in blocks.pieces(number) for i in range(size)]
        assert blocks[number]["input_ids"][0][blocks.columns(number)].tolist() == ids[at].tolist()
        seen += at
    assert len(set(seen)) == len(seen) >= file.num_tokens - len(SIZES)


def test_without_such_tokens_rows_are_what_they_were(tmp_path: Path) -> None:
    tokens = make(tmp_path, ())
    for packing in PACKINGS:
        blocks = PackedRows(tokens, LENGTH, packing=packing)
        assert not any(sum(blocks.leads(number)) for number in range(len(blocks)))
        assert (blocks.columns(1) == np.arange(blocks.lengths()[1])).all()


def test_rows_that_are_cut_otherwise_are_another_text(file: Any) -> None:
    assert hash_of_tokens(file) != hash_of_tokens(replace(file, start=()))


def test_a_row_without_room_for_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.sequence_length \(2\) must be at least 3, as each row"):
        PackedRows(make(tmp_path, (7,)), 2)


def with_start(tokenizer: Any, folder: Path, before: str) -> Any:
    """The tokenizer, putting tokens before each text; saved and loaded."""
    tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<one>", "<two>"]})
    names = before.split()
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*names, "$A"], pair=[*names, "$A", "$B"], special_tokens=special
    )
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("before", ["<one>", "<one> <two>", "<|endoftext|>"])
def test_what_a_tokenizer_puts_before_a_text_is_found(tokenizer: Any, tmp_path: Path, before: str) -> None:
    made = with_start(tokenizer, tmp_path / "tokenizer", before)
    ids = made.convert_tokens_to_ids(before.split())
    encoder = TextEncoder(made)
    assert around(made) == (ids, [])
    assert encoder.start == ids
    assert encoder.start_tokens == before.split()
    assert encoder.encode(["a fox"])[0].tolist() == [*made("a fox")["input_ids"], made.eos_token_id]
    assert encoder.identity() != TextEncoder(tokenizer).identity() == [[]]
    backend = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    assert written_start(backend) == before.split()
    assert around(tokenizer) == ([], [])


def test_what_tokenizer_files_say_is_read() -> None:
    assert written_start({"post_processor": None}) == written_start({"post_processor": {"type": "ByteLevel"}}) == []
    assert written_start({"post_processor": {"type": "RobertaProcessing", "cls": ["<s>", 0]}}) == ["<s>"]
    assert written_start({"post_processor": {"type": "Unheard"}}) is None
    byte_level = {"type": "ByteLevel"}
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}}],
        "special_tokens": {"<s>": {"tokens": ["<s>"]}, "</s>": {"tokens": ["</s>"]}},
    }
    assert written_start({"post_processor": {"type": "Sequence", "processors": [byte_level, template]}}) == ["<s>"]


@pytest.fixture
def begins(tokenizer: Any, tmp_path: Path) -> Any:
    return with_start(tokenizer, tmp_path / "begins", "<one>")


def spec(path: Path, **more: Any) -> DataSpec:
    plain = {"train": {"kind": "jsonl", "path": str(path)}, "sequence_length": 24, "held_out": 0.2}
    return DataSpec.model_validate(plain | more)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_corpus_trains_calibrates_and_validates_on_such_rows(
    rows: Path, begins: Any, tmp_path: Path, packing: Any
) -> None:
    corpus = Corpus.open(spec(rows, packing=packing), begins, tmp_path / "data", 3, len(begins))
    first, length = begins.convert_tokens_to_ids("<one>"), 24

    def check(batch: Any) -> None:
        assert (batch["input_ids"][:, 0] == first).all()
        assert batch["input_ids"].shape[1] <= length
        assert not (batch["mask"] & (batch["targets"] == first)).any()
        if "position_ids" in batch:  # and each document, or part of one, that a row holds
            begin = (batch["position_ids"] == 0) & (batch["input_ids"] != begins.eos_token_id)
            assert (batch["input_ids"][begin] == first).all()

    straight = list(itertools.islice(corpus.train_loader(MicroBatches(3)), 20))
    for batch in [*straight, *corpus.calibration_loader(5, 2), *corpus.validation_loader(3)]:
        check(batch)
    later = next(iter(corpus.train_loader(MicroBatches(3, 18))))  # a resume begins at any row
    assert {key: value.tolist() for key, value in later.items()} == {k: v.tolist() for k, v in straight[6].items()}
    counted = sum(int(batch["mask"].sum()) for batch in corpus.validation_loader(3))
    assert counted == corpus.validation.num_predictions()
    assert "each row begins with '<one>', which the tokenizer puts before a text; it counts in sequence_length" in (
        corpus.summary()
    )


def test_a_stream_has_the_rows_of_the_same_text_on_disk(
    rows: Path, begins: Any, tmp_path: Path, text_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    texts = [text_of(i) for i in range(30)]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "set/train.parquet")
    plain = {"kind": "hub", "path": str(tmp_path / "set")}
    for packing in ("wrapped", "documents"):
        stored, streamed = (
            Corpus.open(
                spec(rows, packing=packing, train=plain | {"streaming": streaming}), begins, tmp_path / "data", 0, 500
            ).train
            for streaming in (False, True)
        )
        assert isinstance(stored, PackedRows)
        assert isinstance(streamed, Stream)
        count = len(stored) - 1  # the last one of the file is not full
        batch, there = stored[list(range(count))], streamed.batch(streamed.first(count))
        assert set(batch) == set(there)
        for key in ("input_ids", "mask", *["position_ids"] * (packing == "documents")):
            assert torch.equal(batch[key], there[key]), key
        calibration = next(iter(calibration_batches(streamed, 0, count, count)))
        assert torch.equal(calibration["input_ids"], batch["input_ids"])


@pytest.mark.parametrize("packing", PACKINGS)
def test_own_sequences_continue_prompts_that_begin_so(file: Any, packing: Any) -> None:
    blocks = PackedRows(file, 2 * LENGTH, packing=packing)
    batch = blocks[list(range(len(blocks)))]
    for start in (len(file.start) + 1, 9):
        prompts = of_text(batch, start, 3, END)
        assert prompts.are_there.sum() > 3
        for number in torch.nonzero(prompts.are_there).flatten().tolist():
            last = start - 1 if prompts.places is None else int(prompts.places[number, -1])
            assert tuple(prompts.ids[number, start - 1 - last :][: len(file.start)].tolist()) == file.start
