"""Tokenizers: trained, loaded, compared."""

import json

import pytest
from transformers import AutoTokenizer, Qwen2Tokenizer

from distill.core.errors import InputError
from distill.data.tokenizer import (
    check_read_back,
    check_same_vocabulary,
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
        with pytest.raises(InputError, match="cannot be loaded") as error:
            load_tokenizer(tmp_path / place)
        assert "\n" not in str(error.value)
    tokenizer.save_pretrained(tmp_path / "endless")
    endless = AutoTokenizer.from_pretrained(tmp_path / "endless")
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(InputError, match="no end-of-text token"):
        load_tokenizer(tmp_path / "endless")


def test_vocabularies_must_be_the_same_but_heads_may_be_padded(tmp_path, tokenizer, text_of):
    check_same_vocabulary(tokenizer, tokenizer, 400, 512)
    with pytest.raises(InputError, match="the teacher's head has 399 rows, its tokenizer needs 400"):
        check_same_vocabulary(tokenizer, tokenizer, 400, 399)
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
