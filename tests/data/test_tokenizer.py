"""Tokenizers: trained, loaded, compared."""

import json

import pytest
from transformers import AutoTokenizer, Qwen2Tokenizer

from distill.core.errors import DistillError, InputError
from distill.data.corpus import trained_tokenizer
from distill.data.spec import DataSpec
from distill.data.tokenizer import (
    _without_endless_words,
    check_read_back,
    check_same_vocabulary,
    check_written,
    load_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)


def test_a_trained_tokenizer_loads_as_any_other_and_gives_texts_back(tmp_path, text_of):
    texts = [text_of(i) for i in range(100)]
    trained = train_tokenizer(texts, 350, tmp_path / "t")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert len(loaded) == 350
    assert loaded.eos_token == loaded.bos_token == "<|endoftext|>"
    assert loaded.pad_token_id not in (None, loaded.eos_token_id)
    assert max(loaded.get_vocab().values()) == 349
    for text in [*texts[:5], "  \t\n unseen: ∑ \x00 \u2028 🧀 ' , .", "a  b"]:
        assert loaded.decode(loaded(text)["input_ids"]) == text
        assert loaded(text)["input_ids"] == trained(text)["input_ids"]
    assert len(loaded(texts[0])["input_ids"]) < len(texts[0].encode()) / 1.5  # it has learnt merges


def test_the_same_texts_give_the_same_tokenizer(tmp_path, text_of):
    texts = [text_of(i) for i in range(100)]
    hashes = [tokenizer_hash(train_tokenizer(iter(texts), 350, tmp_path / name)) for name in "ab"]
    assert hashes[0] == hashes[1] == tokenizer_hash(load_tokenizer(tmp_path / "b"))
    assert tokenizer_hash(train_tokenizer(texts, 349, tmp_path / "c")) != hashes[0]


def test_training_stops_at_its_limit_and_refuses_nothing_to_learn_from(tmp_path):
    def texts():
        yield "aa " * 100
        raise AssertionError("read on")

    train_tokenizer(texts(), 300, tmp_path / "t", max_bytes=100)
    with pytest.raises(InputError, match="no text"):
        train_tokenizer([], 300, tmp_path / "t")
    with pytest.raises(InputError, match=r"vocab_size \(257\) must be at least 258"):
        train_tokenizer(["a"], 257, tmp_path / "t")


def test_load_refuses_in_one_line(tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    for place in ("empty", "none"):
        with pytest.raises(InputError, match="cannot load the tokenizer") as error:
            load_tokenizer(tmp_path / place)
        assert "\n" not in str(error.value)
    tokenizer.save_pretrained(tmp_path / "endless")
    endless = AutoTokenizer.from_pretrained(tmp_path / "endless")
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(InputError, match="no end-of-text token"):
        load_tokenizer(tmp_path / "endless")


def test_a_word_without_end_does_not_hold_up_the_training(tmp_path, text_of):
    """Its time would grow with the square of the length: hours for a megabyte."""
    texts = [text_of(i) for i in range(50)]
    plain = train_tokenizer(texts, 300, tmp_path / "plain")
    word = "".join(text_of(i).replace(" ", "") for i in range(20_000))
    assert len(word) > 1_000_000
    given = [*texts, f"before {word} after", " " * 1_000_000]
    tokenizer = train_tokenizer(given, 300, tmp_path / "t")
    assert len(tokenizer) == 300
    assert tokenizer.decode(tokenizer(word[:5000])["input_ids"]) == word[:5000]
    pieces = list(_without_endless_words(given[-2]))
    assert max(map(len, pieces)) <= 1010
    assert sum(map(len, pieces)) < 101_000
    assert pieces[0].startswith("before ")
    assert pieces[-1].endswith(" after")
    assert [list(_without_endless_words(text)) for text in texts] == [[text] for text in texts]
    assert plain.get_vocab() == train_tokenizer(texts, 300, tmp_path / "again").get_vocab()


def test_vocabularies_must_be_the_same(tmp_path, tokenizer, text_of):
    check_same_vocabulary(tokenizer, tokenizer)
    smaller = train_tokenizer((text_of(i) for i in range(200)), 390, tmp_path / "t")
    with pytest.raises(InputError, match="student has 390 tokens, teacher 400; the first that differs is 390: None"):
        check_same_vocabulary(smaller, tokenizer)


def test_equal_tokens_with_other_merges_are_refused(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "t")
    file = tmp_path / "t" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = content["model"]["merges"][:1]
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="cut text differently"):
        check_same_vocabulary(load_tokenizer(tmp_path / "t"), tokenizer)


def test_other_tokens_around_a_text_are_refused_by_name(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "t")
    file = tmp_path / "t" / "tokenizer.json"
    content = json.loads(file.read_text())
    (end,) = [entry["id"] for entry in content["added_tokens"] if entry["content"] == "<|endoftext|>"]
    content["post_processor"] = {
        "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "single": [{"SpecialToken": {"id": "E", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"E": {"id": "E", "ids": [end], "tokens": ["<|endoftext|>"]}},
    }  # fmt: skip
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"tokenizer puts '<\|endoftext\|>' and the teacher's nothing; use"):
        check_same_vocabulary(load_tokenizer(tmp_path / "t"), tokenizer)


def test_a_tokenizer_that_would_be_read_as_another_one_is_refused(tokenizer):
    """Qwen2's own rules cut digits one by one; the run's do not, so the text that is read back would be another one."""
    for model_type in ("llama", "qwen3", "gpt2", "mistral", "gemma2", "phi3"):
        check_read_back(tokenizer, model_type)
    with pytest.raises(InputError, match="of any qwen2 model as a Qwen2Tokenizer, which cuts text otherwise") as error:
        check_read_back(tokenizer, "qwen2")
    assert "\n" not in str(error.value)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    check_read_back(Qwen2Tokenizer(vocab=model["vocab"], merges=merges), "qwen2")


def test_a_trained_tokenizer_that_has_changed_is_trained_anew(tmp_path, text_of):
    """Without a merge every text is cut otherwise, and the vocabulary is the same."""
    rows = "".join(json.dumps({"text": text_of(i)}) + "\n" for i in range(40))
    (tmp_path / "text.jsonl").write_text(rows)
    train = {"kind": "jsonl", "path": str(tmp_path / "text.jsonl")}
    data = DataSpec.model_validate({"train": train, "sequence_length": 8, "tokenizer": {"vocab_size": 300}})
    trained_tokenizer(data, data.tokenizer, tmp_path / "data")
    (file,) = (tmp_path / "data").glob("tokenizer-*/tokenizer.json")
    whole = file.read_text()
    content = json.loads(whole)
    content["model"]["merges"].pop()
    file.write_text(json.dumps(content))
    trained_tokenizer(data, data.tokenizer, tmp_path / "data")
    assert file.read_text() == whole


def test_a_tokenizer_is_compared_with_what_it_is_read_back_as(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    check_written(tmp_path, tokenizer)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(DistillError, match=r"read back with another way to cut text; set data.tokenizer to one"):
        check_written(tmp_path, tokenizer)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DistillError, match=r"cannot load the tokenizer .*, right after it was written"):
        check_written(tmp_path, tokenizer)
