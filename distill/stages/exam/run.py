"""The exam stage at work: one model after the other, each with its books; what is answered survives a kill."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from distill.core.artifact import hash_of, write_text
from distill.core.errors import InputError
from distill.core.markdown import escaped
from distill.core.run_folder import CHECKPOINTS
from distill.core.stored import read_checked, write_checked
from distill.data.base import Message
from distill.data.chat_spec import ChatSpec
from distill.data.with_document import with_document
from distill.evaluation.quality import compare_predictions, predictions_of
from distill.evaluation.tasks.in_memory import ModelInMemory
from distill.stages.evaluate.measure import load_to_measure
from distill.stages.exam.judge import graded
from distill.stages.exam.questions import choices_of, read_questions
from distill.stages.exam.scores import CLOSED, OPEN, Given, Sitting, compared, row_of, tables
from distill.stages.exam.spec import ANSWERS, PAGE, ROWS, Exam
from distill.stages.progress_lines import ProgressLines
from distill.stages.session import StageContext
from distill.stages.synthesize.answer_similarity import numbers_right, token_f1
from distill.stages.synthesize.exam_spec import CONTROL, TRAINED, Question
from distill.stages.synthesize.row_files import EXAM, write_lines


def run(stage: Exam, context: StageContext) -> dict[str, Any]:
    """Ask all models, and write scores, answers and a table."""
    session = context.session
    file = Path(stage.questions) if stage.is_file else session.run.result(stage.questions, EXAM)
    if file is None:
        raise InputError(f"questions: stage {stage.questions} has left no {EXAM}; run it again")
    questions = read_questions(file, stage.questions)
    models = _models(stage, context)
    progress = ProgressLines(context, len(models), ("exam", "models"))
    sittings: dict[tuple[str, str], Sitting] = {}
    text: dict[str, float] = {}
    for model in models:
        _ask(stage, context, model, questions, sittings, text)
        progress.count(None)
    if stage.judge is not None:
        sittings = graded(stage.judge, stage.batch_size, context, questions, sittings)
    rows = [
        row_of(model, book, group, [one for one, q in zip(given.answers, questions, strict=True) if q.group == group])
        for (model, book), given in sittings.items()
        for group in (TRAINED, CONTROL)
        if any(question.group == group for question in questions)
    ]
    pairs = compared(sittings, questions, stage.baseline)
    page = tables(rows, pairs, stage.baseline)
    lines = [*_cut(rows), *_forgetting(text, stage.baseline)]
    write_lines(context.folder / ANSWERS, _answers(sittings, questions))
    write_text(context.folder / PAGE, "# Exam\n\n" + page + "\n" + "\n".join(lines) + "\n")
    content = {"rows": rows, "pairs": pairs, "bits_per_byte": text, "questions": len(questions)}
    write_text(context.folder / ROWS, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    for line in [*page.splitlines(), *lines]:
        context.say(line)
    return {"models": models, "questions": len(questions), "bits_per_byte": text}


def _models(stage: Exam, context: StageContext) -> list[str]:
    stages = context.session.stages
    names = list(stages)
    before = names[: names.index(context.name)]
    made = [name for name in before if stages[name].makes_model]
    return list(dict.fromkeys([stage.baseline, *(stage.models or made)]))


def _ask(
    stage: Exam,
    context: StageContext,
    model: str,
    questions: Sequence[Question],
    sittings: dict[tuple[str, str], Sitting],
    text: dict[str, float],
) -> None:
    """Fill in what one model answers, and its bits per byte of the validation text."""
    books = [CLOSED]
    if stage.open_book == "all" or (stage.open_book == "baseline" and model == stage.baseline):
        books.append(OPEN)
    own = replace(context, session=context.session.in_vocabulary_of(model))
    place = context.folder / CHECKPOINTS / f"{hash_of(model)[:8]}.json"
    about = f"{context.input_hash} {model}"
    if place.is_file():
        try:
            kept = read_checked(place, dict[str, Any], "", about)
        except InputError:
            kept = None
        if kept is not None:
            for book in books:
                sittings[model, book] = Sitting(tuple(Given(**one) for one in kept["books"][book]))
            text |= {model: kept["text"]} if kept["text"] is not None else {}
            return
    loaded = load_to_measure(own, own.session.artifact(model).location)
    lm = ModelInMemory(
        loaded,
        own.session.tokenizer(),
        chat=own.session.data.chat or ChatSpec(),
        batch_tokens=stage.batch_size * own.session.data.sequence_length,
    )
    if not lm.tokenizer.chat_template:
        raise InputError(f"{model}: has no chat template, so no question can be asked; name one in data.chat.template")
    for book in books:
        sittings[model, book] = Sitting(tuple(_sit(stage, lm, questions, book, context.session.seed)))
    if stage.forgetting:
        corpus = own.session.corpus()
        quality = compare_predictions(
            predictions_of(loaded), None, corpus.validation_loader(stage.batch_size), corpus.validation_bytes
        )
        text |= {model: float(quality.bits_per_byte)} if quality.bits_per_byte is not None else {}
    content = {book: [asdict(one) for one in sittings[model, book].answers] for book in books}
    write_checked(place, {"books": content, "text": text.get(model)}, about)


def _sit(stage: Exam, lm: ModelInMemory, questions: Sequence[Question], book: str, seed: int) -> list[Given]:
    """The answers of a model."""
    prompts: list[tuple[Message, ...]] = [
        ({"role": "user", "content": with_document(one.document if book == OPEN else "", one.question)},)
        for one in questions
    ]
    choices = choices_of(questions, stage.num_choices, seed) if stage.num_choices else [None] * len(questions)
    wanted = [
        (prompt, answer)
        for prompt, question, options in zip(prompts, questions, choices, strict=True)
        for answer in (question.answer, *(options[0] if options is not None else ()))
    ]
    sizes = [len(lm.tokenizer(answer, add_special_tokens=False)["input_ids"]) for _, answer in wanted]
    likely = lm.log_likelihoods(wanted)
    cuts = iter([one.cut for one in likely])
    means = iter([one.nats / max(1, size) for one, size in zip(likely, sizes, strict=True)])
    new = stage.max_new_tokens
    written = lm.written(prompts, new_tokens=new, stops=()) if new else [("", False)] * len(questions)
    answers = []
    for question, options, (text, is_cut) in zip(questions, choices, written, strict=True):
        nats, right, is_cut = -next(means), None, next(cuts) or is_cut
        if options is not None:
            scores = [next(means) for _ in options[0]]
            is_cut = sum(next(cuts) for _ in options[0]) > 0 or is_cut  # the sum reads all of them
            right = scores.index(max(scores)) == options[1]
        text, answer = text.strip(), question.answer
        f1, numbers = (token_f1(text, answer), numbers_right(text, answer)) if new else (None, None)
        answers.append(Given(nats, text, f1, numbers, right, is_cut=is_cut))
    return answers


def _answers(sittings: dict[tuple[str, str], Sitting], questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Every answer, one row each."""
    return [
        {"model": model, "book": book, "group": question.group, "question": question.question}
        | {"reference": question.answer, "place": question.place, **asdict(one)}
        for (model, book), given in sittings.items()
        for question, one in zip(questions, given.answers, strict=True)
    ]


def _cut(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each model that could not read some questions as a whole."""
    return [
        f"{escaped(row['model'])}, {row['book']} book: {row['cut']} of {row['questions']} {row['group']} questions are "
        "longer than its context and were read without their beginning; make shorter chunks (make.chunk_words)"
        for row in rows
        if row["cut"]
    ]


def _forgetting(text: dict[str, float], baseline: str) -> list[str]:
    """A line on what of the other text was forgotten."""
    if baseline not in text:
        return []
    changes = [f"{escaped(name)} {value:.4f} ({value - text[baseline]:+.4f})" for name, value in text.items()]
    return [f"Bits per byte of the validation text (change from {escaped(baseline)}): {', '.join(changes)}"]
