"""Several processes tokenize a part of a text each: the same files as by one process, and no document twice."""

import json
import multiprocessing
import os
import signal
import time
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from distill.core import digest as core_digest
from distill.core.errors import InputError
from distill.core.forked import can_fork
from distill.core.stored import CHECK
from distill.core.world import SINGLE_PROCESS, World
from distill.data import packing, shared_tokens, token_shards, token_workers
from distill.data.base import Document, Rejected, digest, normalised
from distill.data.corpus import Corpus
from distill.data.encoder import TextEncoder
from distill.data.mixture_split import texts_of
from distill.data.shared_tokens import SharedText
from distill.data.spec import DataSpec
from distill.data.split import Split
from distill.data.token_shards import TokenShards
from tests.data.chats import PLAIN, chat_tokenizer

pytestmark = pytest.mark.skipif(not can_fork(), reason="forks are used on Linux alone")
FORK = multiprocessing.get_context("fork")
NUM_DOCUMENTS = 120


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(packing, "_BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(token_shards, "CHARACTERS", 1500)
    monkeypatch.setattr(token_workers, "num_processes", lambda *_: 1)


class Logged(TextEncoder):
    """Writes down which documents it was given, takes its time, and dies where it is told."""

    def __init__(self, tokenizer, log, dies_at=None, slow_s=0.0):
        super().__init__(tokenizer)
        self.log, self.dies_at, self.slow_s = log, dies_at, slow_s

    def rows(self, items, *, with_bytes):
        with self.log.open("a") as out:
            out.writelines(f"{os.getpid()} {item.id}\n" for item in items)
        time.sleep(self.slow_s)
        if self.dies_at in [item.id for item in items]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().rows(items, with_bytes=with_bytes)


def documents(text_of):
    items = [Document(f"d{number}", text_of(number) * (number % 3 + 1)) for number in range(NUM_DOCUMENTS)]
    for place in (3, 40, 41, 90):
        items.insert(place, Rejected(f"r{place}", "not JSON", f"of {place}"))
    return items


def half(items):
    """Every other document, and how many are left out."""
    kept = [item for item in items if isinstance(item, Rejected) or int(item.id[1:]) % 2]
    return kept, len(items) - len(kept)


def write(folder, items, encoder, world=SINGLE_PROCESS, vocabulary_size=1000):
    text = SharedText(
        folder / "train-0.bin", lambda: items, half, encoder, vocabulary_size, True, None, lambda: None, world
    )
    return text.write()


def contents(folder):
    header = json.loads((folder / "train-0.json").read_text())
    files = {file.name: file.read_bytes() for file in folder.glob("train-0.b*")}
    return files, {key: value for key, value in header.items() if key not in ("files", CHECK) and value is not None}


def together(*calls):
    """Run functions in processes of their own; their exit codes."""
    processes = [FORK.Process(target=call) for call in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def seen(log):
    return [line.split() for line in log.read_text().splitlines()]


@pytest.fixture
def alone(tmp_path, tokenizer, text_of):
    """The files of one process that writes them without shards."""
    (tmp_path / "alone").mkdir()
    items = documents(text_of)
    kept, num_repeated = half(items)
    packing.write_tokens(
        tmp_path / "alone" / "train-0.bin",
        kept,
        TextEncoder(tokenizer),
        1000,
        with_bytes=True,
        num_repeated=lambda: num_repeated,
    )
    return contents(tmp_path / "alone")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_number_of_processes_writes_the_same_file_and_tokenizes_nothing_twice(
    tmp_path, tokenizer, text_of, alone, size
):
    items, log = documents(text_of), tmp_path / "log"
    made = tmp_path / "made"
    calls = [
        partial(write, made, items, Logged(tokenizer, log, slow_s=0.02), World(rank, size, rank, size))
        for rank in range(size)
    ]
    assert together(*calls) == [0] * size
    assert contents(made) == alone
    tokenized = [id for _, id in seen(log)]
    assert sorted(tokenized) == sorted(item.id for item in half(items)[0] if not isinstance(item, Rejected))
    assert len({process for process, _ in seen(log)}) == size, "each has done a part"
    left = {file.name for file in made.iterdir()} - {".lock"}
    assert left == {f"train-0.{kind}" for kind in ("bin", "bounds", "bytes", "digests", "json")}
    used = [item for item in half(items)[0] if not isinstance(item, Rejected)]
    assert (made / "train-0.digests").read_bytes() == b"".join(digest(normalised(item.text)) for item in used)


def test_what_a_killed_process_has_finished_is_not_tokenized_again(tmp_path, tokenizer, text_of, alone):
    items, log, made = documents(text_of), tmp_path / "log", tmp_path / "made"
    assert together(partial(write, made, items, Logged(tokenizer, log, dies_at="d81"))) == [-signal.SIGKILL]
    before, parts = [id for _, id in seen(log)], TokenShards(made / "train-0.bin")
    done = [number for number in range(100) if parts.is_finished(number)]
    assert len(done) > 3
    log.unlink()
    write(made, items, Logged(tokenizer, log))
    assert contents(made) == alone
    again = {id for _, id in seen(log)} & {*before}
    assert "d81" in again
    assert len(again) < len(before) / 3, "but for the shard that it was at"


def test_a_process_that_dies_leaves_its_shard_to_the_others(tmp_path, tokenizer, text_of, alone):
    items, log, made = documents(text_of), tmp_path / "log", tmp_path / "made"
    kept = [item.id for item in half(items)[0] if not isinstance(item, Rejected)]

    def dies():
        # the first document of whichever shard it gets
        encoder = Logged(tokenizer, log)
        encoder.rows = lambda items, *, with_bytes: os.kill(os.getpid(), signal.SIGKILL)
        write(made, items, encoder, World(1, 2, 1, 2))

    codes = together(partial(write, made, items, Logged(tokenizer, log, slow_s=0.05), World(0, 2, 0, 2)), dies)
    assert codes == [0, -signal.SIGKILL]
    assert contents(made) == alone
    assert sorted(id for _, id in seen(log)) == sorted(kept)


def test_a_damaged_shard_is_made_again(tmp_path, tokenizer, text_of, alone):
    items, log, made = documents(text_of), tmp_path / "log", tmp_path / "made"
    together(partial(write, made, items, Logged(tokenizer, log, dies_at="d81")))
    with (made / "train-0.shards" / "00001.bin").open("r+b") as file:
        file.truncate(8)
    write(made, items, TextEncoder(tokenizer))
    assert contents(made) == alone


def test_a_shard_that_is_removed_while_it_is_read_is_missing(tmp_path, tokenizer, text_of, alone, monkeypatch):
    """Another process has joined all shards and removes them."""
    write(tmp_path, documents(text_of), TextEncoder(tokenizer))
    file = tmp_path / "train-0.bin"
    assert packing.read_tokens(file) is not None
    monkeypatch.setattr(core_digest, "_KNOWN", {})

    sha256 = core_digest.hashlib.sha256

    class Removing:
        def __init__(self, data=b""):
            self.hash = sha256(data)
            self.hexdigest, self.digest = self.hash.hexdigest, self.hash.digest

        def update(self, piece):
            file.unlink(missing_ok=True)
            self.hash.update(piece)

    monkeypatch.setattr(core_digest.hashlib, "sha256", Removing)
    assert packing.read_tokens(file, quietly=True) is None


def test_a_damaged_file_is_made_again(tmp_path, tokenizer, text_of, alone, capsys):
    items, made = documents(text_of), tmp_path / "made"
    write(made, items, TextEncoder(tokenizer))
    (made / "train-0.bounds").write_bytes(b"")
    write(made, items, TextEncoder(tokenizer))
    assert contents(made) == alone


def test_a_mistake_in_the_text_is_said_by_the_first_process(tmp_path, tokenizer, text_of, monkeypatch):
    """The other one waits for it, and says so itself only when it hears of nothing."""
    monkeypatch.setattr(shared_tokens, "PATIENCE_S", 0.2)
    items = documents(text_of)
    largest = int(max(np.max(ids) for ids in TextEncoder(tokenizer).encode([item.text for item in items])))
    with pytest.raises(InputError, match=rf"token id {largest}, but"):
        write(tmp_path / "first", items, TextEncoder(tokenizer), World(0, 2, 0, 2), vocabulary_size=largest)
    started = time.monotonic()
    with pytest.raises(InputError, match=rf"token id {largest}, but"):
        write(tmp_path / "other", items, TextEncoder(tokenizer), World(1, 2, 1, 2), vocabulary_size=largest)
    assert time.monotonic() - started >= 0.2
    # where another process can make it, it is used
    monkeypatch.setattr(shared_tokens, "PATIENCE_S", 60)
    made = tmp_path / "made"
    refused = partial(write, made, items, TextEncoder(tokenizer), World(1, 2, 1, 2), vocabulary_size=largest)
    assert together(refused, partial(write, made, items, TextEncoder(tokenizer), World(0, 2, 0, 2))) == [0, 0]


def test_unusable_rows_in_the_middle_end_nothing(tmp_path, tokenizer, text_of):
    """Only a text that begins with nothing but such rows is not read on."""
    bad = [Rejected(f"r{number}", "not JSON", "") for number in range(250)]
    long = [Document(f"d{number}", text_of(number)) for number in range(1, 99, 2)]
    tokens = write(tmp_path / "middle", [*long, *bad], TextEncoder(tokenizer))
    assert (tokens.tally.num_read, tokens.tally.num_dropped) == (len(long) + 250, 250)
    with pytest.raises(InputError, match="200 of 200 rows cannot be used"):
        write(tmp_path / "begin", [*bad, *long], TextEncoder(tokenizer))


def test_an_empty_text_is_an_empty_file(tmp_path, tokenizer):
    tokens = write(tmp_path / "made", [], TextEncoder(tokenizer))
    assert (tokens.num_tokens, tokens.num_documents) == (0, 0)


def chats(count, seed):
    draw = np.random.default_rng(seed)
    words = ["one", "two", "three?", "<|im_end|>", "four\n", "five"]
    say = lambda: " ".join(draw.choice(words, int(draw.integers(1, 12))))  # noqa: E731
    return [{"messages": [{"role": role, "content": say()} for role in ("user", "assistant")]} for _ in range(count)]


@pytest.mark.parametrize("clean", [None, {"decontaminate": ["validation"]}, {"duplicates": "exact"}])
def test_a_mixture_of_texts_and_chats_is_the_same_for_two_processes(tmp_path, text_of, clean):
    rows = [{"text": text_of(number % 80)} for number in range(100)]
    for name, some in (("text", rows), ("chat", chats(100, 0))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    sources = {
        "text": {"kind": "jsonl", "path": str(tmp_path / "text.jsonl")},
        "chat": {"kind": "chat", "path": str(tmp_path / "chat.jsonl")},
    }
    plain = {"train": {"kind": "mixture", "sources": sources}, "sequence_length": 400, "clean": clean}
    data = DataSpec.model_validate({key: value for key, value in plain.items() if value is not None})
    tokenizer, hashes = chat_tokenizer(PLAIN), tmp_path / "hashes"

    def opened(place, rank, size):
        corpus = Corpus.open(data, tokenizer, tmp_path / place, 0, 1000, world=World(rank, size, rank, size))
        with hashes.open("a") as out:
            out.write(json.dumps([corpus.hash, corpus.summary()]) + "\n")

    assert together(partial(opened, "one", 0, 1)) == [0]
    assert together(partial(opened, "two", 0, 2), partial(opened, "two", 1, 2)) == [0, 0]
    assert len({*hashes.read_text().splitlines()}) == 1
    one, two = ({file.name: file for file in (tmp_path / place).iterdir()} for place in ("one", "two"))
    assert [*sorted(one)] == [*sorted(two)]
    for name, file in one.items():
        if file.suffix in (".bin", ".bounds", ".learned", ".bytes", ".digests"):
            assert file.read_bytes() == two[name].read_bytes(), name


def test_what_is_validated_on_is_read_once(tmp_path, tokenizer, text_of, monkeypatch):
    """Training leaves it out by the digests that are on disk, as reading all other sources would take long."""
    for name in ("a", "b"):  # each has all texts of the other one
        rows = [{"text": text_of(number)} for number in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {name: {"kind": "jsonl", "path": str(tmp_path / f"{name}.jsonl")} for name in ("a", "b")}
    more = {"sequence_length": 32, "held_out": 0.2}
    data = DataSpec.model_validate({"train": {"kind": "mixture", "sources": sources}, **more})
    with monkeypatch.context() as patched:
        patched.setattr(Split, "validation", lambda self: pytest.fail("read once more"))
        patched.setattr("distill.data.corpus.can_repeat", lambda *given, **named: False)  # which reads a bounded part
        corpus = Corpus.open(data, tokenizer, tmp_path / "data", 0, 1000)
    split, every = texts_of(data)[0].split, {text_of(number) for number in range(60)}
    held_out = {text for text in every if split.is_held_out(Document("", text))}
    for part in corpus.train.tokens.parts:
        bounds, ids = part.tokens.bounds(), part.tokens.ids()
        texts = {tokenizer.decode(ids[a : b - 1]) for a, b in pairwise(bounds)}
        assert texts == every - held_out
    alone = DataSpec.model_validate({"train": sources["a"], "validation": sources["b"], "sequence_length": 32})
    with pytest.raises(InputError, match="empty corpus"):
        Corpus.open(alone, tokenizer, tmp_path / "data", 0, 1000)


def test_digests_that_no_header_names_are_not_used(tmp_path, tokenizer, text_of):
    """A file that an earlier run left behind, beside validation text that one process has tokenized anew."""
    texts = [text_of(number) for number in range(60)]
    for name, some in (("train", texts), ("validation", texts[:20])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    sources = {side: {"kind": "jsonl", "path": str(tmp_path / f"{side}.jsonl")} for side in ("train", "validation")}
    data = DataSpec.model_validate({**sources, "sequence_length": 32})
    Corpus.open(data, tokenizer, tmp_path / "data", 0, 1000)
    [digests] = (tmp_path / "data").glob("validation-*.digests")
    digests.write_bytes(b"\0" * digests.stat().st_size)
    cleaned = DataSpec.model_validate({**sources, "sequence_length": 32, "clean": {"duplicates": "exact"}})
    again = Corpus.open(cleaned, tokenizer, tmp_path / "data", 0, 1000)
    assert again.train.tokens.num_documents == 40
