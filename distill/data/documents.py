"""Reads documents that a model is to learn (Markdown, plain text and PDF files), and splits their text into chunks.

PDF files are read with pypdf, an extra (``pip install 'distill-lm[pdf]'``). A file of scanned pages has no text and is
refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO

from distill.core.errors import InputError, MachineError
from distill.core.installed import install_command
from distill.data import files
from distill.data.files import File

SUFFIXES = (".md", ".txt", ".rst", ".pdf")
_LINK = re.compile(r"!?\[([^\[\]]*)\]\([^()\s]*(?:\([^()]*\)[^()\s]*)*(?:\s+\"[^\"]*\")?\)")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[^\n]*\n(?:.*?^[ \t]*\1[`~]*[ \t]*$|.*)", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"(?<!`)(`+)(?!`)(?:(?!\n[ \t]*\n).)+?(?<!`)\1(?!`)", re.DOTALL)
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(])")


@dataclass(frozen=True)
class Text:
    """A document.

    Attributes:
        name: path of its file.
        text: without links, comments and repeated whitespace.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Chunk:
    """A part of a document that is given to a model at once.

    Attributes:
        document: name of the document.
        number: index of the chunk in its document, from 0.
        text: its text.
    """

    document: str
    number: int
    text: str

    @property
    def id(self) -> str:
        """Name of the chunk in messages to the user and in rows."""
        return f"{self.document}#{self.number}"


def find_documents(paths: str | Sequence[str]) -> list[File]:
    """Find the files of documents at paths, in folders and by globs.

    Raises:
        InputError: there are none, or one is of another format.
    """
    found = files.find(paths, SUFFIXES)
    for file in found:
        if not files.unpacked(file.name).endswith(SUFFIXES):
            raise InputError(
                f"{file}: documents of this format cannot be read (expected {', '.join(SUFFIXES)}); convert it to text"
            )
    return found


def missing_reader(found: Sequence[File]) -> str | None:
    """Message that names the missing package that these files need, with the install command; None if none is
    missing."""
    pdf = next((file for file in found if files.form(file) == "pdf"), None)
    if pdf is None or find_spec("pypdf") is not None:
        return None
    return f"{pdf} is read by pypdf, which is not installed: {install_command('pdf')}"


def read_documents(found: Sequence[File]) -> list[Text]:
    """The texts of files.

    Raises:
        InputError: a file cannot be read, or holds no text.
        MachineError: the package that reads it is missing.
    """
    return [_read(file) for file in found]


def _read(file: File) -> Text:
    with files.opened(file) as stream:
        data = files.whole(stream, file)
    if files.form(file) == "pdf":
        text = _of_pdf(data, file)
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data[: error.start].count(b"\n") + 1
            raise InputError(f"{file}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x}); convert it") from None
    text = plain(text) if files.form(file) == "md" else tidy(text)
    if not text:
        raise InputError(f"{file}: holds no text; name another document")
    return Text(file.as_posix(), text)


def _of_pdf(data: bytes, file: File) -> str:
    if (missing := missing_reader([file])) is not None:
        raise MachineError(missing)
    import pypdf

    try:
        pages = [page.extract_text() for page in pypdf.PdfReader(BytesIO(data)).pages]
    except Exception as error:  # damaged files raise many kinds of errors
        raise InputError(f"{file}: cannot be read as PDF ({' '.join(str(error).split())}); make it anew") from error
    text = "\n\n".join(pages)
    if not text.strip():
        raise InputError(f"{file}: its {len(pages)} pages hold no text, only images; recognise their text first (OCR)")
    return text


def plain(markdown: str) -> str:
    """Markdown without comments and with links replaced by their words. Headings, lists, tables and code stay."""

    def without_links(text: str) -> str:
        text = _COMMENT.sub("", text)
        while (shorter := _LINK.sub(r"\1", text)) != text:
            text = shorter
        return _on_lines(text)

    return _around_code(markdown, without_links)


def tidy(text: str) -> str:
    """A text whose paragraphs are single lines, between empty lines; code between fences stays as it is."""
    return _around_code(text, _on_lines)


def _around_code(text: str, change: Callable[[str], str]) -> str:
    """Apply ``change`` to a text, except to its code: blocks between fences, and spans between backticks."""
    kept: list[str] = []

    def hide(code: str) -> str:
        kept.append(code)
        return f"\0{len(kept) - 1}\0"

    text = text.replace("\r\n", "\n").replace("\0", "")
    text = _FENCE.sub(lambda found: f"\n\n{hide(found[0])}\n\n", text)
    text = _CODE.sub(lambda found: hide(found[0].replace("\n", " ")), text)
    return re.sub(r"\0(\d+)\0", lambda found: kept[int(found[1])], change(text)).strip("\n")


def _on_lines(text: str) -> str:
    paragraphs = re.split(r"\n\s*\n", text)
    kept = [" ".join(_lines(one)) if not _is_list(one) else "\n".join(_lines(one)) for one in paragraphs]
    return "\n\n".join(one for one in kept if one)


def _lines(paragraph: str) -> list[str]:
    return [" ".join(line.split()) for line in paragraph.split("\n") if line.strip()]


def _is_list(paragraph: str) -> bool:
    """Whether line breaks are significant, as in headings, lists and tables."""
    return bool(re.search(r"^\s*([#>|*+-]|\d+[.)])\s*\S", paragraph, re.MULTILINE))


def chunks_of(document: Text, num_words: int) -> list[Chunk]:
    """Split a document into chunks of whole paragraphs. Longer paragraphs are cut between sentences, lists and code
    between lines, and anything still longer between words.

    Args:
        document: the document.
        num_words: maximum number of words per chunk.
    """
    texts: list[list[str]] = [[]]
    size = 0
    for piece in _pieces(document.text, num_words):
        words = len(piece.split())
        if size and size + words > num_words:
            texts.append([])
            size = 0
        texts[-1].append(piece)
        size += words
    return [Chunk(document.name, number, "\n\n".join(one)) for number, one in enumerate(texts) if one]


def _pieces(text: str, num_words: int) -> Iterator[str]:
    for paragraph in _paragraphs(text):
        if len(paragraph.split()) <= num_words:
            yield paragraph
            continue
        keeps_lines = _FENCE.match(paragraph) is not None or _is_list(paragraph)
        joint = "\n" if keeps_lines else " "
        piece, size = list[str](), 0
        for unit in paragraph.split("\n") if keeps_lines else _SENTENCE.split(paragraph):
            words = unit.split()
            part = unit if keeps_lines else " ".join(words)
            if piece and size + len(words) > num_words:
                yield joint.join(piece)
                piece, size = [], 0
            while len(words) > num_words:
                yield " ".join(words[:num_words])
                words = words[num_words:]
                part = " ".join(words)
            piece.append(part)
            size += len(words)
        if size:
            yield joint.join(piece)


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs, which are separated by empty lines; code between fences is one paragraph."""
    end = 0
    for found in _FENCE.finditer(text):
        yield from _not_empty(text[end : found.start()].split("\n\n"))
        yield found[0]
        end = found.end()
    yield from _not_empty(text[end:].split("\n\n"))


def _not_empty(paragraphs: Sequence[str]) -> Iterator[str]:
    return (one.strip("\n") for one in paragraphs if one.strip())
