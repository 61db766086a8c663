"""Tokens on disk: nothing lost, bytes exact, whole or not at all."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distill.core.errors import InputError, MachineError
from distill.data import encoder as encoder_of
from distill.data import packing
from distill.data.base import Document
from distill.data.encoder import TextEncoder
from distill.data.packed_rows import PackedRows
from distill.data.packing import read_tokens, write_tokens


def documents(texts):
    return [Document(f"d{i}", text) for i, text in enumerate(texts)]


@pytest.fixture
def texts(text_of):
    return [text_of(i) + chr(0x4E00 + i) + chr(0x1F600 + i) for i in range(30)]  # no token for the last characters


@pytest.fixture
def written(tmp_path, tokenizer, texts, monkeypatch):
    monkeypatch.setattr(packing, "_BATCH_DOCUMENTS", 7)  # more than one batch
    return write_tokens(tmp_path / "t-0.bin", documents(texts), TextEncoder(tokenizer), 400, with_bytes=True)


def test_the_file_decodes_to_the_documents_in_their_order(written, tokenizer, texts):
    assert tokenizer.decode(written.ids()) == "".join(text + "<|endoftext|>" for text in texts)
    assert written.num_documents == len(texts)
    assert written.num_bytes == sum(len(text.encode()) for text in texts)
    assert written.largest == written.ids().max()
    assert read_tokens(Path(written.path)) == written


@pytest.mark.parametrize("sequence_length", [2, 7, 16, 100_000])
def test_blocks_lose_no_token_and_count_each_prediction_once(written, sequence_length):
    blocks = PackedRows(written, sequence_length)
    batch = blocks[list(range(len(blocks)))]
    ids, mask = batch["input_ids"], batch["mask"]
    assert ids.dtype == torch.int64
    assert mask.dtype == torch.bool
    assert ids.shape == mask.shape == (len(blocks), sequence_length)
    flat = written.ids().astype(np.int64)
    lone = (written.num_tokens - 1) % sequence_length == 0  # a last token with nothing before it in its block
    kept = written.num_tokens - lone
    assert ids.flatten()[:kept].tolist() == flat[:kept].tolist()
    assert ids.flatten()[kept:].unique().tolist() in ([], [written.filling])
    expected = [t + 1 < kept and (t + 1) % sequence_length != 0 for t in range(ids.numel())]
    assert mask.flatten().tolist() == expected
    assert not mask[:, -1].any()
    assert blocks.num_predictions() == mask.sum()


def test_a_lone_last_token_makes_no_block(written):
    length = written.num_tokens - 1
    assert len(PackedRows(written, length)) == 1
    assert len(PackedRows(written, length - 1)) == 2


def test_bytes_of_tokens_are_those_of_the_byte_level_vocabulary(written, tokenizer):
    """Byte-level tokens have one letter a byte; where a character is cut its bytes fall to the token that ends it."""
    ids, counts = written.ids(), written.bytes_of_tokens().astype(int)
    assert counts.sum() == written.num_bytes
    done, raw = 0, b""
    letters = {letter: byte for byte, letter in byte_letters().items()}
    for index, count in zip(ids, counts, strict=True):
        done += count
        if index != written.filling:
            raw += bytes(letters[letter] for letter in tokenizer.convert_ids_to_tokens(int(index)))
        assert done == len(raw.decode("utf-8", errors="ignore").encode()), "the whole characters so far"
    assert any(counts[i] == 0 for i, index in enumerate(ids) if index != written.filling), (
        "no character was cut: weak test"
    )


def byte_letters():
    """GPT-2's letters for bytes."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in keep]
    return {byte: chr(byte) for byte in keep} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


@pytest.mark.parametrize("sequence_length", [2, 5, 16, 64])
def test_block_bytes_leave_out_only_the_first_token_of_each_block(written, sequence_length):
    counts = written.bytes_of_tokens().astype(int)
    blocks = PackedRows(written, sequence_length)
    firsts = sum(counts[i * sequence_length] for i in range(len(blocks)))
    lone = counts[-1] if (written.num_tokens - 1) % sequence_length == 0 else 0
    assert blocks.bytes_of_rows().sum() == written.num_bytes - firsts - lone
    batch = blocks[[1]]
    predicted = batch["input_ids"].roll(-1, 1)[batch["mask"]]
    start = sequence_length
    assert predicted.tolist() == written.ids()[start + 1 : start + sequence_length].tolist()
    assert blocks.bytes_of_rows()[1] == counts[start + 1 : start + sequence_length].sum()


