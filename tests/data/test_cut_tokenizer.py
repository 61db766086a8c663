"""Tokenizers with fewer tokens: the text that was counted is cut as before, and any other can still be written."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from distill.core.errors import InputError
from distill.data.cut_tokenizer import cut_tokenizer, rows_of, tokens_to_keep
from distill.data.tokenizer import train_tokenizer

STRANGE = "Naïve café, 12 345.67 €\n\tdef f(x):  return x**2  # 東京 🧀"


def byte_level(texts, folder):
    return train_tokenizer(texts, 400, folder)


def plain(model, trainer, texts, *, decoder):
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.decoder = decoder
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_fallback(texts, folder):
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    made = plain(models.BPE(), trainer, texts, decoder=decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]))
    data = json.loads(made.backend_tokenizer.to_str())
    data["model"] |= {"byte_fallback": True, "unk_token": "<unk>"}
    data["added_tokens"] = [entry for entry in data["added_tokens"] if entry["content"] in SPECIAL]
    backend = Tokenizer.from_str(json.dumps(data))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram(texts, folder):
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return plain(models.Unigram(), trainer, texts, decoder=decoders.Fuse())


def word_piece(texts, folder):
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    return plain(models.WordPiece(unk_token="<unk>"), trainer, texts, decoder=decoders.WordPiece())


@pytest.fixture(params=[byte_level, byte_fallback, unigram, word_piece], ids=lambda make: make.__name__)
def whole(request, tmp_path, text_of):
    return request.param([text_of(i) for i in range(60)], tmp_path / "whole")


def counted(tokenizer, texts):
    ids = [id_ for text in texts for id_ in tokenizer(text)["input_ids"]]
    return np.bincount(ids, minlength=len(tokenizer))


def test_the_text_that_was_counted_is_cut_into_the_same_pieces(whole, text_of, tmp_path):
    texts = [text_of(i) for i in range(60, 64)]
    counts = counted(whole, texts)
    kept = tokens_to_keep(whole, counts)
    part = cut_tokenizer(whole, kept, tmp_path / "part")
    assert len(part) == len(kept) < len(whole)
    assert rows_of(part, whole) == kept
    assert {token for token in range(len(whole)) if counts[token]} <= {*kept}
    for text in texts:
        ids = part(text)["input_ids"]
        assert [kept[id_] for id_ in ids] == whole(text)["input_ids"]
        assert part.decode(ids) == whole.decode(whole(text)["input_ids"])
    assert part.eos_token == whole.eos_token
    assert [kept[token] for token in part.all_special_ids] == whole.all_special_ids


def test_every_text_can_still_be_written_with_the_fewest_tokens(whole, text_of, tmp_path):
    counts = np.zeros(len(whole), np.int64)
    with pytest.raises(InputError, match=r"keep\.vocabulary \(2\) must be from \d+ .* to the tokenizer's \d+"):
        tokens_to_keep(whole, counts, 2)
    least = len(tokens_to_keep(whole, counts))
    kept = tokens_to_keep(whole, counts, least)
    part = cut_tokenizer(whole, kept, tmp_path / "part")
    assert len(part) == least < len(whole)
    for text in (text_of(70), STRANGE):
        was, now = whole(text)["input_ids"], part(text)["input_ids"]
        assert part.decode(now) == whole.decode(was)
        assert now.count(part.unk_token_id) == was.count(whole.unk_token_id)
        assert len(now) >= len(was)


def test_a_number_keeps_the_most_frequent(whole, text_of, tmp_path):
    texts = [text_of(i) for i in range(60, 64)]
    counts = counted(whole, texts)
    least = {*tokens_to_keep(whole, np.zeros(len(whole), np.int64))}
    for num_tokens in (len(least) + 5, len(whole)):
        kept = tokens_to_keep(whole, counts, num_tokens)
        assert kept == sorted({*kept})
        assert len(kept) == num_tokens
        assert least <= {*kept}
    more = {*range(len(whole))} - least
    assert max(more, key=lambda token: counts[token]) in tokens_to_keep(whole, counts, len(least) + 5)
    assert max(more) in tokens_to_keep(whole, counts, named=[max(more)])


def test_what_one_merge_gives_in_two_ways_is_reached_as_before(tmp_path):
    backend = Tokenizer(
        models.BPE(
            vocab={"<s>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5, "abc": 6, "cc": 7},
            merges=[("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc"), ("c", "c")],
        )
    )
    whole = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>", bos_token="<s>")
    counts = counted(whole, ["abc"])
    kept = tokens_to_keep(whole, counts)
    assert kept == [0, 1, 2, 3, 5, 6]  # "ab" is a way to "abc" that is never taken
    part = cut_tokenizer(whole, kept, tmp_path / "part")
    assert part.convert_ids_to_tokens(part("abc")["input_ids"]) == ["abc"]


def test_only_what_is_a_part_has_rows(whole, tmp_path, text_of):
    other = train_tokenizer(["zigzag quiz"] * 3, 270, tmp_path / "other")
    assert rows_of(whole, whole) == list(range(len(whole)))
    assert rows_of(other, whole) is None


def test_what_cannot_be_cut_is_refused(tmp_path):
    backend = Tokenizer(models.BPE(vocab={"a</w>": 0, "</s>": 1}, merges=[], end_of_word_suffix="</w>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(InputError, match="a BPE with end_of_word_suffix tokenizer cannot be cut"):
        tokens_to_keep(tokenizer, np.zeros(2, np.int64))
