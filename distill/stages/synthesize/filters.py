"""Which rows are dropped and why, cheapest filter first. Each dropped row is counted once, by the first that drops it.

    finished      the writer ended the reply itself
    parsed        the reply has the form that was asked for, without placeholders of the prompt
    length        the words of question and answer are within limits
    refers        a question or an answer speaks of "the passage", which the model does not have when it is asked
    duplicate     an earlier row has the same question (case, punctuation and spaces aside)
    exam          the row repeats an exam question: the same question, or more than half of its runs of eight words,
                  or its answer with the same numbers
    grounded      numbers and names of the answer stand in the document or in the question
    likelihood    log p(answer | document, question) - log p(answer | question) is at least so many nats per token
    judge         a writer who reads document, question and answer finds the answer faithful and the question clear
    cap           a chunk has as many rows already

Near duplicates stay: "repair the transmission" and "repair the suspension" differ in one word, and in what they teach.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distill.data.with_document import messages_with_document
from distill.stages.synthesize.asker import Asker
from distill.stages.synthesize.candidate import Candidate, names_of, numbers_of, without_possessive, words_of
from distill.stages.synthesize.exam_spec import Question
from distill.stages.synthesize.filters_spec import FiltersSpec
from distill.stages.synthesize.requests import STOP, LikelihoodRequest, asked

ORDER = ("finished", "parsed", "length", "refers", "duplicate", "exam", "grounded", "likelihood", "judge", "cap")
RUN, SHARE = 8, 0.5
"""Words of a run, and share of the exam question's runs that a row may hold."""
_REFERS = re.compile(
    r"\b(the|this|that|given|provided|above)\s+(given\s+|provided\s+|above\s+)?"
    r"(text|passage|document|context|article|paragraph|excerpt|section|summary|author|extract)\b"
    r"|\baccording to (the|this) (text|passage|document|context|article|paragraph|excerpt|summary|author)\b"
    r"|\b(figure|table)\s+\d+\b|\bmentioned (above|here|earlier)\b|\bas stated (above|here)\b",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"<[a-z_ ]+>|\b(this|correct|next|following) questions?\b|\[(question|answer|insert|your)[^\]]*\]|^\W*$|\.\.\.\s*$",
    re.IGNORECASE,
)
JUDGED = (
    "Judge a question and its answer by this text.\n\n{document}\n\nQuestion: {question}\nAnswer: {answer}\n\n"
    "Reply with three words, each yes or no: Does the text state everything that the answer says? Can the question be "
    "understood by a reader who does not have the text? Does the answer answer the question?"
)


@dataclass(frozen=True)
class Dropped:
    """A row that is not kept.

    Attributes:
        row: the row.
        filter: name of the filter, of :data:`ORDER`.
        why: in words.
    """

    row: Candidate
    filter: str
    why: str


def filtered(
    rows: Sequence[Candidate], spec: FiltersSpec, exam: Sequence[Question], asker: Asker
) -> tuple[list[Candidate], list[Dropped]]:
    """The rows that are kept, and those that are not.

    Args:
        rows: in order; of equal ones the first is kept.
        spec: which filters.
        exam: questions that no row may repeat.
        asker: for the filters that need a model.
    """
    kept, dropped = list[Candidate](), list[Dropped]()
    questions, told = set[str](), _Exam(exam)
    for row in rows:
        found = next(_cheap(row, spec, questions, told), None)
        if found is None:
            questions.add(_key(row.question or row.answer))
            kept.append(row)
        else:
            dropped.append(Dropped(row, *found))
    if spec.min_likelihood_gain is not None:
        kept = list(_by_likelihood(kept, spec.min_likelihood_gain, asker, dropped))
    if spec.judge:
        kept = list(_by_judge(kept, asker, dropped))
    if spec.max_per_chunk is not None:
        kept = list(_capped(kept, spec.max_per_chunk, dropped))
    return kept, dropped


def counts(dropped: Sequence[Dropped]) -> dict[str, int]:
    """Name of each filter that dropped rows -> how many, in order."""
    found = Counter(one.filter for one in dropped)
    return {name: found[name] for name in ORDER if found[name]}


