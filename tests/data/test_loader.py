"""The order of samples depends on the seed alone."""

import itertools
import random

import numpy as np
import pytest
import torch

from distill.core.errors import InputError
from distill.data import corpus as corpus_module
from distill.data.corpus import Corpus, trained_tokenizer
from distill.data.micro_batches import MicroBatches
from distill.data.order import GlobalOrder
from distill.data.packed_rows import PackedRows
from distill.data.shared_tokens import SharedText
from distill.data.spec import DataSpec
from distill.data.stream import Position


def spec(path, **more):
    plain = {"train": {"kind": "jsonl", "path": str(path)}, "sequence_length": 32, "held_out": 0.2}
    return DataSpec.model_validate(plain | more)


@pytest.fixture
def corpus(rows, tokenizer, tmp_path):
    return Corpus.open(spec(rows), tokenizer, tmp_path / "data", seed=3, vocabulary_size=400)


@pytest.fixture
def stream(tmp_path, tokenizer, text_of, monkeypatch):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    datasets.Dataset.from_dict({"text": [text_of(i) for i in range(40)]}).to_parquet(folder / "train.parquet")
    source = {"kind": "hub", "path": str(folder), "streaming": True}
    data = DataSpec.model_validate({"train": source, "sequence_length": 32, "held_out": 0.2, "validation_tokens": 64})
    return Corpus.open(data, tokenizer, tmp_path / "data", seed=3, vocabulary_size=400)


@pytest.fixture(params=["map", "stream"])
def either(request):
    return request.getfixturevalue("corpus" if request.param == "map" else "stream")


def take(loader, count):
    return torch.cat([batch["input_ids"] for batch in itertools.islice(loader, count)])


def blocks_in_a_pass(corpus):
    if isinstance(corpus.train, PackedRows):
        return len(corpus.train)
    num_tokens = 0
    for _, at in corpus.train.read(Position()):
        if at.number:
            break
        num_tokens = at.num_tokens
    return num_tokens // corpus.train.sequence_length


