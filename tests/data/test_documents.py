"""Documents: formats, what stays of Markdown, and chunks that lose no word."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from distill.core.errors import DistillError, InputError
from distill.data.documents import Text, chunks_of, find_documents, missing_reader, plain, read_documents, tidy

MARKDOWN = """# Title

The [Red Line](Red_Line_(MBTA) "wikilink") runs
since ![x](a.png) 1912.<!-- no -->

- one
- two
"""


def test_markdown_keeps_words_and_line_breaks_that_mean_something() -> None:
    assert plain(MARKDOWN) == "# Title\n\nThe Red Line runs since x 1912.\n\n- one\n- two"


CODE = """Call it, or [`handlers[name](event)`](a.md):
```python
def on(name):  # see [x](y) <!-- z -->

    handlers[name](event)
```
Then `a[0](b)` and
see [this](there).
"""


def test_code_stays_as_it_is() -> None:
    code = CODE[CODE.index("```") : CODE.rindex("```") + 3]
    assert plain(CODE) == f"Call it, or `handlers[name](event)`:\n\n{code}\n\nThen `a[0](b)` and see this."
    assert tidy(CODE.replace("\n", "\r\n")).count(code) == 1
    assert plain("a ``x ` [y](z)`` [b](c) ` d") == "a ``x ` [y](z)`` b ` d"
    assert plain("~~~\nopen [a](b)\n") == "~~~\nopen [a](b)"
    (one,) = chunks_of(Text("d", plain(CODE)), 40)
    assert one.text == plain(CODE)
    pieces = [chunk.text for chunk in chunks_of(Text("d", plain(CODE)), 9)]
    assert "    handlers[name](event)" in "\n".join(pieces).split("\n")
    assert " ".join(pieces).split() == plain(CODE).split()


def test_files_are_found_and_refused(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(MARKDOWN)
    (tmp_path / "b.txt").write_text("plain   text")
    texts = read_documents(find_documents(str(tmp_path)))
    assert [one.text for one in texts] == [plain(MARKDOWN), "plain text"]
    (tmp_path / "c.docx").write_text("x")
    with pytest.raises(InputError, match=r"c\.docx: documents of this format"):
        find_documents(str(tmp_path / "c.docx"))
    (tmp_path / "bad.txt").write_bytes(b"ok\n\xff")
    with pytest.raises(InputError, match=r"bad\.txt:2: not UTF-8"):
        read_documents(find_documents(str(tmp_path / "bad.txt")))
    (tmp_path / "no.md").write_text("<!-- only this -->")
    with pytest.raises(InputError, match="holds no text"):
        read_documents(find_documents(str(tmp_path / "no.md")))


def test_pdf_is_an_extra(tmp_path: Path) -> None:
    file = tmp_path / "a.pdf"
    file.write_bytes(b"%PDF-1.4 broken")
    found = find_documents(str(file))
    assert (missing_reader(found) is None) == (find_spec("pypdf") is not None)
    with pytest.raises(DistillError, match="pip install" if find_spec("pypdf") is None else "cannot be read as PDF"):
        read_documents(found)


@pytest.mark.parametrize("num_words", [3, 7, 40, 1000])
def test_chunks_lose_no_word(num_words: int) -> None:
    text = "\n\n".join(" ".join(f"w{p}_{i}" for i in range(p * 5 + 1)) + ". Next one." for p in range(9))
    chunks = chunks_of(Text("d", text), num_words)
    assert " ".join(one.text for one in chunks).split() == text.split()
    assert max(len(one.text.split()) for one in chunks) <= num_words
    assert [one.id for one in chunks] == [f"d#{i}" for i in range(len(chunks))]