def _cheap(row: Candidate, spec: FiltersSpec, questions: set[str], exam: _Exam) -> Iterator[tuple[str, str]]:
    """(filter, why) of each filter without a model that drops a row, in order."""
    if row.finish != STOP:
        yield "finished", f"the reply ended by {row.finish}"
    if row.flaw:
        yield "parsed", row.flaw
    if not row.answer.strip():
        yield "parsed", "it is empty"
    if row.is_invented and (_PLACEHOLDER.search(row.answer) or _PLACEHOLDER.search(row.question)):
        yield "parsed", "it has no words, is cut off by '...', or repeats a placeholder of the prompt"
    limits = {"question": (row.question, spec.question_words)} if _is_asked(row) else {}
    for name, (text, (fewest, most)) in {**limits, "answer": (row.answer, spec.answer_words)}.items():
        if not fewest <= (count := len(text.split())) <= most:
            yield "length", f"the {name} has {count} words, limits are {fewest} and {most}"
    if spec.refers_to_text and row.document:
        for text in (row.question, row.answer):
            if found := _REFERS.search(text):
                yield "refers", f"it speaks of {found[0]!r}, which the model does not have when it is asked"
    if spec.duplicates and _key(row.question or row.answer) in questions:
        yield "duplicate", "an earlier row asks the same"
    if (question := exam.told_by(row)) is not None:
        yield "exam", f"it repeats the exam question {question.question!r}"
    if spec.grounded and row.document:
        allowed = f"{row.document} {row.question}"
        lacking = sorted(numbers_of(row.answer) - numbers_of(allowed))
        lacking += sorted(names_of(row.answer) - _all_words(allowed))
        if lacking:
            yield "grounded", f"{lacking[0]!r} of the answer stands neither in the document nor in the question"


def _is_asked(row: Candidate) -> bool:
    """Whether it is a question about a document; a text made from a document has no question."""
    return bool(row.document and row.messages)


def _all_words(text: str) -> set[str]:
    return {without_possessive(word) for word in re.findall(r"[\w'\u2019-]+", text.casefold())}


def _key(text: str) -> str:
    """Words of a text in lower case, without punctuation."""
    return " ".join(words_of(text))


class _Exam:
    """Exam questions, to be found in rows."""

    def __init__(self, questions: Sequence[Question]):
        self._questions = []
        for question in questions:
            both = f"{question.question} {question.answer}"
            self._questions.append((question, _runs(both), _key(question.answer), numbers_of(both)))

    def told_by(self, row: Candidate) -> Question | None:
        """The question that a row repeats; None if none."""
        if not self._questions:
            return None
        text = f"{row.question} {row.answer}"
        runs, key, numbers, asked = _runs(text), _key(row.answer), numbers_of(text), _key(row.question)
        for question, theirs, answer, wanted in self._questions:
            is_copied = _key(question.question) == asked or len(theirs & runs) > SHARE * len(theirs)
            if is_copied or (key == answer and wanted == numbers):
                return question
        return None


def _runs(text: str) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)}


def _by_likelihood(rows: list[Candidate], least: float, asker: Asker, dropped: list[Dropped]) -> Iterator[Candidate]:
    """Rows whose answer the document makes likelier; what it gains is stored."""
    some = [row for row in rows if _is_asked(row)]
    from_document = asker.likelihoods(
        [LikelihoodRequest(tuple(messages_with_document(row.document, row.messages)), row.answer) for row in some]
    )
    from_question = asker.likelihoods([LikelihoodRequest(row.messages, row.answer) for row in some])
    pairs = iter(zip(from_document, from_question, strict=True))
    for row in rows:
        if not _is_asked(row):
            yield row
            continue
        shown, hidden = next(pairs)
        gain = shown.mean - hidden.mean
        if shown.is_cut:
            why = "with its document it is longer than the writer's context, so its likelihood cannot be computed"
            dropped.append(Dropped(row, "likelihood", why))
        elif gain >= least:
            yield row.with_more(likelihood_gain=round(gain, 4))
        else:
            why = f"the document makes the answer likelier by {gain:.3f} nats per token, less than {least:g}"
            dropped.append(Dropped(row, "likelihood", why))


def _by_judge(rows: list[Candidate], asker: Asker, dropped: list[Dropped]) -> Iterator[Candidate]:
    some = [row for row in rows if _is_asked(row)]
    requests = [
        asked(JUDGED.format(document=row.document, question=row.question, answer=row.answer), 24) for row in some
    ]
    replies = iter(asker.ask("judgements", requests))
    for row in rows:
        if not _is_asked(row):
            yield row
            continue
        said = next(replies).text
        found = re.findall(r"\b(yes|no)\b", said.casefold())
        if found[:3] == ["yes"] * 3:
            yield row
        else:
            dropped.append(Dropped(row, "judge", f"the judge said {said[:80]!r}"))


def _capped(rows: list[Candidate], most: int, dropped: list[Dropped]) -> Iterator[Candidate]:
    seen: Counter[str] = Counter()
    for row in rows:
        seen[row.source] += 1
        if seen[row.source] <= most:
            yield row
        else:
            dropped.append(Dropped(row, "cap", f"{row.source} has {most} rows already (max_per_chunk)"))
