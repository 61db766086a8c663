"""Reads ``qna.yaml``, InstructLab's file of seed questions: knowledge and skills, versions 1 to 3.

    knowledge, version 3        seed_examples: [{context, questions_and_answers: [{question, answer}, 3 or more]}, 5 or
                                more], created_by, domain, document_outline, document: {repo, commit, patterns}
    knowledge, versions 1, 2    seed_examples: [{question, answer}], created_by, domain, task_description, document
    skill, versions 1 to 3      seed_examples: [{question, answer, context?}], created_by, task_description

Version 1 has no key ``version``. A file is read by the version that it states. From version 2 on it needs five
examples, and ``document_outline`` (knowledge, version 3) or ``task_description`` (otherwise) is required. Each mistake
is reported with its line.

Source: the JSON Schemas of the package instructlab-schema 0.4.2, which this file replaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distill.core import source
from distill.core.errors import InputError, RecipeError
from distill.core.outside import read
from distill.core.source import KeyPath, Source, suggest

VERSIONS = (1, 2, 3)
FEWEST_SEEDS, FEWEST_PAIRS = 5, 3
MOST_BYTES = 1 << 20
_KNOWLEDGE = ("document", "domain", "document_outline")
"""Keys that only files of knowledge have."""


@dataclass(frozen=True)
class Pair:
    """A question with its answer.

    Attributes:
        question: its text.
        answer: the right answer.
        place: ``file:line`` of the question.
    """

    question: str
    answer: str
    place: str


@dataclass(frozen=True)
class Seed:
    """Questions about one context.

    Attributes:
        context: the text that contains the answers; None if an example has none.
        pairs: at least one.
        place: ``file:line`` of the example.
    """

    context: str | None
    pairs: tuple[Pair, ...]
    place: str


@dataclass(frozen=True)
class Origin:
    """Where the documents of a file come from; a recipe's ``documents`` overrides it.

    Attributes:
        repo: address of a git repository.
        commit: its commit.
        patterns: globs of the files.
    """

    repo: str
    commit: str
    patterns: tuple[str, ...]


@dataclass(frozen=True)
class QnaFile:
    """The content of a ``qna.yaml``.

    Attributes:
        file: its name.
        version: 1, 2 or 3.
        kind: what the examples teach.
        seeds: the examples.
        created_by: its author.
        domain: subject of the knowledge; empty for a skill.
        outline: what the document is about (knowledge), or what the task is (skill and old knowledge).
        origin: where the documents come from; None for a skill.
    """

    file: str
    version: int
    kind: Literal["knowledge", "skill"]
    seeds: tuple[Seed, ...]
    created_by: str = ""
    domain: str = ""
    outline: str = ""
    origin: Origin | None = None

    @property
    def pairs(self) -> list[Pair]:
        """All pairs, in the order of the file."""
        return [pair for seed in self.seeds for pair in seed.pairs]


def read_qna(file: str | Path) -> QnaFile:
    """Read a ``qna.yaml``.

    Raises:
        RecipeError: with every mistake, as ``file:line: key: what``.
        InputError: the file cannot be read.
    """
    content = read(Path(file))
    if len(content) > MOST_BYTES:
        raise InputError(f"{file}: larger than {MOST_BYTES:,} bytes, which no qna.yaml is; name the file of seeds")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{file}:{line}: not UTF-8 text (byte 0x{content[error.start]:02x}); convert it") from None
    return parse_qna(text, str(file))


def parse_qna(text: str, name: str) -> QnaFile:
    """As :func:`read_qna`, for text in memory; ``name`` is its name in messages to the user."""
    found = source.parse(text, name, what="qna.yaml")
    reader = _QnaParser(found, mistakes=list(found.mistakes))
    qna = reader.qna()
    if reader.mistakes:
        raise RecipeError(reader.mistakes)
    return qna


@dataclass
class _QnaParser:
    """Collects mistakes while it parses the file.

    Attributes:
        source: the parsed YAML, with line numbers.
        mistakes: mistakes found so far.
    """

    source: Source
    mistakes: list[str] = field(default_factory=list)

    def qna(self) -> QnaFile:
        """Parse the whole file."""
        data = self.source.data
        version = data.get("version", 1)
        if isinstance(version, bool) or version not in VERSIONS:
            self._wrong(("version",), f"must be 1, 2 or 3 (got {version!r}); a file without the key is of version 1")
            version = 3
        is_knowledge = any(key in data for key in _KNOWLEDGE) or _has_pairs(data.get("seed_examples"))
        is_nested = is_knowledge and version == 3
        described = "document_outline" if is_nested else "task_description"
        keys = ["version", "created_by", described, "seed_examples", *(["domain", "document"] if is_knowledge else [])]
        self._unknown((), data, keys)
        needed = ["created_by", "seed_examples"]
        needed += [described] if version > 1 else []
        needed += ["domain", "document"] if is_nested else ["document"] if is_knowledge else []
        for key in needed:
            if key not in data:
                self._wrong((), f"{key} is missing, which version {version} of {_name(is_knowledge)} needs")
        texts = {key: self._text((key,), data[key]) for key in ("created_by", described, "domain") if key in data}
        return QnaFile(
            file=self.source.name,
            version=version,
            kind="knowledge" if is_knowledge else "skill",
            seeds=self._seeds(data.get("seed_examples"), version, is_nested=is_nested),
            created_by=texts.get("created_by", ""),
            domain=texts.get("domain", ""),
            outline=texts.get(described, ""),
            origin=self._origin(data["document"]) if is_knowledge and "document" in data else None,
        )

    def _seeds(self, found: Any, version: int, *, is_nested: bool) -> tuple[Seed, ...]:
        path: KeyPath = ("seed_examples",)
        if found is None and "seed_examples" not in self.source.data:
            return ()
        if not isinstance(found, list) or not found:
            self._wrong(path, f"needs a list of examples (got {_short(found)})")
            return ()
        fewest = FEWEST_SEEDS if version > 1 else 1
        if len(found) < fewest:
            self._wrong(path, f"{len(found)} examples, version {version} needs {fewest} or more; add some")
        self._repeated(path, found)
        seeds = (self._seed((*path, number), one, is_nested=is_nested) for number, one in enumerate(found))
        return tuple(seed for seed in seeds if seed is not None)

    def _seed(self, path: KeyPath, found: Any, *, is_nested: bool) -> Seed | None:
        if not isinstance(found, dict):
            self._wrong(path, f"needs keys such as question and answer (got {_short(found)})")
            return None
        keys = ["context", "questions_and_answers"] if is_nested else ["question", "answer", "context"]
        self._unknown(path, found, keys)
        place = self.source.place(path)
        context = self._text((*path, "context"), found["context"]) if "context" in found else None
        if not is_nested:
            pair = self._pair(path, found)
            return None if pair is None else Seed(context, (pair,), place)
        if context is None:
            self._wrong(path, "context is missing: the part of the document that answers the questions")
        several, within = found.get("questions_and_answers"), (*path, "questions_and_answers")
        if not isinstance(several, list):
            self._wrong(within, f"needs a list of question and answer (got {_short(several)})")
            return None
        if len(several) < FEWEST_PAIRS:
            self._wrong(within, f"{len(several)} questions, each context needs {FEWEST_PAIRS} or more; add some")
        self._repeated(within, several)
        pairs = [self._pair((*within, number), one) for number, one in enumerate(several)]
        return Seed(context, tuple(pair for pair in pairs if pair is not None), place)

    def _pair(self, path: KeyPath, found: Any) -> Pair | None:
        if not isinstance(found, dict):
            self._wrong(path, f"needs question and answer (got {_short(found)})")
            return None
        if "questions_and_answers" in path:  # for unnested pairs, the caller has checked the keys
            self._unknown(path, found, ["question", "answer"])
        texts = []
        for key in ("question", "answer"):
            if key not in found:
                self._wrong(path, f"{key} is missing")
            else:
                texts.append(self._text((*path, key), found[key]))
        if len(texts) < 2 or not all(texts):
            return None
        return Pair(texts[0], texts[1], self.source.place((*path, "question")))

    def _origin(self, found: Any) -> Origin | None:
        path: KeyPath = ("document",)
        if not isinstance(found, dict):
            self._wrong(path, f"needs repo, commit and patterns (got {_short(found)})")
            return None
        self._unknown(path, found, ["repo", "commit", "patterns"])
        for key in ("repo", "commit", "patterns"):
            if key not in found:
                self._wrong(path, f"{key} is missing")
        texts = [self._text((*path, key), found[key]) if key in found else "" for key in ("repo", "commit")]
        patterns = found.get("patterns", [""])
        if not isinstance(patterns, list) or not patterns:
            self._wrong((*path, "patterns"), f"needs a list of globs such as [guide.md] (got {_short(patterns)})")
            return None
        self._repeated((*path, "patterns"), patterns)
        globs = [self._text((*path, "patterns", i), one) if one != "" else "" for i, one in enumerate(patterns)]
        return Origin(texts[0], texts[1], tuple(globs))

    def _text(self, path: KeyPath, found: Any) -> str:
        """Return the text without surrounding whitespace, and record a mistake if it is empty. Line breaks inside it
        are kept."""
        if not isinstance(found, str):
            hint = "; put it in quotes" if isinstance(found, int | float) else ""
            self._wrong(path, f"needs a text (got {_short(found)}){hint}")
            return ""
        if not found.strip():
            self._wrong(path, "is empty")
        return found.strip()

    def _unknown(self, path: KeyPath, found: dict[str, Any], keys: Sequence[str]) -> None:
        for key in found:
            if key not in keys:
                self._wrong((*path, key), f"no such key here (there are {', '.join(keys)}){suggest(key, keys)}")

    def _repeated(self, path: KeyPath, found: list[Any]) -> None:
        for number, one in enumerate(found):
            if one in found[:number]:
                self._wrong((*path, number), f"the same as number {found.index(one) + 1} of the list; remove one")

    def _wrong(self, path: KeyPath, what: str) -> None:
        self.mistakes.append(f"{self.source.at(path) if path else f'{self.source.name}:1'}: {what}")


def _has_pairs(seeds: Any) -> bool:
    return isinstance(seeds, list) and any(isinstance(one, dict) and "questions_and_answers" in one for one in seeds)


def _name(is_knowledge: bool) -> str:
    return "knowledge" if is_knowledge else "a skill"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def check_contexts(qna: QnaFile, documents: Sequence[str]) -> Iterator[str]:
    """Yield a line per context that is in none of the documents. This is not an error, because the context may be of
    another revision of them.

    Args:
        qna: a file of knowledge.
        documents: texts of the documents.
    """
    texts = [comparable(text) for text in documents]
    for seed in qna.seeds:
        if seed.context is not None and not any(comparable(seed.context) in text for text in texts):
            yield f"{seed.place}: this context is not in the documents; were they changed since it was written?"


def comparable(text: str) -> str:
    """Normalise what a copy may change: case and whitespace."""
    return " ".join(text.casefold().split())
