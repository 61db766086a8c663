"""Questions and answers about documents, or of a skill, from InstructLab's ``qna.yaml``.

    document -> chunks -> views of each chunk        the text, its facts, a summary, extracts
                view   -> questions                  with seed pairs of the file as examples
                chunk, question -> answer            the writer reads the chunk, not the view, so that a wrong view
                                                     makes a wrong question at most, and no wrong answer

Many views with few questions each teach more than many questions about one view (sdg-hub, pull requests 57 and 62). A
question must be clear without the document, because the model that is asked later does not see it. The seed pairs are
rows too, except those that are reserved for the exam.

A file of a skill has no documents: the writer makes further questions like the examples, and answers them with the
examples before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distill.core.artifact import hash_of
from distill.core.errors import InputError
from distill.data import files
from distill.data.base import Item, Message
from distill.data.documents import Chunk, chunks_of, find_documents, missing_reader, plain, read_documents, tidy
from distill.data.files import File
from distill.data.qna_file import QnaFile, Seed, check_contexts, read_qna
from distill.data.with_document import with_document
from distill.stages.synthesize.answer_similarity import token_f1
from distill.stages.synthesize.candidate import Candidate, numbers_of, words_of
from distill.stages.synthesize.exam_spec import CONTROL, TRAINED, ExamSpec, Question
from distill.stages.synthesize.makers.base import MakerResult, MakerSpec
from distill.stages.synthesize.requests import LENGTH, STOP, Reply, Request, asked

if TYPE_CHECKING:
    from distill.stages.synthesize.asker import Asker

View = Literal["text", "facts", "summary", "extracts"]
VIEWS: dict[str, str] = {
    "facts": "List the facts that this text states, one per line. Each is a full sentence with its names and numbers.",
    "summary": "Summarise this text in at most five sentences. Keep names and numbers.",
    "extracts": "Copy the sentences of this text that hold the most information, word by word, one per line.",
}
QUESTIONS = (
    "{text}\n\nWrite {count} different questions about {about} that this text answers, one per line. Each question "
    "names what it is about, so that it can be understood without the text.{examples}"
)
EXAMPLES = "\n\nQuestions like these are wanted:\n{questions}"
EXAM = (
    "{text}\n\nWrite {count} questions for an exam about {about}, one per line. The answer to each is a name, a number "
    "or a few words of this text. Each question names what it is about."
)
LIKE = "Here are questions of one kind:\n\n{questions}\n\nWrite {count} new questions of this kind, one per line."
BUILTIN = "builtin:"
SAMPLE = Path(__file__).parents[1] / "sample"
"""An invented railway and general knowledge: qna.yaml, its document, and control questions."""
AGREE = 0.6
"""Token F1 from which two answers count as the same."""
_MARKER = re.compile(r"^\s*(?:(?:question|q)\s*\d*\s*[:.)]|[-*•]|\(?\d+[.):]?)\s*", re.IGNORECASE)


class Qna(MakerSpec):
    """Questions and answers from qna.yaml files: about their documents, or of their skills."""

    asks_about_documents: ClassVar[bool] = True

    kind: Literal["qna"] = "qna"
    path: str | list[str]
    """qna.yaml files, folders of them or globs; knowledge and skills, versions 1 to 3. builtin:qna is a sample."""
    documents: str | list[str] | None = None
    """Documents (Markdown, text, PDF), folders or globs; unset: files beside the qna.yaml that match its patterns. If
    there are several files of knowledge, each gets the documents that match its patterns. Repositories are not
    fetched."""
    views: list[View] = Field(["text", "facts"], min_length=1)
    """Views of a chunk from which questions are made: its text, a list of its facts, a summary, or extracts."""
    questions_per_view: int = Field(5, ge=1, le=50)
    """Number of questions per request."""
    rounds: int = Field(1, ge=1, le=100)
    """Number of requests per view, each with other examples and random numbers."""
    chunk_words: int = Field(300, ge=20)
    """Largest number of words per chunk."""
    answer_tokens: int = Field(128, ge=1)
    """Largest number of tokens of an answer; max_new_tokens limits views and questions."""
    answer_style: str = "Answer in one or two full sentences."
    """Instruction about the answer, which the writer reads after the question; empty: none. It is not part of the
    rows."""
    temperature: float = Field(0.7, ge=0)
    """Sampling temperature of questions; answers and views are greedy."""
    exam: ExamSpec | None = None
    """Questions that are reserved for an exam stage and not trained on; unset: none."""

    def files(self) -> list[File]:
        """The qna.yaml files and the documents."""
        found = [*self._qna_files(), *self._documents(self._read())]
        asked_too = [file for paths in self._exam_paths().values() for path in paths for file in _found(path)]
        return list(dict.fromkeys([*found, *asked_too]))

    def missing(self) -> str | None:
        """The reader of PDF files."""
        return missing_reader(self._documents(self._read()))

    def check(self) -> list[str]:
        """What is read, and contexts that are in no document."""
        qnas = self._read()
        documents = self._documents(qnas)
        lines = [f"{qna.file}: {qna.kind}, version {qna.version}, {len(qna.pairs)} pairs" for qna in qnas]
        if missing_reader(documents) is None:
            texts = read_documents(documents)
            for qna in qnas:
                if qna.kind == "knowledge":
                    raw = [file_text for file_text in (_plain_text(file) for file in documents) if file_text]
                    lines += check_contexts(qna, [*raw, *(text.text for text in texts)])
            chunks = sum(len(chunks_of(text, self.chunk_words)) for text in texts)
            if chunks:
                views = chunks * len(self.views) * self.rounds
                most = views * self.questions_per_view
                lines.append(f"{chunks} chunks, {views:,} requests for questions, at most {most:,} answers")
        if self.exam is not None and not self._asks_any(qnas, self.exam):
            raise InputError(
                "make.exam: keeps no question out, as skills and contexts with a single pair keep none; name qna.yaml "
                "files in exam.files, set exam.extra_per_chunk (with documents), or remove exam"
            )
        for group, qna in self._exam_files():
            lines.append(f"{qna.file}: {len(qna.pairs)} exam questions ({group})")
        return lines

    def why_no_exam(self) -> str | None:
        """See :meth:`MakerSpec.why_no_exam`."""
        return "its make keeps no questions for an exam; add exam: {} to it" if self.exam is None else None

    def has_documents(self) -> bool:
        """Whether one of the files is of knowledge."""
        return any(qna.kind == "knowledge" for qna in self._read())

    def make(self, asker: Asker, texts: Iterable[Item], seed: int) -> MakerResult:
        """See :meth:`MakerSpec.make`."""
        rows, exam, raw = list[Candidate](), list[Question](), list[str]()
        qnas = self._read()
        for qna in qnas:
            kept_out, seeds = self._divided(qna, seed)
            exam += kept_out
            rows += _seed_rows(seeds, qna)
            if qna.kind == "skill":
                rows += self._of_skill(qna, seeds, asker, raw)
        knowledge = [qna for qna in qnas if qna.kind == "knowledge"]
        for qna, documents in self._with_documents(knowledge):
            seeds = self._divided(qna, seed)[1]
            chunks = [chunk for text in read_documents(documents) for chunk in chunks_of(text, self.chunk_words)]
            exam += self._extra(qna, chunks, asker)
            rows += self._of_chunks(qna, seeds, chunks, asker, raw)
        for group, qna in self._exam_files():
            exam += [_question(one, number, group) for one in qna.seeds for number in range(len(one.pairs))]
        return MakerResult(rows, exam, raw[:8])

    def _asks_any(self, qnas: Sequence[QnaFile], exam: ExamSpec) -> bool:
        has_extra = exam.extra_per_chunk > 0 and any(qna.kind == "knowledge" for qna in qnas)
        return has_extra or bool(self._exam_files()) or any(self._divided(qna, 0)[0] for qna in qnas)

    def _read(self) -> list[QnaFile]:
        return [read_qna(str(file)) for file in self._qna_files()]

    def _qna_files(self) -> list[File]:
        return _found(self.path)

    def _exam_paths(self) -> dict[str, list[str]]:
        return {} if self.exam is None else {TRAINED: self.exam.files, CONTROL: self.exam.controls}

    def _exam_files(self) -> list[tuple[str, QnaFile]]:
        """(group, file) of each qna.yaml that is asked as a whole."""
        paths = [(group, path) for group, some in self._exam_paths().items() for path in some]
        return [(group, read_qna(str(file))) for group, path in paths for file in _found(path)]

    def _documents(self, qnas: Sequence[QnaFile]) -> list[File]:
        pairs = self._with_documents([qna for qna in qnas if qna.kind == "knowledge"])
        return list(dict.fromkeys(file for _, found in pairs for file in found))

    def _with_documents(self, qnas: Sequence[QnaFile]) -> list[tuple[QnaFile, list[File]]]:
        """Each file of knowledge with its documents.

        Raises:
            InputError: they are not there.
        """
        if self.documents is not None and not qnas:
            raise InputError("make.documents: has no effect, as skills have no documents; remove it")
        if self.documents is not None:
            return _divided_among(qnas, find_documents(self.documents))
        made = []
        for qna in qnas:
            assert qna.origin is not None
            place = str(qna.file).rpartition("/")[0] or "."
            try:
                made.append((qna, find_documents([f"{place}/{pattern}" for pattern in qna.origin.patterns])))
            except InputError as error:
                raise InputError(
                    f"{qna.file}: its documents are in {qna.origin.repo} at {qna.origin.commit}, which is not fetched; "
                    f"name them by make.documents, or put them beside the file ({error})"
                ) from None
        return made

    def _divided(self, qna: QnaFile, seed: int) -> tuple[list[Question], list[Seed]]:
        """The pairs that the exam keeps, and the seeds without them."""
        wanted = 0 if self.exam is None or qna.kind == "skill" else self.exam.pairs_per_seed
        exam, rest = [], []
        for one in qna.seeds:
            numbers = sorted(range(len(one.pairs)), key=lambda k: hash_of(seed, one.pairs[k].question))
            out = numbers[: min(wanted, len(numbers) - 1)]
            exam += [_question(one, number, TRAINED) for number in out]
            rest.append(Seed(one.context, tuple(p for k, p in enumerate(one.pairs) if k not in out), one.place))
        return exam, rest

    def _of_chunks(
        self, qna: QnaFile, seeds: Sequence[Seed], chunks: Sequence[Chunk], asker: Asker, raw: list[str]
    ) -> list[Candidate]:
        """Rows about the chunks of documents."""
        about = qna.domain or qna.outline or "it"
        views = [(chunk, str(view)) for chunk in chunks for view in self.views]
        written = [(chunk, view) for chunk, view in views if view != "text"]
        replies = asker.ask(
            "views", [asked(f"{chunk.text}\n\n{VIEWS[view]}", self.max_new_tokens) for chunk, view in written]
        )
        texts, rows = {(chunk.id, "text"): chunk.text for chunk in chunks}, list[Candidate]()
        for (chunk, view), reply in zip(written, replies, strict=True):
            if reply.finish == STOP and reply.text:
                texts[chunk.id, view] = reply.text
            else:
                rows.append(_unread(chunk, reply, f"the view {view} of the chunk is empty"))
        planned, requests = list[tuple[Chunk, str]](), list[Request]()
        for round_ in range(self.rounds):
            for number, (chunk, view) in enumerate(views):
                if (chunk.id, view) not in texts:
                    continue
                text = texts[chunk.id, view]
                examples = _examples(seeds, number + round_)
                said = QUESTIONS.format(text=text, count=self.questions_per_view, about=about, examples=examples)
                planned.append((chunk, view))
                requests.append(asked(said, self.max_new_tokens, self.temperature, round_))
        replies = asker.ask("questions", requests)
        raw += [reply.text for reply in replies[:4]]
        questions = list[tuple[Chunk, str, str]]()
        for (chunk, view), reply in zip(planned, replies, strict=True):
            found = questions_in(reply)[: self.questions_per_view]
            questions += [(chunk, view, question) for question in found]
            if not found:
                rows.append(_unread(chunk, reply, f"no question in the reply {reply.text[:60]!r}"))
        asks = [self._ask(chunk.text, question) for chunk, _, question in questions]
        replies = asker.ask("answers", asks)
        raw += [reply.text for reply in replies[:4]]
        for (chunk, view, question), reply in zip(questions, replies, strict=True):
            more = {"view": view, "qna": qna.file}
            rows.append(
                Candidate(
                    _user(question), reply.text, chunk.text, chunk.id, is_invented=True, finish=reply.finish, more=more
                )
            )
        return rows

    def _extra(self, qna: QnaFile, chunks: Sequence[Chunk], asker: Asker) -> list[Question]:
        """Exam questions by a prompt of their own, where two answers with the document agree."""
        count = 0 if self.exam is None else self.exam.extra_per_chunk
        if not count:
            return []
        about = qna.domain or qna.outline or "it"
        replies = asker.ask(
            "exam questions",
            [asked(EXAM.format(text=chunk.text, count=count, about=about), self.max_new_tokens) for chunk in chunks],
        )
        found = [
            (chunk, question)
            for chunk, reply in zip(chunks, replies, strict=True)
            for question in questions_in(reply)[:count]
        ]
        asks = [self._ask(chunk.text, question, copy) for chunk, question in found for copy in (0, 1)]
        answers = asker.ask("exam answers", asks)
        exam, seen = [], set[str]()
        for number, (chunk, question) in enumerate(found):
            first, second = answers[2 * number], answers[2 * number + 1]
            is_same = token_f1(first.text, second.text) >= AGREE
            is_same = is_same and numbers_of(first.text) == numbers_of(second.text)
            if is_same and first.finish == second.finish == STOP and question.casefold() not in seen:
                seen.add(question.casefold())
                exam.append(Question(question, first.text, chunk.text, TRAINED, chunk.id))
        asker.say(f"exam: {len(exam)} of {len(found)} questions kept, whose two answers agree")
        return exam

    def _ask(self, document: str, question: str, copy: int = 0) -> Request:
        """A request for an answer; the first is greedy, further ones are sampled."""
        said = f"{question} {self.answer_style}".strip()
        return asked(with_document(document, said), self.answer_tokens, 0.7 * min(copy, 1), copy)

    def _of_skill(self, qna: QnaFile, seeds: Sequence[Seed], asker: Asker, raw: list[str]) -> list[Candidate]:
        """New questions like the examples, answered with the examples before them."""
        shown = [
            (with_document(seed.context or "", pair.question), pair.answer) for seed in seeds for pair in seed.pairs
        ]
        requests = []
        for round_ in range(self.rounds):
            for number in range(len(shown)):
                some = [shown[(number + k) % len(shown)][0] for k in range(min(3, len(shown)))]
                said = LIKE.format(questions="\n\n".join(some), count=self.questions_per_view)
                requests.append(asked(said, self.max_new_tokens, self.temperature, round_))
        replies = asker.ask("questions", requests)
        raw += [reply.text for reply in replies[:4]]
        questions = [q for reply in replies for q in lines_in(reply)[: self.questions_per_view]]
        turns: list[Message] = []
        for question, answer in shown[:3]:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        asks = [Request((*turns, {"role": "user", "content": q}), self.answer_tokens) for q in questions]
        answers = asker.ask("answers", asks)
        return [
            Candidate(
                _user(question), reply.text, "", qna.file, is_invented=True, finish=reply.finish, more={"qna": qna.file}
            )
            for question, reply in zip(questions, answers, strict=True)
        ]


def _found(path: str | list[str]) -> list[File]:
    """The files behind paths; ``builtin:qna`` and ``builtin:control`` come with the package.

    Raises:
        InputError: there are none.
    """
    named = [path] if isinstance(path, str) else path
    for one in named:
        if one.startswith(BUILTIN) and one.removeprefix(BUILTIN) not in ("qna", "control"):
            raise InputError(f"{one}: no such file comes with distill (there are builtin:qna and builtin:control)")
    found = files.find(
        [str(SAMPLE / f"{one.removeprefix(BUILTIN)}.yaml") if one.startswith(BUILTIN) else one for one in named],
        ["qna.yaml"],
    )
    for file in found:
        if file.suffix not in (".yaml", ".yml"):
            raise InputError(f"{file}: is no qna.yaml; name documents by make.documents")
    return found


def _divided_among(qnas: Sequence[QnaFile], documents: Sequence[File]) -> list[tuple[QnaFile, list[File]]]:
    """Each file of knowledge with those of the documents that are its own: all of them, or by its patterns.

    Raises:
        InputError: a document belongs to no file or to several, or a file has none.
    """
    if len(qnas) == 1:
        return [(qnas[0], list(documents))]
    found: dict[str, list[File]] = {qna.file: [] for qna in qnas}
    for document in documents:
        path = PurePosixPath(document.as_posix())
        owners = [q.file for q in qnas if q.origin is not None and any(path.match(one) for one in q.origin.patterns)]
        if len(owners) != 1:
            raise InputError(
                f"make.documents: {document} matches document.patterns of {' and '.join(owners) or 'no qna.yaml'}, and "
                "each document is of one; write other patterns, or a stage for each qna.yaml"
            )
        found[owners[0]].append(document)
    if lacking := [file for file, some in found.items() if not some]:
        raise InputError(f"make.documents: none matches document.patterns of {lacking[0]}; name its documents too")
    return [(qna, found[qna.file]) for qna in qnas]


def _plain_text(file: File) -> str:
    """A document as it is written, in which contexts are looked for; empty for PDF files."""
    if files.form(file) == "pdf":
        return ""
    with files.opened(file) as stream:
        return files.whole(stream, file).decode("utf-8", "replace")


def _question(seed: Seed, number: int, group: str) -> Question:
    pair = seed.pairs[number]
    return Question(_line(pair.question), _line(pair.answer), plain(seed.context or ""), group, pair.place)


def _seed_rows(seeds: Sequence[Seed], qna: QnaFile) -> list[Candidate]:
    """The pairs of the file that the exam leaves."""
    rows = []
    for seed in seeds:
        context = plain(seed.context or "")
        for pair in seed.pairs:
            question, document = (_line(pair.question), context) if qna.kind == "knowledge" else ("", "")
            question = question or with_document(context, pair.question)
            more = {"view": "seed", "qna": qna.file}
            answer = tidy(pair.answer) if qna.kind == "knowledge" else pair.answer.strip()
            rows.append(Candidate(_user(question), answer, document, seed.place, more=more))
    return rows


def _examples(seeds: Sequence[Seed], number: int) -> str:
    """A seed's questions, another seed's for each view and round."""
    with_pairs = [seed for seed in seeds if seed.pairs]
    if not with_pairs:
        return ""
    pairs = with_pairs[number % len(with_pairs)].pairs
    return EXAMPLES.format(questions="\n".join(_line(pair.question) for pair in pairs[:3]))


def _unread(chunk: Chunk, reply: Reply, flaw: str) -> Candidate:
    """Stands for a reply that makes no row, so that it is dropped and counted, as unfinished or by its flaw."""
    return Candidate(_user("?"), reply.text, chunk.text, chunk.id, finish=reply.finish, flaw=flaw)


def _user(said: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": said},)


def _line(text: str) -> str:
    return " ".join(text.split())


def lines_in(reply: Reply) -> list[str]:
    """The lines of a list, without numbers and bullets; a last one that is cut off is left out.

    A reply that ended otherwise than by itself or at its limit has none.
    """
    lines = [_MARKER.sub("", line).strip().strip('"*') for line in reply.text.splitlines()]
    lines = [line for line in lines if len(words_of(line)) > 1]
    return lines if reply.finish == STOP else lines[:-1] if reply.finish == LENGTH else []


def questions_in(reply: Reply) -> list[str]:
    """The questions in a reply: the first of each line of a list.

    One that ended at the limit is read up to its last question mark; one that ended otherwise has none.
    """
    complete = Reply(reply.text, STOP if reply.finish == LENGTH else reply.finish)  # a question with its mark is whole
    found = [line[: line.index("?") + 1].strip() for line in lines_in(complete) if "?" in line]
    return list(dict.fromkeys(question for question in found if len(words_of(question)) > 2))
