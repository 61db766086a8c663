"""Several sources as one text: shares in tokens, an order that seed and position decide, a part of each held out."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch

from distill.core.errors import InputError
from distill.data.corpus import Corpus
from distill.data.loader import order_of, rows_of_sources
from distill.data.micro_batches import MicroBatches
from distill.data.mixture_order import MixtureOrder, SourceRows, as_whole, passes, tokens_per_row
from distill.data.spec import DataSpec

TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"


def sources_of(seed=0):
    """Sources of 7, 40 and 300 rows of odd lengths, with weights that do not fit their sizes."""
    draw = np.random.default_rng(seed)
    sizes, first, made = (7, 40, 300), 0, []
    for size, weight in zip(sizes, as_whole([0.5, 0.2, 0.3]), strict=True):
        made.append(SourceRows(weight, np.arange(first, first + size), draw.integers(2, 64, size)))
        first += size
    return made


def take(order, count):
    return [order.row_at(position) for position in range(count)]


@pytest.mark.parametrize("alike", [False, True])
def test_a_position_tells_its_row_wherever_one_starts(alike):
    straight = take(MixtureOrder(sources_of(), 3, MicroBatches(1), alike=alike), 5000)
    for start in (0, 1, 6, 7, 1023, 1024, 1025, 2500, 4095):
        order = MixtureOrder(sources_of(), 3, MicroBatches(1), alike=alike)
        assert [order.row_at(position) for position in range(start, start + 40)] == straight[start : start + 40]
    jumps = MixtureOrder(sources_of(), 3, MicroBatches(1), alike=alike)
    assert [jumps.row_at(position) for position in (4000, 3, 2999, 3000, 17)] == [
        straight[position] for position in (4000, 3, 2999, 3000, 17)
    ]
    assert take(MixtureOrder(sources_of(), 4, MicroBatches(1), alike=alike), 50) != straight[:50]


def test_weights_are_shares_of_tokens_after_any_number_of_rows():
    """The bound of the module's text: (1 + k w) / 2 rows of the longest length."""
    sources = sources_of()
    shares = np.array([source.weight for source in sources]) / sum(source.weight for source in sources)
    owner = np.repeat(np.arange(3), [len(source.numbers) for source in sources])
    lengths = np.concatenate([source.lengths for source in sources])
    rows = np.array(take(MixtureOrder(sources, 3, MicroBatches(1)), 6000))
    given = np.zeros((len(rows), 3))
    given[np.arange(len(rows)), owner[rows]] = lengths[rows]
    given = given.cumsum(0)
    off = np.abs(given - given.sum(1, keepdims=True) * shares)
    bound = (1 + len(sources) * shares) / 2 * lengths.max()
    assert (off <= bound).all()
    assert off.max() > 1  # else this could not fail
    assert given[-1].sum() == pytest.approx(6000 * tokens_per_row(sources), rel=0.01)
    assert passes(sources, 6000) == pytest.approx(
        [given[-1][i] / source.num_tokens for i, source in enumerate(sources)], rel=0.01
    )


def test_a_pass_over_a_source_holds_each_of_its_rows_once():
    sources = sources_of()
    rows = np.array(take(MixtureOrder(sources, 3, MicroBatches(1)), 6000))
    for source in sources:
        own = rows[np.isin(rows, source.numbers)]
        size = len(source.numbers)
        first, second = own[:size], own[size : 2 * size]
        assert sorted(first) == sorted(second) == source.numbers.tolist()
        assert not np.array_equal(first, second)


def test_a_source_of_one_row_and_a_share_of_next_to_nothing():
    few = [SourceRows(999_999, np.array([0]), np.array([5])), SourceRows(1, np.array([1, 2]), np.array([9, 9]))]
    rows = take(MixtureOrder(few, 0, MicroBatches(1)), 3000)
    assert rows.count(0) >= 2999