def test_bytes_are_exact_for_tokenizers_that_normalise_and_drop_spaces(text_of):
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase(), normalizers.StripAccents()])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    texts = ["  " + text_of(i) + "  \n" for i in range(20)] + ["…", "ﬁ ½", "   "]
    backend.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[END]"]))
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[END]", unk_token="[UNK]"))
    ids, counts = encoder.encode_with_bytes(texts)
    for text, row, sizes in zip(texts, ids, counts, strict=True):
        assert len(row) == len(sizes)
        if len(row) > 1:
            assert sizes.sum() == len(text.encode())
            assert sizes[-1] == 0


def test_both_ways_to_encode_agree_and_special_tokens_in_a_text_are_text(tokenizer):
    encoder = TextEncoder(tokenizer)
    texts = ["a <|endoftext|> b<|pad|>", "", "東京"]
    ids, counts = encoder.encode_with_bytes(texts)
    assert [row.tolist() for row in ids] == [row.tolist() for row in encoder.encode(texts)]
    assert [row.tolist().count(encoder.end) for row in ids] == [1, 1, 1]
    assert ids[1].tolist() == [encoder.end]
    assert tokenizer.decode(ids[0][:-1]) == texts[0]
    assert [int(sizes.sum()) for sizes in counts] == [len(text.encode()) for text in texts]
    assert tokenizer("<|endoftext|>")["input_ids"] == [encoder.end], "the caller's tokenizer was changed"


@pytest.mark.parametrize("piece", [40, 64, 200])
def test_a_long_document_is_cut_where_no_token_is(tokenizer, text_of, monkeypatch, piece):
    """Tokenizers take hundreds of bytes of memory a character, so that one large file would fill it."""
    texts = [" ".join(text_of(i) for i in range(20)), "short", text_of(1) * 3]
    whole, sizes = TextEncoder(tokenizer).encode_with_bytes(texts)
    given = []
    monkeypatch.setattr(encoder_of, "PIECE", piece)
    encoder = TextEncoder(tokenizer)
    backend = encoder._backend

    class Watched:
        def encode_batch(self, some, **more):
            given.extend(some)
            return backend.encode_batch(some, **more)

    encoder._backend = Watched()
    ids, counts = encoder.encode_with_bytes(texts)
    assert max(map(len, given)) <= piece
    assert "".join(sorted(given)) != "".join(sorted(texts)), "nothing was cut"
    assert [row.tolist() for row in ids] == [row.tolist() for row in whole]
    assert [row.tolist() for row in counts] == [row.tolist() for row in sizes]
    encoder._backend = backend
    assert [row.tolist() for row in encoder.encode(texts)] == [row.tolist() for row in whole]


@pytest.mark.parametrize("text", ["a" * 1000, "\u6771\u4eac" * 200, " " * 500, "\n" * 500, "x " + " " * 300 + "y"])
def test_a_word_without_end_is_cut_and_nothing_of_it_is_lost(tokenizer, monkeypatch, text):
    monkeypatch.setattr(encoder_of, "PIECE", 64)
    encoder = TextEncoder(tokenizer)
    (ids,), (sizes,) = encoder.encode_with_bytes([text])
    assert tokenizer.decode(ids[:-1]) == text
    assert int(sizes.sum()) == len(text.encode())
    assert ids.tolist() == encoder.encode([text])[0].tolist()


def test_bytes_of_a_piece_without_tokens_are_counted(text_of, monkeypatch):
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(
        [text_of(1)], trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]", "[END]"])
    )
    monkeypatch.setattr(encoder_of, "PIECE", 16)
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[END]", unk_token="[UNK]"))
    _, (sizes,) = encoder.encode_with_bytes([" " * 40 + "fox"])
    assert int(sizes.sum()) == 43


def test_a_tokenizer_that_begins_texts_begins_documents(tokenizer):
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 1)])
    starting = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|pad|>", eos_token="<|endoftext|>")
    ids, counts = TextEncoder(starting).encode_with_bytes(["fox"])
    assert ids[0].tolist() == [1, *TextEncoder(tokenizer).encode(["fox"])[0]]
    assert counts[0][0] == 0
    assert counts[0].sum() == 3


