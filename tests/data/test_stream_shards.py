"""A stream is tokenized once for all processes, a little ahead, and is read on at any row without what is before."""

import itertools
import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.core.errors import InputError, MachineError
from distill.core.forked import can_fork
from distill.data import packing, stream_shards
from distill.data.base import Rejected
from distill.data.corpus import Corpus
from distill.data.encoder import TextEncoder
from distill.data.micro_batches import MicroBatches
from distill.data.spec import DataSpec
from distill.data.stream import Position, Stream
from distill.data.stream_reader import StreamReader
from distill.data.stream_shards import AHEAD, BEHIND, StreamShards

pytestmark = pytest.mark.skipif(not can_fork(), reason="forks are used on Linux alone")
FORK = multiprocessing.get_context("fork")
LENGTH = 16


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(packing, "_BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(stream_shards, "SMALLEST", 200)
    monkeypatch.setattr(stream_shards, "LARGEST", 800)


@pytest.fixture
def stream(tmp_path, tokenizer, text_of):
    """A stream of 240 documents in four files, which writes down what it tokenizes."""
    (tmp_path / "set").mkdir()
    for number in range(4):
        texts = [f"{text_of(60 * number + row)} d{60 * number + row}" for row in range(60)]
        pq.write_table(pa.table({"text": texts}), tmp_path / "set" / f"{number}.parquet", row_group_size=25)
    return opened(tmp_path, tokenizer)


def opened(tmp_path, tokenizer, **more) -> Stream:
    source = {"kind": "hub", "path": str(tmp_path / "set"), "streaming": True}
    plain = {"train": source, "sequence_length": LENGTH, "validation_tokens": 64} | more
    made = Corpus.open(DataSpec.model_validate(plain), tokenizer, tmp_path / "data", 0, 500).train
    assert isinstance(made, Stream)
    return made


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Which process tokenizes which document, from now on."""
    encode, file = TextEncoder.encode, tmp_path / "log"

    def logged(self, texts):
        with file.open("a") as out:
            out.writelines(f"{os.getpid()} {text.split()[-1]}\n" for text in texts)
        return encode(self, texts)

    def begin():
        file.write_text("")
        monkeypatch.setattr(TextEncoder, "encode", logged)
        return file

    return begin


def first_rows(stream, count):
    return np.stack(list(itertools.islice(stream, count)))


def read(stream, positions):
    reader = StreamReader(stream)
    try:
        return reader.rows(positions)
    finally:
        reader.close()


def test_every_position_gives_its_row(stream):
    expected = first_rows(stream, 1500)  # over the edge of a pass
    reader = StreamReader(stream)
    for start in range(0, 1500, 7):
        stop = min(start + 7, 1500)
        assert (reader.rows(range(start, stop)) == expected[start:stop]).all()
    reader.close()
    draw = np.random.default_rng(0)
    for start in draw.integers(0, 1490, 4):
        assert (read(stream, range(start, start + 5)) == expected[start : start + 5]).all()


def test_the_rows_on_disk_are_bounded(stream):
    reader = StreamReader(stream)
    for position in range(1200):
        reader.rows(range(position, position + 1))
        assert len([*stream.folder.glob("*.bin")]) <= AHEAD + BEHIND + 2  # one that is being deleted
    reader.close()
    chain = StreamShards(stream).bounds()
    assert len(chain) > 2 * (AHEAD + BEHIND)
    assert not list(stream.folder.glob("*.reader"))


def test_going_on_reads_nothing_of_what_comes_before(stream, log):
    expected = first_rows(stream, 1300)
    reader = StreamReader(stream)
    reader.rows(range(1000))
    reader.close()
    for file in stream.folder.glob("*.bin"):  # as on another machine, or long ago
        file.unlink()
    chain = StreamShards(stream).bounds()
    begin = next(first for first, stop in chain if stop > 900)
    before = [at for _, at in itertools.takewhile(lambda one: one[1].row <= begin, stream.read(Position()))][-1]
    file = log()
    assert (read(stream, range(900, 910)) == expected[900:910]).all()
    tokenized = [line.split()[1] for line in file.read_text().splitlines()]
    assert tokenized
    assert before.source["num_rows"] > 100
    assert int(tokenized[0][1:]) >= before.source["num_rows"], "from there on"
    # rows that are on disk are not made again
    file.write_text("")
    assert (read(stream, range(900, 910)) == expected[900:910]).all()
    again = {line.split()[1] for line in file.read_text().splitlines()}
    assert not again & set(tokenized[:5])


def test_all_processes_use_the_work_of_one(stream, log, tmp_path):
    expected, file, ready = first_rows(stream, 400), log(), FORK.Barrier(3)

    def reads(rank):
        reader = StreamReader(stream)
        ready.wait(60)  # one that starts late would have rows made again that the others have left behind
        found = []
        for positions in itertools.islice(MicroBatches(4, 0, rank, 3), 30):
            found += reader.rows(positions).tolist()
            time.sleep(0.005)
        np.save(tmp_path / f"{rank}.npy", np.array([[id for id, _ in row] for row in found]))
        time.sleep(1 if rank else 0)  # the process that writes ends with its reader, and another one goes on
        reader.close()

    processes = [FORK.Process(target=partial(reads, rank)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    found = np.zeros((360, LENGTH), np.int64)
    for rank in range(3):
        where = [row for positions in itertools.islice(MicroBatches(4, 0, rank, 3), 30) for row in positions]
        found[where] = np.load(tmp_path / f"{rank}.npy")
    assert (found == expected["id"][:360]).all()
    # a shard that a writer had not finished is made again; everything else once
    tokenized = [line.split()[1] for line in file.read_text().splitlines()]
    needed = next(at for _, at in stream.read(Position()) if at.row >= 360).source["num_rows"]
    for number in range(needed // 2):
        assert tokenized.count(f"d{number}") <= 2
    assert len(tokenized) < 2.5 * needed + 240


def test_a_killed_reader_leaves_the_work_to_another(stream):
    expected, ready = first_rows(stream, 300), FORK.Event()

    def dies():
        reader = StreamReader(stream)
        reader.rows(range(3))
        ready.set()
        time.sleep(60)

    process = FORK.Process(target=dies)
    process.start()
    assert ready.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    reader = StreamReader(stream)
    assert (reader.rows(range(300)) == expected).all()
    assert stream_shards.rows_read(stream.folder) != [], "the mark of the living"
    assert len([*stream.folder.glob("*.reader")]) == 1
    reader.close()


def test_a_killed_writer_is_one_line(stream, monkeypatch):
    def dies(self, texts):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(TextEncoder, "encode", dies)
    with pytest.raises(MachineError, match="process that tokenizes the stream was killed by signal 9"):
        read(stream, range(3))


def test_what_is_wrong_with_the_text_reaches_those_who_read(tmp_path, tokenizer, stream, monkeypatch):
    usable = stream.split.trained_of
    broken = Rejected("rows:241", "not JSON", "half a line")
    monkeypatch.setattr(stream.split, "trained_of", lambda documents: itertools.chain(usable(documents), [broken]))
    strict = replace(stream, max_dropped=0.0)
    assert len(read(strict, range(20))) == 20, "before the end of the pass nothing is known of it"
    for _ in range(2):
        with pytest.raises(InputError, match=r"^data\.train: 1 of \d+ rows cannot be used"):
            read(strict, range(2000, 2001))


@pytest.mark.parametrize("is_cut", [True, False], ids=["cut", "a bit flipped"])
@pytest.mark.parametrize("kind", ["json", "bin"])
def test_damaged_files_are_made_again(stream, kind, is_cut):
    expected = first_rows(stream, 300)
    read(stream, range(250))
    bounds = {file: tuple(map(int, file.stem.split("-"))) for file in stream.folder.glob(f"*.{kind}")}
    (damaged,) = [file for file, (first, behind) in bounds.items() if first <= 249 < behind]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content[: len(content) // 2] if is_cut else content)
    assert (read(stream, range(300)) == expected).all()


def test_what_a_killed_writer_left_half_written_goes(stream):
    read(stream, range(3))
    left = stream.folder / ".000000000000-000000000007.bin.1234"
    left.write_bytes(b"half of them")
    read(stream, range(3))
    assert not left.exists()


def test_positions_are_the_same_after_json(stream):
    at = next(at for _, at in stream.read(Position()) if at.row > 50)
    again = Position.from_json(json.loads(json.dumps(at.to_json())))
    assert (again.left == at.left).all()
    assert again.to_json() == at.to_json()
    rows, behind = zip(*itertools.islice(stream.read(again), 5), strict=True)
    expected = first_rows(stream, behind[-1].row)
    assert (np.concatenate(rows) == expected[at.row :]).all()
