"""Text that every machine has: the running Python's own reference documentation and standard library.

Use it to try a recipe without a download. It is eight megabytes, most of it Python with its docstrings, and half a
megabyte of English: enough for small models to learn something from, far too little to make a good one.
"""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from distill.core.errors import InputError
from distill.data.base import Conversation, Document, SourceSpec, digest, normalised

# Without text, not part of the standard library, or generated on this machine.
_SKIPPED_FOLDERS = re.compile(
    "__phello__|__pycache__|config-.*|dist-packages|encodings|ensurepip|idle_test|idlelib|lib-dynload|pydoc_data|"
    "site-packages|tests?|turtledemo"
)
_SKIPPED_MODULES = re.compile(
    r"(__hello__|_sysconfigdata.*|_sysconfig_vars.*|sitecustomize|usercustomize|stringprep|re\._casefix|"
    # Modules that some of Python 3.11 to 3.14 lack, so that the names of the documents are the same: gone by 3.14 ...
    r"_bootsubprocess|aifc|asynchat|asyncore|cgi|cgitb|chunk|crypt|distutils|imghdr|imp|importlib\.resources\._legacy|"
    r"lib2to3|mailcap|msilib|nntplib|pipes|smtpd|sndhdr|sunau|telnetlib|tkinter\.tix|uu|xdrlib|"
    # ... and new after 3.11
    r"_android_support|_apple_support|_ast_unparse|_colorize|_ios_support|_opcode_metadata|_py_warnings|_pydatetime|"
    r"_pylong|_pyrepl|annotationlib|asyncio\.(graph|tools)|compression|concurrent\.(interpreters|futures\.interpreter)|"
    r"dbm\.sqlite3|importlib\.(metadata\.diagnose|resources\._functional)|pathlib\.(_abc|_local|_os|types)|"
    r"sqlite3\.__main__|string\.templatelib|sysconfig\.__main__|zipfile\.(__main__|_path))(\..*)?"
)


class PythonDocs(SourceSpec):
    """The running Python's reference documentation and library sources; needs no download."""

    kind: Literal["python_docs"] = "python_docs"
    parts: Literal["all", "topics", "sources"] = "all"
    """`topics`: the reference documentation; `sources`: the library's modules; `all`: both."""
    max_bytes: int | None = Field(None, ge=1)
    """Limit the text to about this many bytes of whole documents, including held-out ones; null uses all."""

    def documents(self) -> Iterator[Document]:
        """Yield one document per help topic and per module, sorted by name, without texts that occurred before.

        Texts are compared after :func:`~distill.data.base.normalised`. Because names decide the split, equal texts
        could otherwise be on both sides.
        """
        seen: set[bytes] = set()
        for document in self._chosen():
            key = digest(normalised(document.text))
            if key not in seen and document.text.strip():
                seen.add(key)
                yield document

    def fingerprint(self) -> str:
        """A hash of the names and texts."""
        total = hashlib.sha256()
        for document in self.documents():
            total.update(document.id.encode() + b"\0" + digest(document.text))
        return total.hexdigest()

    def num_bytes(self) -> int | None:
        """The size of the text."""
        return sum(len(document.text.encode("utf-8")) for document in self.documents())

    def split_key(self, document: Document | Conversation) -> str:
        """The name, so that a module stays on its side of the split when a new Python changes a line of it."""
        return document.id

    def _chosen(self) -> Iterator[Document]:
        everything = _all(self.parts)
        if self.max_bytes is None:
            return everything
        left, kept = self.max_bytes, []
        for document in _spread(sorted(everything, key=lambda document: digest(document.id))):
            size = len(document.text.encode("utf-8"))
            if size <= left:
                left -= size
                kept.append(document)
        if left == self.max_bytes:  # no non-empty document fits
            raise InputError(f"python_docs: max_bytes ({self.max_bytes}) is less than any document; raise it")
        return iter(sorted(kept, key=lambda document: document.id))


def _spread(ordered: list[Document]) -> list[Document]:
    """Reorder so that every prefix is spread evenly over the list: first, middle, quarters, eighths ...

    The split holds out the documents with the lowest digests, so without this nearly all documents would be validation
    text.
    """
    ranks = sorted(range(len(ordered)), key=lambda rank: f"{rank:032b}"[::-1])
    return [ordered[rank] for rank in ranks]


def _all(parts: str) -> Iterator[Document]:
    if parts != "sources":
        yield from _topics(required=parts == "topics")
    if parts != "topics":
        yield from _sources()


def _topics(required: bool) -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]
    except ImportError:  # some systems package it separately
        if required:
            raise InputError("python_docs: this Python has no pydoc_data.topics; set parts: sources") from None
        return
    for name, text in sorted(topics.items()):
        yield Document(f"topic:{name}", text)


def _sources() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    modules = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _SKIPPED_FOLDERS.fullmatch(name)]
        for name in names:
            file = Path(folder, name)
            module = _module(file.relative_to(root)) if file.suffix == ".py" else ""
            if module and not _SKIPPED_MODULES.fullmatch(module):
                modules[module] = file
    if not modules:
        raise InputError(
            f"python_docs: this Python keeps no library sources in {root}; name text_files or jsonl instead"
        )
    for module, file in sorted(modules.items()):
        yield Document(f"module:{module}", _source(file))


def _module(file: Path) -> str:
    """``json/__init__.py`` -> ``json``: a module that becomes a package keeps its name."""
    return ".".join(part for part in file.with_suffix("").parts if part != "__init__")


def _source(file: Path) -> str:
    try:
        with tokenize.open(file) as stream:  # respects the coding declaration
            return stream.read()
    except (SyntaxError, UnicodeDecodeError, OSError):
        return ""  # no text: skipped