@pytest.fixture(scope="module")
def tokenizer(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATE
    return own


@pytest.fixture
def files(tmp_path, text_of):
    """A set of texts, one of conversations, and validation texts."""
    texts = [text_of(i) for i in range(60)]
    chats = [{"prompt": f"{text_of(100 + i)}?", "response": text_of(200 + i)[:60]} for i in range(50)]
    for name, rows in (("texts", [{"text": text} for text in texts]), ("chats", chats)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def mixture(files, *, chat=True, weights=None, learn_from="assistant", **more):
    sources = {"books": {"kind": "jsonl", "path": str(files / "texts.jsonl")}}
    kind = "chat" if chat else "jsonl"
    sources["chats"] = {"kind": kind, "path": str(files / "chats.jsonl")} | ({} if chat else {"text": "prompt"})
    train = {"kind": "mixture", "sources": sources, "weights": weights or {"books": 0.3, "chats": 0.7}}
    plain = {
        "train": train,
        "sequence_length": 128,
        "held_out": 0.2,
        "chat": {"template": TEMPLATE, "learn_from": learn_from} if chat else None,
    }
    return DataSpec.model_validate(plain | more)


def opened(data, files, tokenizer, seed=3):
    return Corpus.open(data, tokenizer, files / "data", seed=seed, vocabulary_size=400)


PACKINGS = {"wrapped": False, "documents": False, "best_fit": True, "padded": True}


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_order_is_the_same_for_every_split_into_ranks_micro_batches_and_workers(packing, files, tokenizer):
    corpus = opened(mixture(files, chat=PACKINGS[packing], packing=packing), files, tokenizer)
    total = 24 * (len(corpus.train) // 24 + 2)

    def rows(loader, count):
        found = []
        for batch in itertools.islice(loader, count):
            found += [row[: int(mask.nonzero().max()) + 2] for row, mask in zip(*_told(batch), strict=True)]
        return found

    straight = rows(corpus.train_loader(MicroBatches(1)), total)
    for micro, world, workers in ((4, 1, 0), (2, 2, 0), (3, 2, 0), (2, 3, 2)):
        loaders = [
            iter(corpus.train_loader(MicroBatches(micro, 0, rank, world), workers if rank == 0 else 0))
            for rank in range(world)
        ]
        pieces = [row for _ in range(total // (micro * world)) for loader in loaders for row in rows(loader, 1)]
        assert all(torch.equal(a, b) for a, b in zip(pieces, straight, strict=True)), (micro, world, workers)
    for position in (1, len(corpus.train) - 1, len(corpus.train) + 3):
        rest = rows(corpus.train_loader(MicroBatches(1, position)), 10)
        assert all(torch.equal(a, b) for a, b in zip(rest, straight[position:], strict=False)), position


def _told(batch):
    return batch["input_ids"], batch["mask"]


def test_texts_are_learned_from_whole_and_conversations_by_what_the_assistant_writes(files, tokenizer):
    corpus = opened(mixture(files), files, tokenizer)
    assert corpus.train.packing == "best_fit"  # by the conversations in it
    learned, source = corpus.train.learned(), corpus.train.source_of_rows()
    for number in range(len(corpus.train)):
        shares = [learned[start : start + size].mean() for start, size in corpus.train.pieces(number)]
        assert all(share == 1 if source[number] == 0 else 0 < share < 1 for share in shares), number
    assert {0, 1} == {*source.tolist()}


def test_rows_hold_one_source_and_each_source_holds_its_own_part_out(files, tokenizer):
    corpus = opened(mixture(files, validation_tokens=10_000), files, tokenizer)
    by_source = corpus.by_source()
    assert list(by_source) == ["books", "chats"]
    assert sum(len(one.validation) for one in by_source.values()) == len(corpus.validation)
    assert sum(one.validation_bytes for one in by_source.values()) == corpus.validation_bytes
    said = {
        name: [tokenizer.decode(batch["input_ids"][0]) for batch in one.validation_loader(1)]
        for name, one in by_source.items()
    }
    assert all("?" not in text for text in said["books"])
    assert all("?" in text for text in said["chats"])
    trained = "".join(tokenizer.decode(batch["input_ids"][0]) for batch in corpus.calibration_loader(1000, 1))
    parts = corpus.validation.tokens.parts
    assert [part.tokens.num_documents > 0 for part in parts] == [True, True]
    ends = [f"№{n}" for n in range(60)]  # of texts
    held_out = [end for end in ends if any(f"{end}<" in text or f"{end} " in text for text in said["books"])]
    assert held_out
    assert not any(f"{end}<" in trained for end in held_out)


def test_what_one_source_validates_on_no_other_trains_on(files, tokenizer, text_of):
    """A text of both sources, which is held out of the one by its words and of the other by them too, or left out."""
    own = {"books": {"kind": "jsonl", "path": str(files / "own.jsonl")}}
    (files / "own.jsonl").write_text(
        "".join(json.dumps({"text": f"{text_of(100 + i)}? "}) + "\n" for i in range(20)), encoding="utf-8"
    )
    data = mixture(files, chat=False)
    data = data.model_copy(update={"train": data.train.model_copy(update={"validation": _sources(own)})})
    corpus = opened(data, files, tokenizer)
    left_out = {part.name: part.tokens.num_repeated for part in corpus.train.tokens.parts}
    before = opened(mixture(files, chat=False), files, tokenizer)
    assert left_out["chats"] == 20 - sum(
        f"{text_of(100 + i)}?" in _validated(before, tokenizer, "chats") for i in range(20)
    )
    assert "documents left out as validation has them" in corpus.summary()


def _sources(named):
    return DataSpec.model_validate({"train": {"kind": "mixture", "sources": named}, "sequence_length": 8}).train.sources


def _validated(corpus, tokenizer, name):
    tokens = next(part.tokens for part in corpus.validation.tokens.parts if part.name == name)
    return tokenizer.decode(tokens.ids())


def test_weights_change_no_token_file_and_passes_are_counted(files, tokenizer):
    plenty, little = (
        opened(mixture(files, weights={"books": share, "chats": 1 - share}), files, tokenizer) for share in (0.9, 0.1)
    )
    assert plenty.train.tokens.path == little.train.tokens.path
    assert plenty.hash != little.hash
    order = order_of(plenty.train, 3, MicroBatches(1))
    source = plenty.train.source_of_rows()[take(order, 500)]
    lengths = plenty.train.lengths()[take(order, 500)]
    assert lengths[source == 0].sum() / lengths.sum() == pytest.approx(0.9, abs=0.01)
    assert plenty.passes(500)["books"] == pytest.approx(
        lengths[source == 0].sum() / rows_of_sources(plenty.train)[0].num_tokens, rel=0.02
    )
    with pytest.raises(InputError, match=r"would read books .* times, data\.train\.max_repeats is 4; .*_repeats: \d"):
        mixture(files).train.check_repeats(plenty.passes(5000))
    mixture(files).train.check_repeats(plenty.passes(5))


def test_without_weights_each_source_comes_as_it_has_tokens(files, tokenizer):
    data = mixture(files)
    even = opened(data.model_copy(update={"train": data.train.model_copy(update={"weights": None})}), files, tokenizer)
    times = even.passes(100)
    assert times["books"] == pytest.approx(times["chats"], rel=0.05)
    hot = data.train.model_copy(update={"weights": None, "temperature": 2.0})
    assert hot.shares({"books": 400, "chats": 100}) == pytest.approx({"books": 2 / 3, "chats": 1 / 3})
    cold = data.train.model_copy(update={"weights": None, "temperature": 0.01})
    assert cold.shares({"books": 40_000, "chats": 10_000}) == pytest.approx({"books": 1.0, "chats": 0.0})


def test_how_often_a_source_may_be_read_is_no_part_of_what_a_mixture_is(files):
    usual, often, other = (
        mixture(files).train.model_copy(update=change)
        for change in ({}, {"max_repeats": 9.0}, {"weights": {"books": 0.9, "chats": 0.1}})
    )
    assert often.identity() == usual.identity() != other.identity()


def test_calibration_sees_every_source_by_its_weight_and_no_row_twice(files, tokenizer):
    corpus = opened(mixture(files, weights={"books": 1, "chats": 1}), files, tokenizer)
    rows = [tuple(batch["input_ids"][0].tolist()) for batch in corpus.calibration_loader(8, 1)]
    assert len(set(rows)) == len(rows)
    again = [tuple(batch["input_ids"][0].tolist()) for batch in corpus.calibration_loader(8, 1)]
    assert rows == again
    asked = [len(row) for row in rows if "?" in tokenizer.decode(row)]
    assert sum(asked) == pytest.approx(sum(map(len, rows)) / 2, abs=corpus.train.sequence_length)  # weights are equal


@pytest.mark.parametrize("learn_from", ["assistant", "all", "last"])
def test_validation_counts_what_the_assistant_writes_whatever_is_learned(learn_from, files, tokenizer):
    usual = opened(mixture(files), files, tokenizer)
    other = opened(mixture(files, learn_from=learn_from), files, tokenizer)
    assert other.validation_bytes == usual.validation_bytes
    assert (other.train.num_predictions() == usual.train.num_predictions()) == (learn_from != "all")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": {"books": 1}}, "weights: chats needs a share above 0 .got none."),
        ({"weights": {"books": 1, "chats": -1}}, "weights: chats needs a share above 0 .got -1"),
        ({"weights": {"books": 1, "chats": 1, "chat": 1}}, "weights: no source 'chat'; did you mean 'chats'"),
        ({"temperature": 2.0}, "temperature has no effect beside weights"),
        ({"validation": {"x": {"kind": "jsonl", "path": "a"}}}, "validation: no source 'x'"),
        ({"sources": {"a": {"kind": "mixture", "sources": {}}}, "weights": None}, "a is a mixture itself"),
        ({"sources": {"a b": {"kind": "jsonl", "path": "x"}}, "weights": None}, "'a b' cannot be the name"),
        ({"sources": {"a": {"kind": "hub", "path": "x/y", "streaming": True}}, "weights": None}, "a is a stream"),
        (
            {"validation": {"books": {"kind": "tokens", "path": "x.bin", "dtype": "uint16"}}},
            "is token ids and books is",
        ),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(change, said, files):
    train = mixture(files).train.model_dump() | change
    with pytest.raises(ValueError, match=said):
        DataSpec.model_validate({"train": train, "sequence_length": 128})


def test_conversations_in_a_mixture_are_not_cut_and_validation_stands_in_it(files):
    with pytest.raises(ValueError, match="wrapped cuts conversations"):
        mixture(files, packing="wrapped")
    with pytest.raises(ValueError, match="validation has no effect beside a mixture"):
        mixture(files, validation={"kind": "jsonl", "path": "x"}, held_out=0.05)
