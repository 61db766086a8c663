"""Losses of rows on disk: each written once, another text, cut or model is another file."""

import json
import os

import numpy as np
import pytest

from distill.data.corpus import Corpus
from distill.data.packed_rows import PackedRows
from distill.data.row_loss_file import RowLossFile
from distill.data.spec import DataSpec


@pytest.fixture
def blocks(tmp_path, tokenizer, text_of):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text_of(i)}) + "\n" for i in range(60)), encoding="utf-8")
    data = DataSpec.model_validate({"train": {"kind": "jsonl", "path": str(path)}, "sequence_length": 16})
    return Corpus.open(data, tokenizer, tmp_path / "data", seed=3, vocabulary_size=400).train


def test_what_is_written_is_there_for_the_next_and_the_rest_is_missing(blocks):
    losses = RowLossFile(blocks, "teacher")
    assert np.isnan(losses.read()).all()
    losses.write(np.array([5, 2]), np.array([0.5, 0.0], np.float32))
    again = RowLossFile(blocks, "teacher")
    assert again.path == losses.path
    assert again.missing(np.array([1, 2, 5, 6])).tolist() == [1, 6]
    assert again.read()[[2, 5]].tolist() == [0.0, 0.5]


def test_another_model_or_cut_has_losses_of_its_own(blocks):
    longer = PackedRows(blocks.tokens, 32)
    apart = PackedRows(blocks.tokens, 16, packing="documents")
    assert len({RowLossFile(*of).path for of in ((blocks, "a"), (blocks, "b"), (longer, "a"), (apart, "a"))}) == 4


def test_a_file_of_another_length_is_written_anew(blocks):
    losses = RowLossFile(blocks, "teacher")
    losses.write(np.arange(len(blocks)), np.ones(len(blocks), np.float32))
    losses.path.write_bytes(losses.path.read_bytes()[:-4])
    assert np.isnan(RowLossFile(blocks, "teacher").read()).all()


@pytest.mark.parametrize("at", [0, 8 * 3 + 2, 8 * 3 + 3, 8 * 5 + 6, 8 * 7 + 3])
def test_a_flipped_bit_is_found_and_that_row_alone_is_computed_again(blocks, capsys, at):
    losses = RowLossFile(blocks, "teacher")
    known = np.arange(7)  # row 7 and those after it are not known
    losses.write(known, np.linspace(1, 2, 7, dtype=np.float32))
    losses.read()
    content, before = bytearray(losses.path.read_bytes()), losses.path.stat()
    content[at] ^= 16
    losses.path.write_bytes(content)
    os.utime(losses.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = RowLossFile(blocks, "teacher")
    assert again.missing(known).tolist() == [row for row in known if row == at // 8]
    assert np.isnan(again.read()[7:]).all()
    line = f"1 of {len(blocks)} losses are not what was written; they are computed again"
    assert line in capsys.readouterr().err
    RowLossFile(blocks, "teacher")
    assert capsys.readouterr().err == ""


def test_the_losses_of_two_rows_cannot_change_places(blocks):
    losses = RowLossFile(blocks, "teacher")
    losses.write(np.arange(4), np.arange(4, dtype=np.float32))
    losses.read()
    content = losses.path.read_bytes()
    losses.path.write_bytes(content[8:16] + content[:8] + content[16:])
    assert RowLossFile(blocks, "teacher").missing(np.arange(4)).tolist() == [0, 1]