def test_ids_beyond_the_model_are_refused_and_nothing_stays(tmp_path, tokenizer, texts):
    with pytest.raises(InputError, match=r"d0: token id \d+, but the model's vocabulary has 100 rows"):
        write_tokens(tmp_path / "t-0.bin", documents(texts), TextEncoder(tokenizer), 100)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_writing_leaves_nothing(tmp_path, tokenizer, texts, monkeypatch):
    monkeypatch.setattr(packing, "_BATCH_DOCUMENTS", 4)

    def interrupted():
        yield from documents(texts)[:10]
        assert len(list(tmp_path.iterdir())) == 3  # it is half-way through
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(tmp_path / "t-0.bin", interrupted(), TextEncoder(tokenizer), 400, with_bytes=True)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_between_the_files_and_the_header_is_not_taken_for_done(written, tmp_path):
    (tmp_path / ".tokenizer.writing").mkdir()
    (tmp_path / ".t-1.bin.writing").write_bytes(b"of a process that was killed")
    with packing.file_lock(tmp_path):
        assert not (tmp_path / ".t-1.bin.writing").exists()
    path = tmp_path / "t-0.bin"
    assert read_tokens(path) == written
    path.write_bytes(path.read_bytes()[:-2])
    assert read_tokens(path) is None
    path.with_suffix(".json").unlink()
    assert read_tokens(path) is None


def test_a_file_of_an_earlier_version_is_written_anew_and_said(written, capsys):
    path = Path(written.path)
    header = json.loads(path.with_suffix(".json").read_text())
    del header["version"]
    path.with_suffix(".json").write_text(json.dumps(header))
    assert read_tokens(path) is None
    assert capsys.readouterr().err == "t-0.bin: of an earlier version of distill; the text is tokenized again\n"


@pytest.mark.parametrize("suffix", [".bin", ".bounds", ".bytes", ".json"])
def test_tokens_that_have_changed_are_written_anew(written, suffix):
    """A changed token, and an edited count of bytes, would be another text, and other bits per byte."""
    path = Path(written.path)
    file = path.with_suffix(suffix)
    content = file.read_bytes()
    file.write_bytes(content[:-7] + bytes([content[-7] ^ 1]) + content[-6:])
    assert read_tokens(path) is None
    file.write_bytes(content)
    assert read_tokens(path) == written  # written later, and the same


def test_an_edited_header_is_not_believed(written):
    path = Path(written.path)
    header = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(header | {"num_bytes": 10 * written.num_bytes}))
    assert read_tokens(path) is None


def test_bounds_are_those_of_the_documents(written, tokenizer, texts):
    ids, bounds = written.ids(), written.bounds()
    assert [tokenizer.decode(ids[a : b - 1]) for a, b in itertools.pairwise(bounds)] == texts
    Path(written.path).with_suffix(".bounds").unlink()
    assert read_tokens(Path(written.path)) is None


def test_a_full_disk_is_one_line(tmp_path, tokenizer, texts, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing.TokenWriter, "add", full)
    with pytest.raises(MachineError, match="No space left"):
        write_tokens(tmp_path / "t-0.bin", documents(texts), TextEncoder(tokenizer), 400)
    assert list(tmp_path.iterdir()) == []


def test_large_vocabularies_need_four_bytes(tmp_path, tokenizer, texts):
    small = write_tokens(tmp_path / "s-0.bin", documents(texts), TextEncoder(tokenizer), 1 << 16)
    large = write_tokens(tmp_path / "l-0.bin", documents(texts), TextEncoder(tokenizer), (1 << 16) + 1)
    assert (small.dtype, large.dtype) == ("uint16", "uint32")
    assert np.array_equal(small.ids(), large.ids())


def test_bits_per_byte_of_a_uniform_model_over_bytes(tmp_path):
    """With one token a byte, a model that knows nothing needs log2(257) bits for each byte and for each end."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        ["x"], trainers.BpeTrainer(vocab_size=257, special_tokens=["<e>"], initial_alphabet=alphabet)
    )
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    file = write_tokens(tmp_path / "t-0.bin", documents(["é" * 50, "abc"]), TextEncoder(plain), 257, with_bytes=True)
    blocks = PackedRows(file, 1000)
    assert int(blocks.bytes_of_rows()[0]) == 103  # the first é ends with the second token, which is predicted
    assert blocks.num_predictions() * math.log2(257) / 103 == pytest.approx(104 / 103 * math.log2(257))
