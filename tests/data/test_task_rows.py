"""Rows of tasks: what is read from which column, what is hidden from a masked model, padding, pairs and classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from distill.core.errors import InputError
from distill.core.tasks import MODEL_TASKS, MaskSpec
from distill.data.masking import Masking
from distill.data.micro_batches import MicroBatches
from distill.data.spec import DataSpec
from distill.data.task_corpus import TaskCorpus, open_rows

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{i}" for i in range(50)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    words.enable_padding(length=20)  # settings of another program
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", eos_token="[SEP]",
    )  # fmt: skip


def opened(
    folder: Path, tokenizer: PreTrainedTokenizerFast, task: dict[str, Any], rows: list[dict[str, Any]], **more: Any
) -> TaskCorpus:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {"train": {"kind": "jsonl", "path": str(file)}, "sequence_length": 8, "packing": "padded", **more}
    data = DataSpec.model_validate(section).for_task(MODEL_TASKS[task["kind"]](**task))
    return open_rows(data, tokenizer, folder / "data", 0, len(tokenizer))


def all_rows(corpus: TaskCorpus) -> dict[str, torch.Tensor]:
    return corpus.train[list(range(len(corpus.train)))]


def test_pairs_have_token_types_and_padding_an_attention_mask(tmp_path, tokenizer) -> None:
    rows = [
        {"text": f"w{i} w2" if i % 2 else f"w{i}", "other": "w4 w5", "label": "yes" if i % 3 else "no"}
        for i in range(20)
    ]
    corpus = opened(tmp_path, tokenizer, {"kind": "classification", "text_pair": "other"}, rows, held_out=0.2)
    batch = all_rows(corpus)
    assert corpus.classes == ("no", "yes")
    assert batch["mask"].shape == batch["targets"].shape == (len(corpus.train), 1)
    assert batch["mask"].all()
    for ids, attended, kinds in zip(
        batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["token_type_ids"].tolist(), strict=True
    ):
        size = sum(attended)
        assert attended == [1] * size + [0] * (len(ids) - size)
        assert ids[size:] == [0] * (len(ids) - size)
        assert ids[0] == 2
        first = ids.index(3) + 1  # after the first [SEP]
        assert kinds == [0] * first + [1] * (size - first) + [0] * (len(ids) - size)


def test_texts_that_are_too_long_are_cut_and_told(tmp_path, tokenizer) -> None:
    rows = [{"text": " ".join(WORDS[i : i + 10]), "label": i % 2} for i in range(20)]
    corpus = opened(tmp_path, tokenizer, {"kind": "classification"}, rows, held_out=0.2)
    batch = all_rows(corpus)
    assert batch["input_ids"].shape[1] == 8
    assert (batch["input_ids"][:, -1] == 3).all()  # still ends as a text does
    assert any("texts are longer than data.sequence_length" in line for line in corpus.notes())
    assert corpus.classes == ("0", "1")


def test_words_are_labelled_at_their_first_token(tmp_path, tokenizer) -> None:
    rows = [{"words": ["w1", f"w{i}", "w3"], "labels": ["O", "B-X", "I-X"]} for i in range(20)]
    corpus = opened(tmp_path, tokenizer, {"kind": "token_classification"}, rows, held_out=0.2)
    batch = all_rows(corpus)
    assert corpus.classes == ("B-X", "I-X", "O")
    assert batch["mask"][0].tolist() == [False, True, True, True, False]
    assert batch["targets"][0][batch["mask"][0]].tolist() == [2, 0, 1]
    assert corpus.train.num_predictions() == int(batch["mask"].sum())


@pytest.mark.parametrize(
    ("task", "row", "says"),
    [
        ({"kind": "classification"}, {"text": "w1"}, "no column 'label'"),
        ({"kind": "classification"}, {"text": "w1", "label": 0.5}, "must hold a name or a whole number"),
        ({"kind": "regression"}, {"text": "w1", "label": "a lot"}, "must hold a finite number"),
        ({"kind": "token_classification"}, {"words": ["w1"], "labels": []}, "1 words and 'labels' 0 classes"),
        (
            {"kind": "classification", "text_pair": "other"},
            {"text": "w1", "other": 3, "label": "a"},
            "must hold a string",
        ),
    ],
)
def test_rows_that_cannot_be_used_end_a_run_in_one_line(task, row, says, tmp_path, tokenizer) -> None:
    with pytest.raises(InputError) as raised:
        opened(tmp_path, tokenizer, task, [row] * 8)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_class_that_no_training_row_has_is_named(tmp_path, tokenizer) -> None:
    (tmp_path / "valid.jsonl").write_text('{"text": "w9", "label": "new"}\n')
    rows = [{"text": f"w{i}", "label": "ab"[i % 2]} for i in range(8)]
    validation = {"kind": "jsonl", "path": str(tmp_path / "valid.jsonl")}
    with pytest.raises(InputError, match="class 'new' is not among the 2 classes"):
        opened(tmp_path, tokenizer, {"kind": "classification"}, rows, validation=validation)


def _masked(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, **task: Any) -> TaskCorpus:
    rows = [{"text": " ".join(WORDS[(i * 7 + j) % 50] for j in range(5 + i % 9))} for i in range(40)]
    return opened(tmp_path, tokenizer, {"kind": "masked_lm", **task}, rows, held_out=0.2)


def test_hidden_tokens_follow_from_seed_and_position_alone(tmp_path, tokenizer) -> None:
    corpus = _masked(tmp_path, tokenizer)

    def first(taken: MicroBatches, count: int) -> list[dict[str, torch.Tensor]]:
        batches = iter(corpus.train_loader(taken))
        return [next(batches) for _ in range(count)]

    whole = first(MicroBatches(4), 30)
    later = first(MicroBatches(4, consumed_sequences=80), 10)
    for one, other in zip(whole[20:], later, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    # of two processes each takes its half, with the same tokens hidden
    halves = [first(MicroBatches(2, rank=rank, world_size=2), 1)[0] for rank in (0, 1)]
    for name in ("input_ids", "targets", "mask"):
        width = whole[0][name].shape[1]
        parts = [torch.nn.functional.pad(half[name], (0, width - half[name].shape[1])) for half in halves]
        assert torch.equal(torch.cat(parts), whole[0][name])
    # a row hides other tokens in every pass; in validation always the same
    count = len(corpus.train)
    passes = [corpus.train[[(position, row) for row in range(count)]] for position in (0, count, count)]
    changed = (passes[0]["mask"] != passes[1]["mask"]).any(1)
    assert changed.float().mean() > 0.5
    assert torch.equal(passes[1]["input_ids"], passes[2]["input_ids"])
    for one, other in zip(corpus.validation_loader(4), corpus.validation_loader(4), strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_special_tokens_and_padding_are_never_hidden(tmp_path, tokenizer) -> None:
    corpus = _masked(tmp_path, tokenizer, mask={"share": 0.9, "replace": 1, "random": 0})
    for batch in corpus.calibration_loader(batch_size=8):
        targets, mask = batch["targets"], batch["mask"]
        assert (targets[mask] >= len(SPECIAL)).all()
        assert (batch["input_ids"][mask] == 4).all()
        assert torch.equal(batch["input_ids"][~mask], targets[~mask])
        sizes = batch["attention_mask"].sum(1) - 2
        assert mask.sum(1).tolist() == [max(1, round(0.9 * int(size))) for size in sizes]


def _hidden_in(corpus: TaskCorpus) -> dict[str, int]:
    """Tokens, and hidden tokens, of one pass over the training rows."""
    batches = iter(corpus.train_loader(MicroBatches(1)))
    rows = [next(batches) for _ in range(len(corpus.train))]
    hidden = sum(int(row.get("text_mask", row["mask"]).sum()) for row in rows)
    return {"tokens": sum(int(row["attention_mask"].sum()) for row in rows), "hidden": hidden}


def test_all_positions_are_learned_from_and_hidden_ones_weigh_as_a_mean(tmp_path, tokenizer) -> None:
    corpus = _masked(tmp_path, tokenizer, positions="all")
    batch = next(iter(corpus.train_loader(MicroBatches(4))))
    assert torch.equal(batch["mask"], batch["attention_mask"].bool())
    whole = _hidden_in(corpus)
    assert float(batch["text_weight"]) == pytest.approx(whole["tokens"] / whole["hidden"])
    assert 0 < int(batch["text_mask"].sum()) < int(batch["mask"].sum())
    measured = next(iter(corpus.validation_loader(4)))
    assert "text_mask" not in measured  # models are compared at the hidden tokens
    assert corpus.validation.num_predictions() == sum(int(b["mask"].sum()) for b in corpus.validation_loader(3))


def test_shares_and_rare_words() -> None:
    counts = np.array([0, 0, 0, 0, 0] + [1] * 25 + [10_000] * 25)
    ids = np.concatenate([np.full(40, 10), np.full(40, 40)])
    can = np.ones(80, bool)
    kinds = np.zeros(3)
    chosen = {0.0: np.zeros(2), 0.7: np.zeros(2)}
    for exponent, found in chosen.items():
        masking = Masking.of(MaskSpec(rare_words=exponent), 0, 4, [0, 1, 2, 3, 4], counts)
        for position in range(200):
            seen, hidden = masking.hide(ids, can, position, 3)
            assert hidden.sum() == 12
            found += [hidden[:40].sum(), hidden[40:].sum()]
            if not exponent:
                kinds += [(seen[hidden] == 4).sum(), (seen[hidden] == ids[hidden]).sum(), 12]
    shares = kinds / kinds[2]
    assert shares[0] == pytest.approx(0.8, abs=0.03)
    assert shares[1] == pytest.approx(0.1, abs=0.03)
    assert chosen[0.0][0] / chosen[0.0].sum() == pytest.approx(0.5, abs=0.03)
    assert chosen[0.7][0] > 50 * chosen[0.7][1]  # (10,000 / 1)**0.7 = 631 times as likely, until rare ones run out


def test_a_tokenizer_without_a_mask_token_is_refused(tmp_path, tokenizer) -> None:
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="[SEP]", pad_token="[PAD]")
    with pytest.raises(InputError, match="masked_lm needs a tokenizer with a mask token"):
        opened(tmp_path, other, {"kind": "masked_lm"}, [{"text": "w1 w2"}] * 4)


@pytest.mark.parametrize("prefix", [False, True])
def test_words_are_read_as_in_their_text_by_byte_level_tokenizers(prefix: bool, tmp_path: Path) -> None:
    """A token of theirs includes the space before its word; a word without a space would be glued to the last one."""
    words = [["one", "day", "in", "winter"], ["winter", "in", "one", "day"]] * 10
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<e>"], initial_alphabet=alphabet)
    backend.train_from_iterator([" ".join(row) for row in words], trainer)
    byte_level = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", pad_token="<e>")
    rows = [{"words": row, "labels": ["A", "B", "A", "B"], "id": i} for i, row in enumerate(words)]
    corpus = opened(tmp_path, byte_level, {"kind": "token_classification"}, rows, sequence_length=16, held_out=0.5)
    batch = all_rows(corpus)
    expected = [byte_level(" ".join(row), add_special_tokens=False)["input_ids"] for row in words[:2]]
    for ids, mask, attended in zip(batch["input_ids"], batch["mask"], batch["attention_mask"], strict=True):
        assert ids[attended.bool()].tolist() in expected
        assert mask.sum() == 4


def test_classes_that_are_stored_as_numbers_have_their_names(tmp_path, tokenizer) -> None:
    """Data sets of the Hub store the number of a ClassLabel."""
    names = ["O", "B-X", "I-X"]
    rows = [{"words": ["w1", f"w{i}"], "labels": [i % 3, 0]} for i in range(20)]
    features = Features({"words": List(Value("string")), "labels": List(ClassLabel(names=names))})
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "hub" / "train.parquet")
    for source, task in (
        ({"kind": "saved", "path": str(tmp_path / "saved")}, {}),
        ({"kind": "hub", "path": str(tmp_path / "hub")}, {}),
        ({"kind": "parquet", "path": str(tmp_path / "hub" / "train.parquet")}, {"classes": names}),
    ):
        more = {"train": source, "held_out": 0.2}
        corpus = opened(tmp_path, tokenizer, {"kind": "token_classification", **task}, rows, **more)
        assert corpus.classes == (tuple(names) if task else ("B-X", "I-X", "O"))
        batch, found = all_rows(corpus), set()
        for ids, targets in zip(batch["input_ids"].tolist(), batch["targets"].tolist(), strict=True):
            number = ids[2] - len(SPECIAL)
            assert corpus.classes[targets[1]] == names[number % 3]
            found.add(number % 3)
        assert found == {0, 1, 2}
    with pytest.raises(InputError, match="'labels' has 2, and its classes are numbered 0 to 1"):
        opened(tmp_path, tokenizer, {"kind": "token_classification", "classes": ["O", "B-X"]}, rows, **more)
