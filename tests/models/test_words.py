"""Words in place of others: neighbours by embeddings, and what an encoder predicts under a mask."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from distill.core.errors import InputError
from distill.models.masked_words import SHARE, WINDOW, MaskedWords
from distill.models.whole_words import whole_words
from distill.models.word_neighbours import WordNeighbours

WORDS = ["cat", "Cat", "dog", "house", "tree", "run"]


def byte_level():
    """Bytes, each word with a space before it, and "cat" and "og" without one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces, vocab, merges = [f"Ġ{word}" for word in WORDS] + ["cat", "og"], {c: i for i, c in enumerate(alphabet)}, []
    for piece in pieces:
        for size in range(2, len(piece) + 1):
            if piece[:size] not in vocab:
                vocab[piece[:size]] = len(vocab)
                merges.append((piece[: size - 1], piece[size - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer


def word_pieces():
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5, ".": 6, "##s": 7}
    vocab |= {word.lower(): 8 + number for number, word in enumerate(["cat", "dog", "house", "tree", "run"])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def places_of(text):
    import re

    return [match.span() for match in re.finditer(r"\w+", text)]


def test_whole_words_of_both_kinds_of_tokenizers():
    backend = byte_level()
    ids, words = whole_words(backend, "m")
    assert set(WORDS) <= set(words)
    assert "og" not in words  # no word between two spaces
    assert [backend.id_to_token(id) for id in ids] == [f"Ġ{word}" for word in words]
    assert whole_words(word_pieces(), "m")[1] == ["cat", "dog", "house", "tree", "run"]


def test_a_tokenizer_without_words_is_refused():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    with pytest.raises(InputError, match="the tokenizer of m has no token that is a whole word"):
        whole_words(backend, "m")


def test_neighbours_are_the_nearest_words_by_cosine_without_the_mean():
    backend = byte_level()
    ids, words = whole_words(backend, "m")
    embeddings = torch.randn(backend.get_vocab_size(), 16, generator=torch.Generator().manual_seed(0))
    neighbours = WordNeighbours(embeddings, backend, "m")
    text = "cat DOG unknownword House"
    found = neighbours.find([text, "dog"], [places_of(text), [(0, 3)]], 3)
    vectors = embeddings[torch.from_numpy(ids)]
    vectors = nn.functional.normalize(vectors - vectors.mean(0), dim=-1)
    for word, some in zip(("cat", "dog", "", "house"), found[0], strict=True):
        order = (vectors @ vectors[words.index(word)]).argsort(descending=True).tolist() if word else []
        expected = list(dict.fromkeys(words[n].casefold() for n in order if words[n].casefold() != word))[:3]
        assert [one.casefold() for one in some] == expected
    assert found[1][0] == found[0][1]
    assert neighbours.find(["cat"], [[(0, 3)]], 1) == [[found[0][0][:1]]]


class Sees(nn.Module):
    """Predicts the words in the order of their ids, and remembers what it was given."""

    def __init__(self, size):
        super().__init__()
        self.size, self.read = nn.Parameter(torch.zeros(size)), []

    def forward(self, input_ids, attention_mask):
        self.read += [row[: int(some.sum())].tolist() for row, some in zip(input_ids, attention_mask, strict=True)]
        logits = -torch.arange(len(self.size), dtype=torch.float32).expand(*input_ids.shape, -1)
        return type("Output", (), {"logits": logits})


def test_each_word_is_masked_once_and_few_at_a_time():
    backend, text = word_pieces(), "cat dogs house . " * 200 + "Tree"
    model = Sees(backend.get_vocab_size())
    masked = MaskedWords(model, backend, ([2], [3]), 4, "m")
    places = places_of(text)
    (found,) = masked.find([text], [places], 2)
    words = [text[start:stop] for start, stop in places]
    expected = {"cat": ["dog", "house"], "dogs": [], "house": ["cat", "dog"], "Tree": ["cat", "dog"]}
    assert [expected[word] for word in words] == found
    assert sum(row.count(4) for row in model.read) == 401  # dogs is no token
    assert max(map(len, model.read)) == WINDOW
    assert all(row[0] == 2 and row[-1] == 3 for row in model.read)
    assert max(row.count(4) / len(row) for row in model.read if len(row) > 20) <= SHARE


def test_what_a_real_encoder_predicts_does_not_depend_on_the_texts_around():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=13, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        initializer_range=0.5,
    )  # fmt: skip
    masked = MaskedWords(BertForMaskedLM(config).eval(), word_pieces(), ([2], [3]), 4, "m")
    texts = ["a cat . house", "tree run dog dog dog dog dog dog cat house tree", "run"]
    together = masked.find(texts, [places_of(text) for text in texts], 3)
    alone = [masked.find([text], [places_of(text)], 3)[0] for text in texts]
    assert together == alone
    assert len({tuple(some) for found in together for some in found}) > 3
