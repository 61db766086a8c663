"""Token files are the same, byte for byte, whatever the number of processes that encode them."""

import json
import os
import random

import pytest

from distill.core.errors import InputError, MachineError
from distill.core.forked import can_fork
from distill.core.stored import CHECK
from distill.data import packing, token_processes, token_workers
from distill.data.base import Document, Rejected
from distill.data.chat import Chat
from distill.data.chat_encoder import ChatEncoder
from distill.data.chat_spec import ChatSpec
from distill.data.corpus import Corpus
from distill.data.encoder import TextEncoder
from distill.data.packing import write_tokens
from distill.data.spec import DataSpec
from distill.data.token_processes import num_processes
from tests.data.chats import PLAIN, chat_tokenizer

pytestmark = pytest.mark.skipif(not can_fork(), reason="forks are used on Linux alone")


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(packing, "_BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(token_workers, "WORKER_BYTES", 1)  # the others start after the first batch


@pytest.fixture
def of_processes(monkeypatch):
    return lambda number: monkeypatch.setattr(token_workers, "num_processes", lambda *_: number)


def written(folder, documents, encoder, **more):
    """The bytes of each file."""
    write_tokens(folder / "train-0.bin", documents, encoder, 1000, **more)
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".json"}, json.loads(
        (folder / "train-0.json").read_text()
    )


def texts(text_of):
    """Documents, with rows among them that cannot be used."""
    items = [Document(f"d{number}", text_of(number) * (number % 3 + 1)) for number in range(150)]
    for place in (3, 40, 41, 149):
        items.insert(place, Rejected(f"r{place}", "not JSON", f"of {place}"))
    return items


def without_marks(header):
    return {key: value for key, value in header.items() if key not in ("files", CHECK)}


@pytest.mark.parametrize("with_bytes", [False, True])
def test_documents(tmp_path, tokenizer, text_of, of_processes, with_bytes):
    found = {}
    for number in (1, 2, 3):
        of_processes(number)
        encoder = TextEncoder(tokenizer)
        files, header = written(tmp_path / str(number), texts(text_of), encoder, with_bytes=with_bytes)
        found[number] = files, without_marks(header)
    assert found[1][1]["num_documents"] == 150
    assert found[1][1]["tally"]["dropped"] == {"not JSON": 4}
    assert set(found[1][0]) == {"train-0.bin", "train-0.bounds", *["train-0.bytes"] * with_bytes}
    assert found[2] == found[3] == found[1]


def test_conversations(tmp_path, of_processes):
    chance = random.Random(0)
    words = ["one", "two", "three?", "<|im_end|>", "four\n", "five"]
    say = lambda: " ".join(chance.choices(words, k=chance.randrange(1, 12)))  # noqa: E731
    rows = [
        [{"role": role, "content": say()} for _ in range(chance.randrange(1, 4)) for role in ("user", "assistant")]
        for _ in range(80)
    ]
    rows[17] = rows[17][::-1]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    source, found = Chat(path=str(tmp_path / "chat.jsonl")), {}
    for number in (1, 2, 3):
        of_processes(number)
        encoder = ChatEncoder(chat_tokenizer(PLAIN), ChatSpec(), 60)
        files, header = written(tmp_path / str(number), source.documents(), encoder)
        found[number] = files, without_marks(header)
    assert found[1][1]["tally"]["num_read"] == 80
    assert found[1][1]["tally"]["noted"]
    assert len(found[1][1]["tally"]["dropped"]) == 2, "roles, and too long"
    assert ".learned" in "".join(found[1][0])
    assert found[2] == found[3] == found[1]


def test_an_id_without_a_row_is_named_with_its_document(tmp_path, tokenizer, text_of, of_processes):
    largest = {item.id: max(TextEncoder(tokenizer).encode([item.text])[0]) for item in texts(text_of) if item.text}
    limit = sorted(set(largest.values()))[-1]
    first = next(id for id, value in largest.items() if value >= limit)
    said = set()
    for number in (1, 3):
        of_processes(number)
        with pytest.raises(InputError, match=f"^{first}: token id {limit}, but") as caught:
            write_tokens(tmp_path / "t-0.bin", texts(text_of), TextEncoder(tokenizer), int(limit))
        said.add(str(caught.value))
        assert list(tmp_path.iterdir()) == []
    assert len(said) == 1


def test_a_killed_process_leaves_nothing_behind_and_the_next_run_goes_on(tmp_path, tokenizer, text_of, of_processes):
    """As when the machine has no memory left: the process that writes says so, and the folder is free again."""
    parent = os.getpid()

    class Fatal(TextEncoder):
        def rows(self, items, *, with_bytes):
            if os.getpid() != parent:
                os.kill(os.getpid(), 9)
            return super().rows(items, with_bytes=with_bytes)

    of_processes(2)
    with (
        packing.file_lock(tmp_path),
        pytest.raises(MachineError, match="a process that tokenizes was killed by signal 9"),
    ):
        write_tokens(tmp_path / "train-0.bin", texts(text_of), Fatal(tokenizer), 1000)
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]
    with packing.file_lock(tmp_path):
        assert write_tokens(tmp_path / "train-0.bin", texts(text_of), TextEncoder(tokenizer), 1000).num_documents == 150


def test_the_number_is_that_of_the_cpus_or_what_the_library_was_told(monkeypatch):
    monkeypatch.setattr(token_processes.threads, "available", lambda: 6)
    for name in ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert num_processes() == 6
    monkeypatch.setenv("RAYON_NUM_THREADS", "3")
    assert num_processes() == 3
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "False")
    assert num_processes() == 1
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setattr(token_processes, "can_fork", lambda: False)
    assert num_processes() == 1


def test_a_resume_reads_no_text(tmp_path, rows, tokenizer, of_processes, monkeypatch):
    """Neither the documents nor the tokens; what the files hold is known by marks that were left with them."""
    of_processes(2)
    train = {"kind": "jsonl", "path": str(rows)}
    data = DataSpec.model_validate({"train": train, "sequence_length": 32, "held_out": 0.2})
    before = Corpus.open(data, tokenizer, tmp_path / "data", 0, 1000)
    monkeypatch.setattr(type(data.train), "documents", lambda self: pytest.fail("the text is read again"))
    monkeypatch.setattr(token_workers, "Forked", lambda *args: pytest.fail("processes are started"))
    again = Corpus.open(data, tokenizer, tmp_path / "data", 0, 1000)
    assert again.hash == before.hash
    assert (again.train.tokens, again.validation.tokens) == (before.train.tokens, before.validation.tokens)
