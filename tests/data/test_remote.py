"""Files at addresses: by fsspec's file system in memory, and by a web server in a thread."""

import gzip
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.core.errors import DistillError, InputError, MachineError, RecipeError
from distill.core.secrets import redacted
from distill.data.base import Rejected
from distill.data.chat import Chat
from distill.data.csv import Csv
from distill.data.jsonl import Jsonl
from distill.data.parquet import Parquet
from distill.data.text_files import TextFiles
from distill.recipe import Recipe

JSONL = "".join(json.dumps({"text": f"text {i} ß"}) + "\n" for i in range(4)).encode()
TEXTS = [f"text {i} ß" for i in range(4)]


def texts(source):
    return [item.text for item in source.documents() if not isinstance(item, Rejected)]


def refusal(source, kind=InputError):
    with pytest.raises(DistillError) as error:
        list(source.documents())
    assert "\n" not in str(error.value)
    assert isinstance(error.value, kind)
    return str(error.value)


def parquet_bytes(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


def test_every_source_of_files_reads_addresses(memory):
    memory.pipe("/d/a.jsonl", JSONL[: len(JSONL) // 2])
    memory.pipe("/d/b.jsonl.gz", gzip.compress(JSONL[len(JSONL) // 2 :]))
    memory.pipe("/d/rows.csv", b"text,n\none,1\n")
    memory.pipe("/d/rows.parquet", parquet_bytes([{"text": "two"}]))
    memory.pipe("/d/deep/note.md", b"three")
    memory.pipe("/d/.hidden.jsonl", b"{")
    memory.pipe("/chat/c.jsonl", b'{"prompt": "a?", "response": "b"}\n')
    for path in ("memory://d", "memory://d/*.jsonl*", ["memory://d/b.jsonl.gz", "memory://d/a.jsonl"]):
        assert texts(Jsonl(path=path)) == TEXTS
    assert texts(Csv(path="memory://d")) == ["one"]
    assert texts(Parquet(path="memory://d/rows.parquet")) == ["two"]
    assert texts(TextFiles(path="memory://d")) == ["three"]
    (chat,) = Chat(path="memory://chat").documents()
    assert chat.id == "memory:///chat/c.jsonl:1"


def test_an_address_is_identified_by_its_content(memory):
    memory.pipe("/d/a.jsonl", JSONL)
    before = Jsonl(path="memory://d/a.jsonl").fingerprint()
    assert Jsonl(path="memory://d/a.jsonl").num_bytes() == len(JSONL)
    memory.pipe("/d/b.jsonl", JSONL + b"\n")
    assert Jsonl(path="memory://d/b.jsonl").fingerprint() != before


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("memory://none", "memory://none: no such file"),
        ("memory://none/*.jsonl", "memory://none/*.jsonl: no such file"),
        ("ftp://host/x.jsonl", "ftp:// is not read here; expected s3://, gs:// or https://"),
        ("simplecache::https://host/x.jsonl", "is not read here"),
        ("file:///etc/passwd", "is not read here"),
    ],
)
def test_what_is_not_there_or_not_read_is_one_line(memory, path, message):
    assert message in refusal(Jsonl(path=path))


def test_a_folder_without_such_files(memory):
    memory.pipe("/d/a.txt", b"a")
    assert "no file in this folder ends in .jsonl" in refusal(Jsonl(path="memory://d"))


@pytest.mark.parametrize(("scheme", "extra", "module"), [("s3", "s3", "s3fs"), ("gs", "gs", "gcsfs")])
def test_a_missing_extra_is_named_by_its_command(scheme, extra, module, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    assert f"pip install 'distill-lm[{extra}]'" in refusal(Jsonl(path=f"{scheme}://bucket-{extra}/x.jsonl"))


# ------------------------------------------------------------------------------------------------------ a web server


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder, without ranges; ``/broken`` ends before it said it would, ``/private`` wants a password."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path.startswith("/private"):
            return self.send_error(403)
        if not self.path.startswith("/broken"):
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", str(len(JSONL) + 1000))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(JSONL)
        return None

    def do_HEAD(self):
        return self.send_error(403) if self.path.startswith("/private") else super().do_HEAD()


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """The address of a web server, and the folder of its files."""
    folder = tmp_path_factory.mktemp("web")
    (folder / "a.jsonl").write_bytes(JSONL)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(JSONL))
    (folder / "broken.jsonl").write_bytes(JSONL)
    (folder / "rows.parquet").write_bytes(parquet_bytes([{"text": text} for text in TEXTS]))
    (folder / "large.parquet").write_bytes(parquet_bytes([{"text": f"{i}" * 3_000_000} for i in range(1, 3)]))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def _without_a_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_files_of_a_web_server(web):
    assert texts(Jsonl(path=f"{web}/a.jsonl")) == texts(Jsonl(path=f"{web}/a.jsonl.gz")) == TEXTS
    assert texts(Parquet(path=f"{web}/rows.parquet")) == TEXTS
    source = Jsonl(path=f"{web}/a.jsonl?version=2")
    assert next(item.id for item in source.documents()) == f"{web}/a.jsonl:1"
    assert source.fingerprint() == Jsonl(path=f"{web}/a.jsonl?version=3").fingerprint()
    assert source.num_bytes() == len(JSONL)


def test_what_a_web_server_does_not_give_is_one_line(web):
    assert refusal(Jsonl(path=f"{web}/none.jsonl")) == f"{web}/none.jsonl: no such file"
    assert "credentials are taken from the environment" in refusal(Jsonl(path=f"{web}/private.jsonl"))
    assert "Cannot connect" in refusal(Jsonl(path="http://127.0.0.1:1/a.jsonl"))


def test_a_connection_that_breaks_is_no_end_of_a_file(web):
    assert "the connection broke" in refusal(Jsonl(path=f"{web}/broken.jsonl"), MachineError)


RECIPE = """
name: x
data:
  train: {{kind: jsonl, path: '{url}'}}
  sequence_length: 8
stages: {{report: {{}}}}
"""


def test_credentials_in_an_address_are_refused_and_never_shown(web):
    secret = "f00dfeedf00dfeed"
    for url in (f"https://me:{secret}@host/a.jsonl", f"https://host/a.jsonl?X-Amz-Signature={secret}&b=1"):
        assert secret not in redacted(url)
        with pytest.raises(RecipeError, match="holds a password or token") as error:
            Recipe.from_text(RECIPE.format(url=url))
        assert secret not in str(error.value)
    assert secret not in refusal(Jsonl(path=f"{web}/none.jsonl?token={secret}"))
    assert redacted("https://host/a?key=abc&page=2") == "https://host/a?key=***&page=2"