def test_the_order_is_the_same_for_every_split_into_ranks_micro_batches_and_workers(either):
    total = 24 * (blocks_in_a_pass(either) // 24 + 2)  # over the edge of a pass
    straight = take(either.train_loader(MicroBatches(1)), total)
    for micro, world, workers in ((4, 1, 0), (2, 2, 0), (1, 4, 0), (3, 2, 0), (2, 3, 2), (12, 2, 1)):
        loaders = [
            iter(either.train_loader(MicroBatches(micro, 0, rank, world), workers if rank == 0 else 0))
            for rank in range(world)
        ]
        pieces = [next(loader)["input_ids"] for _ in range(total // (micro * world)) for loader in loaders]
        assert torch.equal(torch.cat(pieces), straight), (micro, world, workers)


def test_going_on_from_any_position_is_exact(either):
    in_pass = blocks_in_a_pass(either)
    total = in_pass + 12
    straight = take(either.train_loader(MicroBatches(1)), total)
    for position in (0, 1, 5, in_pass - 1, in_pass, in_pass + 1, in_pass + 7):
        rest = take(either.train_loader(MicroBatches(1, position)), total - position)
        assert torch.equal(rest, straight[position:]), position
    # Each resumed run saves its own position, and another one goes on from there with other micro-batches.
    first = take(either.train_loader(MicroBatches(4)), 3)
    second = take(either.train_loader(MicroBatches(2, 12)), 2)
    third = take(either.train_loader(MicroBatches(1, 16)), in_pass - 10)
    assert torch.equal(torch.cat([first, second, third]), straight[: in_pass + 6])


def test_every_pass_shows_every_block_once_in_another_order():
    order = iter(GlobalOrder(11, 5, MicroBatches(1)))
    passes = [[next(order)[0] for _ in range(11)] for _ in range(4)]
    assert all(sorted(numbers) == list(range(11)) for numbers in passes)
    assert len({tuple(numbers) for numbers in passes}) == 4
    other = iter(GlobalOrder(11, 6, MicroBatches(1)))
    assert [next(other)[0] for _ in range(11)] != passes[0]


@pytest.mark.parametrize("wrong", [(0,), (2, -1), (2, 0, 2, 2), (2, 0, -1, 2)])
def test_no_part_of_the_list_is_refused(wrong):
    with pytest.raises(ValueError, match="no such part of the training rows: MicroBatches"):
        MicroBatches(*wrong)


def test_loaders_leave_the_global_random_state_alone_and_do_not_depend_on_it(either):
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = take(either.train_loader(MicroBatches(2), num_workers=1), 4), take(either.calibration_loader(4, 2), 2)
    list(either.validation_loader(2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    torch.manual_seed(2)
    assert torch.equal(take(either.train_loader(MicroBatches(2)), 4), first[0])
    assert torch.equal(take(either.calibration_loader(4, 2), 2), first[1])


def test_batches_keep_the_contract(either):
    for loader in (either.train_loader(MicroBatches(3)), either.validation_loader(3), either.calibration_loader(6, 3)):
        batch = next(iter(loader))
        assert set(batch) == {"input_ids", "targets", "mask"}
        assert batch["input_ids"].dtype == torch.int64
        assert batch["mask"].dtype == torch.bool
        assert batch["input_ids"].shape == batch["mask"].shape
        assert batch["input_ids"].shape[1] == 32
        assert not batch["mask"][:, -1].any()
        assert batch["mask"][0, :-1].all()


def test_validation_is_finite_fixed_and_its_bytes_are_those_of_its_predictions(either, tokenizer):
    batches = list(either.validation_loader(4))
    again = list(either.validation_loader(4))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    assert sum(int(batch["mask"].sum()) for batch in batches) == either.validation.num_predictions()
    assert either.validation_bytes == either.validation.bytes_of_rows().sum()
    # Every block's text, without its first token and the ends, in bytes; cut characters can only be at its edges.
    text = 0
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["mask"], strict=True):
            predicted = ids.roll(-1)[mask]
            text += len(tokenizer.decode(predicted, skip_special_tokens=True).replace("\ufffd", "").encode())
    assert abs(text - either.validation_bytes) <= 8 * len(either.validation)


def test_the_sides_of_a_corpus_share_no_document(corpus, tokenizer):
    def documents(tokens):
        return set(tokenizer.decode(tokens.ids()).split("<|endoftext|>")) - {""}

    train, validation = documents(corpus.train.tokens), documents(corpus.validation.tokens)
    assert not train & validation
    assert len(train) + len(validation) == 60


def test_validation_tokens_are_spread_over_the_whole(rows, tokenizer, tmp_path):
    few = Corpus.open(spec(rows, held_out=0.5, validation_tokens=130), tokenizer, tmp_path / "data", 0, 400)
    everything = Corpus.open(spec(rows, held_out=0.5), tokenizer, tmp_path / "data", 0, 400)
    assert len(few.validation) == 4
    quarter = len(everything.validation) / 4
    assert [round(number / quarter) for number in few.validation.chosen] == [0, 1, 2, 3]
    assert few.hash != everything.hash


def test_calibration_takes_distinct_training_blocks(corpus):
    blocks = take(corpus.calibration_loader(10, 4), 99)
    assert len(blocks) == 10
    assert len({tuple(row.tolist()) for row in blocks}) == 10
    train = {tuple(row.tolist()) for row in corpus.train[list(range(len(corpus.train)))]["input_ids"]}
    assert {tuple(row.tolist()) for row in blocks} <= train
    assert len(take(corpus.calibration_loader(10_000, 4), 10_000)) == len(corpus.train)


def test_opening_again_does_not_tokenize_again(rows, tokenizer, tmp_path, monkeypatch, corpus):
    monkeypatch.setattr(SharedText, "write", lambda *args: pytest.fail("tokenized again"))
    again = Corpus.open(spec(rows), tokenizer, tmp_path / "data", seed=3, vocabulary_size=400)
    assert again.hash == corpus.hash
    assert again.summary() == corpus.summary()
    shorter = Corpus.open(spec(rows, sequence_length=16), tokenizer, tmp_path / "data", 3, 400)
    assert shorter.hash != corpus.hash
    with pytest.raises(InputError, match="but the model's vocabulary has 50 rows"):
        Corpus.open(spec(rows), tokenizer, tmp_path / "data", seed=3, vocabulary_size=50)


def test_other_text_or_split_is_tokenized_anew(rows, tokenizer, tmp_path, corpus):
    assert Corpus.open(spec(rows, held_out=0.3), tokenizer, tmp_path / "data", 3, 400).hash != corpus.hash
    rows.write_text(rows.read_text() + '{"text": "more"}\n')
    assert Corpus.open(spec(rows), tokenizer, tmp_path / "data", 3, 400).hash != corpus.hash


def test_too_little_text_is_refused_in_one_line(rows, tokenizer, tmp_path, stream):
    with pytest.raises(InputError, match=r"data.train: empty corpus: \d+ tokens in \d+ documents, expected at least"):
        Corpus.open(spec(rows, sequence_length=100_000), tokenizer, tmp_path / "data", 0, 400)
    source = {"kind": "hub", "path": str(tmp_path / "set"), "streaming": True}
    with pytest.raises(InputError, match="empty corpus"):
        Corpus.open(spec(rows, train=source, sequence_length=100_000), tokenizer, tmp_path / "data", 0, 400)


def test_summary_is_one_line_and_says_what_was_left_out(rows, tokenizer, tmp_path, text_of, stream):
    import json

    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": text_of(i)}) + "\n" for i in range(57, 70)))
    data = DataSpec.model_validate(
        {
            "train": {"kind": "jsonl", "path": str(rows)},
            "validation": {"kind": "jsonl", "path": str(own)},
            "sequence_length": 32,
        }
    )
    summary = Corpus.open(data, tokenizer, tmp_path / "data", 0, 400).summary()
    assert "train 57 documents" in summary
    assert "3 documents left out as validation has them" in summary
    assert "\n" not in summary
    assert "stream" in stream.summary()


def test_a_tokenizer_of_its_own_is_trained_once(rows, tmp_path, monkeypatch):
    folder, new = tmp_path / "data", spec(rows, tokenizer={"vocab_size": 300})
    trained = trained_tokenizer(new, new.tokenizer, folder)
    assert len(trained) == 300
    monkeypatch.setattr(corpus_module, "train_tokenizer", lambda *args: pytest.fail("trained again"))
    assert trained_tokenizer(new, new.tokenizer, folder).get_vocab() == trained.get_vocab()
