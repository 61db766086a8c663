"""Easy rows first: the same rows, sorted, by seed and position alone; then the usual order."""

import itertools
import json

import numpy as np
import pytest
from pydantic import ValidationError

from distill.data.corpus import Corpus
from distill.data.curriculum import LEVELS, EasyFirst, levels, longest_documents
from distill.data.micro_batches import MicroBatches
from distill.data.mixture_order import MixtureOrder, SourceRows, as_whole
from distill.data.order import GlobalOrder
from distill.data.spec import DataSpec


def take(order, count, start=0):
    return [order.row_at(position) for position in range(start, start + count)]


def test_the_first_rows_are_sorted_and_all_are_those_of_the_usual_order():
    lengths = np.random.default_rng(0).integers(2, 500, 900)
    usual = GlobalOrder(900, 3, MicroBatches(1))
    order = EasyFirst(GlobalOrder(900, 3, MicroBatches(1)), 600, lengths, np.zeros(900, np.int64))
    straight, expected = np.array(take(order, 2000)), np.array(take(usual, 2000))
    assert sorted(straight[:600]) == sorted(expected[:600])
    assert np.array_equal(straight[600:], expected[600:])
    means = [lengths[part].mean() for part in np.array_split(straight[:600], LEVELS)]
    assert means == sorted(means)
    assert means[-1] > 20 * means[0]
    # anywhere begun it is the same
    late = EasyFirst(GlobalOrder(900, 3, MicroBatches(1)), 600, lengths, np.zeros(900, np.int64))
    assert take(late, 50, 580) == straight[580:630].tolist()


def test_copies_of_a_row_do_not_stand_together():
    lengths = np.arange(2, 322)
    order = EasyFirst(GlobalOrder(320, 3, MicroBatches(1)), 960, lengths, np.zeros(320, np.int64))
    rows = np.array(take(order, 960))
    assert (np.bincount(rows) == 3).all()
    gaps = [np.diff(np.flatnonzero(rows == row)).min() for row in range(320)]
    assert np.mean(gaps) > 4  # a level holds ten rows, three times


def test_levels_hold_as_many_rows_but_for_equal_ones():
    assert np.bincount(levels(np.arange(320)[::-1])).tolist() == [10] * LEVELS
    assert levels(np.array([7, 7, 7])).tolist() == [levels(np.array([7]))[0]] * 3
    assert len(set(levels(np.array([1, 1, 1, 9])).tolist())) == 2


def test_sources_of_a_mixture_keep_their_places():
    draw = np.random.default_rng(1)
    sizes, first, sources = (40, 300), 0, []
    for size, weight, most in zip(sizes, as_whole([0.6, 0.4]), (60, 600), strict=True):
        sources.append(SourceRows(weight, np.arange(first, first + size), draw.integers(2, most, size)))
        first += size
    lengths, source = np.concatenate([one.lengths for one in sources]), np.repeat([0, 1], sizes)
    usual = take(MixtureOrder(sources, 5, MicroBatches(1)), 400)
    rows = take(EasyFirst(MixtureOrder(sources, 5, MicroBatches(1)), 250, lengths, source), 400)
    assert np.array_equal(source[rows], source[usual])
    assert rows != usual
    assert rows[250:] == usual[250:]
    for one in (0, 1):
        own = lengths[[row for row in rows[:250] if source[row] == one]]
        assert own[: len(own) // 4].mean() < own[-len(own) // 4 :].mean() / 3


@pytest.fixture
def open_(tmp_path, tokenizer):
    texts = [" ".join(f"w{number}x{place}" for place in range(2 + number * 7 % 23)) for number in range(90)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")

    def opened(packing, order=None):
        data = {"train": {"kind": "jsonl", "path": str(path)}, "sequence_length": 128, "packing": packing}
        data = DataSpec.model_validate(data | ({"order": order} if order else {}))
        return Corpus.open(data, tokenizer, tmp_path / "data", seed=3, vocabulary_size=400)

    return opened


@pytest.mark.parametrize("packing", ["best_fit", "padded"])
def test_ranks_workers_and_restarts_change_nothing(open_, packing):
    corpus = open_(packing, {"by": "length", "until": 0.5})
    total = 12 * (len(corpus.train) // 12 + 2)

    def rows(taken, workers=0, of=corpus):
        batches = itertools.islice(
            of.train_loader(taken, workers, total), -(-(total - taken.consumed_sequences) // taken.step)
        )
        return [
            [ids[: int(mask.nonzero()[-1]) + 2].tolist() for ids, mask in zip(b["input_ids"], b["mask"], strict=True)]
            for b in batches
        ]

    def flat(batches):
        return list(itertools.chain.from_iterable(batches))

    straight = flat(rows(MicroBatches(1)))
    assert flat(rows(MicroBatches(4))) == straight
    assert flat(rows(MicroBatches(3, 6), 2)) == straight[6:]
    halves = [rows(MicroBatches(2, 0, rank, 2)) for rank in (0, 1)]
    assert flat(row for pair in zip(*halves, strict=True) for row in pair) == straight
    usual = flat(rows(MicroBatches(1), of=open_(packing)))
    assert usual != straight
    assert usual[total // 2 :] == straight[total // 2 :]
    assert sorted(usual) == sorted(straight)
    assert corpus.hash == open_(packing).hash  # the tokens, and what a teacher says about them, serve both


def test_a_row_is_as_hard_as_its_longest_document(open_):
    blocks = open_("best_fit").train
    longest = longest_documents(blocks)
    assert longest.tolist() == [max(size for _, size in blocks.pieces(number)) for number in range(len(blocks))]
    assert len(set(longest.tolist())) > 3
    some = blocks.only(np.array([5, 1]))
    assert longest_documents(some).tolist() == longest[[5, 1]].tolist()


@pytest.mark.parametrize("packing", ["wrapped", "padded"])
def test_rows_are_sorted_by_losses_that_are_given(open_, packing):
    corpus = open_(packing, {"by": "teacher_loss", "until": 1.0})
    total = len(corpus.train)
    losses = np.random.default_rng(0).random(total).astype(np.float32)
    order = corpus.train_loader(MicroBatches(1), 0, total, losses).sampler
    rows = [row for (row,) in itertools.islice(order, total)]
    assert sorted(rows) == list(range(total))
    assert np.array_equal(np.sort(levels(losses)), levels(losses)[rows])
    with pytest.raises(ValueError, match="needs the losses"):
        corpus.train_loader(MicroBatches(1), 0, total)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"order": {"by": "length"}}, "by length has no effect with packing: wrapped"),
        ({"packing": "padded", "order": {"by": "loss"}}, "Input should be 'length' or 'teacher_loss'"),
        (
            {"train": {"kind": "hub", "path": "a/b", "streaming": True}, "order": {"by": "teacher_loss"}},
            "order: a stream is read as it comes",
        ),
        ({"packing": "padded", "order": {"by": "length", "until": 0}}, "greater than 0"),
    ],
)
def test_what_cannot_be_ordered_is_refused(more, what):
    with pytest.raises(ValidationError, match=what):
        DataSpec.model_validate({"train": "python_docs", "sequence_length": 16} | more)
