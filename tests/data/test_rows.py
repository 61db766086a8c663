"""How documents become rows: nothing lost, nothing twice, cut only where it must be, and no prediction across."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.core.errors import InputError
from distill.data.corpus import Corpus
from distill.data.micro_batches import MicroBatches
from distill.data.order import GlobalOrder
from distill.data.packed_rows import PackedRows
from distill.data.packing import store_tokens
from distill.data.rows import best_fit, document_spans
from distill.data.spec import DataSpec

END, LENGTH = 0, 16
SIZES = [3, 16, 9, 2, 40, 5, 17, 7, 11, 32, 4, 6, 33]
PACKINGS = ("wrapped", "documents", "best_fit", "padded")


@pytest.fixture
def file(tmp_path):
    """Documents of :data:`SIZES` tokens, in which no other token comes twice."""
    ids = np.arange(1, sum(SIZES) + 1, dtype=np.uint16)
    ids[np.cumsum(SIZES) - 1] = END
    path = tmp_path / "train-0.bin"
    tokens = store_tokens(path, np.split(ids, np.cumsum(SIZES)[:-1]), END)
    (ids % 5).astype(np.uint32).tofile(path.with_suffix(".bytes"))
    return tokens


def document_of(file):
    """Token in the file -> number of its document."""
    return np.repeat(np.arange(len(SIZES)), SIZES)


def pieces(blocks):
    return [piece for number in range(len(blocks)) for piece in blocks.pieces(number)]


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_token_stands_in_one_row(file, packing):
    blocks = PackedRows(file, LENGTH, packing=packing)
    places = [start + i for start, size in pieces(blocks) for i in range(size)]
    assert len(set(places)) == len(places)
    # a token alone in its piece cannot be predicted; the end of the documents of 17 and 33 tokens is one
    lost = {"best_fit": 2, "padded": 2}.get(packing, 0)
    assert len(places) == file.num_tokens - lost
    assert blocks.lengths().sum() == len(places)
    assert max(blocks.lengths()) <= LENGTH


@pytest.mark.parametrize("packing", ["documents", "best_fit", "padded"])
def test_a_piece_is_of_one_document_and_no_prediction_crosses(file, packing):
    blocks, document = PackedRows(file, LENGTH, packing=packing), document_of(file)
    for start, size in pieces(blocks):
        assert len(set(document[start : start + size])) == 1
    batch = blocks[list(range(len(blocks)))]
    targets = batch["targets"][batch["mask"]]
    ids = file.ids()
    predicted = [int(ids[start + i]) for start, size in pieces(blocks) for i in range(1, size)]
    assert targets.tolist() == predicted
    assert blocks.num_predictions() == len(predicted)
    counts = file.bytes_of_tokens()
    assert blocks.bytes_of_rows().sum() == sum(counts[start + 1 : start + size].sum() for start, size in pieces(blocks))


@pytest.mark.parametrize("packing", ["best_fit", "padded"])
def test_only_what_is_longer_than_a_row_is_cut(file, packing):
    sizes = [size for _, size in pieces(PackedRows(file, LENGTH, packing=packing))]
    expected = [min(LENGTH, n - i) for n in SIZES for i in range(0, n, LENGTH) if n - i > 1]
    assert sorted(sizes) == sorted(expected)


def test_best_fit_fills_rows(file):
    fit, alone = (PackedRows(file, LENGTH, packing=packing) for packing in ("best_fit", "padded"))
    least = -(-fit.lengths().sum() // LENGTH)
    assert least <= len(fit) <= least + 1 < len(alone)
    random = np.random.default_rng(0)
    sizes = random.integers(2, 100, 2000)
    row_of = best_fit(sizes, 128)
    assert np.bincount(row_of, weights=sizes).max() <= 128
    assert sizes.sum() / (128 * (row_of.max() + 1)) > 0.99
    _, first = np.unique(row_of, return_index=True)
    assert (np.diff(first) > 0).all()  # rows follow the text, so that a part of them is spread over it


@pytest.mark.parametrize("packing", PACKINGS)
def test_tokens_that_are_not_learned_from_are_read_and_never_count(file, packing):
    ids, bounds = np.asarray(file.ids()), np.cumsum(SIZES)[:-1]
    learned = np.random.default_rng(1).random(len(ids)) < 0.4
    partly = store_tokens(Path(file.path), np.split(ids, bounds), END, np.split(learned, bounds))
    assert partly.num_learned == learned.sum()
    blocks, whole = PackedRows(partly, LENGTH, packing=packing), PackedRows(file, LENGTH, packing=packing)
    every = list(range(len(blocks)))
    batch, plain = blocks[every], whole[every]
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    assert not (batch["mask"] & ~plain["mask"]).any()
    predicted = [place for number in every for place in blocks.predicted(number).tolist()]
    assert learned[predicted].all()
    assert batch["targets"][batch["mask"]].tolist() == ids[predicted].tolist()
    assert blocks.num_predictions() == batch["mask"].sum() == sum(learned[whole.predicted(n)].sum() for n in every)
    assert blocks.bytes_of_rows().sum() == partly.bytes_of_tokens()[predicted].sum()


def test_position_ids_start_anew_with_each_piece_and_filling(file):
    for packing in ("documents", "best_fit"):
        blocks = PackedRows(file, LENGTH, packing=packing)
        batch = blocks[list(range(len(blocks)))]
        for number, places in enumerate(batch["position_ids"]):
            expected = [i for _, size in blocks.pieces(number) for i in range(size)]
            assert places.tolist() == expected + [0] * (LENGTH - len(expected))
    for packing in ("wrapped", "padded"):  # nothing stands before a document that it must not see
        assert set(PackedRows(file, LENGTH, packing=packing)[0]) == {"input_ids", "targets", "mask"}


def test_padded_rows_are_as_wide_as_the_longest_of_their_batch(file):
    blocks = PackedRows(file, LENGTH, packing="padded")
    assert blocks[0]["input_ids"].shape == (1, 3)
    assert blocks[[0, 2]]["input_ids"].shape == (2, 9)
    assert blocks[[0, 2]]["mask"].sum(1).tolist() == [2, 8]
    assert blocks[[0, 2]]["input_ids"][0, 3:].unique().tolist() == [END]


def test_documents_of_a_stretch_are_found():
    bounds = np.array([0, 3, 10, 12, 15, 16, 40])
    assert document_spans(bounds, 10, 6) == [(10, 2), (12, 3), (15, 1)]
    assert document_spans(bounds, 11, 4) == [(11, 1), (12, 3)]
    assert document_spans(bounds, 20, 7) == [(20, 7)]


def test_bucketing_keeps_every_pass_whole_and_its_batches_alike():
    lengths = np.random.default_rng(0).integers(2, 1000, 3000)
    plain, alike = (GlobalOrder(3000, 1, MicroBatches(8), sizes) for sizes in (None, lengths))
    first, second = ([alike.row_at(turn * 3000 + i) for i in range(3000)] for turn in (0, 1))
    assert sorted(first) == sorted(second) == list(range(3000))
    assert first != second

    def filling(order):
        batches = [lengths[numbers] for numbers in itertools.islice(order, 375)]
        return 1 - lengths.sum() / sum(batch.max() * len(batch) for batch in batches)

    assert filling(plain) > 0.4
    assert filling(alike) < 0.06
    steps = [lengths[first[i : i + 32]].mean() for i in range(0, 3000, 32)]
    assert abs(np.corrcoef(steps, np.arange(len(steps)))[0, 1]) < 0.3  # not from short to long


def spec(path, **more):
    plain = {"train": {"kind": "jsonl", "path": str(path)}, "sequence_length": 32, "held_out": 0.2}
    return DataSpec.model_validate(plain | more)


@pytest.mark.parametrize("packing", ["documents", "best_fit", "padded"])
def test_the_order_is_the_same_for_every_split(rows, tokenizer, tmp_path, packing):
    corpus = Corpus.open(spec(rows, packing=packing), tokenizer, tmp_path / "data", seed=3, vocabulary_size=400)

    def texts(loader, count):
        batches = itertools.islice(loader, count)
        return [
            ids[: int(mask.nonzero()[-1]) + 2].tolist()
            for batch in batches
            for ids, mask in zip(batch["input_ids"], batch["mask"], strict=True)
        ]

    total = 12 * (len(corpus.train) // 12 + 2)
    straight = texts(corpus.train_loader(MicroBatches(1)), total)
    assert texts(corpus.train_loader(MicroBatches(4)), total // 4) == straight
    assert texts(corpus.train_loader(MicroBatches(3, 6)), total // 3 - 2) == straight[6:]
    halves = [texts(corpus.train_loader(MicroBatches(2, 0, rank, 2)), total // 4) for rank in (0, 1)]
    merged = [row for i in range(0, total // 2, 2) for half in halves for row in half[i : i + 2]]
    assert merged == straight


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_corpus_counts_its_text(rows, tokenizer, tmp_path, packing):
    corpus = Corpus.open(spec(rows, packing=packing), tokenizer, tmp_path / "data", seed=3, vocabulary_size=400)
    counted = sum(int(batch["mask"].sum()) for batch in corpus.validation_loader(3))
    assert counted == corpus.validation.num_predictions()
    assert corpus.validation_bytes == corpus.validation.bytes_of_rows().sum()
    if packing in ("wrapped", "documents"):
        assert corpus.tokens_per_sequence == 32
    else:
        assert corpus.tokens_per_sequence * len(corpus.train) == pytest.approx(corpus.train.lengths().sum())
    assert len(list(corpus.calibration_loader(5, 2))) == 3
    hashes = {Corpus.open(spec(rows, packing=other), tokenizer, tmp_path / "data", 3, 400).hash for other in PACKINGS}
    assert len(hashes) == len(PACKINGS)  # their figures do not compare


def test_streams_keep_documents_apart_but_are_not_sorted(tmp_path, tokenizer, text_of, monkeypatch):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"text": [text_of(i) for i in range(40)]}).to_parquet(tmp_path / "set/train.parquet")
    more = {"train": {"kind": "hub", "path": str(tmp_path / "set"), "streaming": True}, "validation_tokens": 64}
    corpus = Corpus.open(spec("", packing="documents", **more), tokenizer, tmp_path / "data", 3, 400)
    batch = next(iter(corpus.train_loader(MicroBatches(4))))
    ids, places = batch["input_ids"], batch["position_ids"]
    end = tokenizer.eos_token_id
    assert ((places[:, 1:] == 0) == (ids[:, :-1] == end)).all()
    assert torch.equal(batch["mask"][:, :-1], places[:, 1:] > 0)
    calibration = next(iter(corpus.calibration_loader(4, 4)))
    assert torch.equal(calibration["position_ids"], places)
    for packing in ("best_fit", "padded"):
        with pytest.raises(ValueError, match=f"packing: {packing} must know the length of every document"):
            spec("", packing=packing, **more)


def test_a_file_of_long_documents_alone_is_no_empty_corpus(rows, tokenizer, tmp_path):
    corpus = Corpus.open(spec(rows, packing="padded", sequence_length=10_000), tokenizer, tmp_path / "data", 0, 400)
    assert len(corpus.train) == corpus.train.tokens.num_documents
    with pytest.raises(InputError, match="empty corpus"):
        Corpus.open(spec(rows, packing="documents", sequence_length=10_000), tokenizer, tmp_path / "data", 0, 400)
