"""Rows that a writer makes: makers, filters, yield, resume, and that the next stages read them."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.core.errors import InputError, RecipeError
from distill.core.run_folder import Run
from distill.data.base import Rejected
from distill.data.chat_spec import ChatSpec
from distill.data.split import Split
from distill.data.tokenizer import load_tokenizer
from distill.evaluation.tasks.in_memory import ModelInMemory
from distill.evaluation.tasks.likelihood import log_likelihoods
from distill.forecast import describe
from distill.models.load import load_model
from distill.recipe import Recipe
from distill.runner import run
from distill.show_data import show_named
from distill.show_rows import is_data_set, show_rows
from distill.stages.exam.judge import grade_in
from distill.stages.exam.questions import choices_of
from distill.stages.exam.run import _cut, _sit
from distill.stages.exam.scores import CLOSED, OPEN, row_of
from distill.stages.exam.spec import Exam
from distill.stages.session import Session, StageContext
from distill.stages.synthesize import local_writer
from distill.stages.synthesize.answer_similarity import numbers_right, token_f1
from distill.stages.synthesize.asker import Asker
from distill.stages.synthesize.candidate import Candidate, names_of, numbers_of
from distill.stages.synthesize.exam_spec import TRAINED, Question
from distill.stages.synthesize.filters import counts, filtered
from distill.stages.synthesize.filters_spec import FiltersSpec
from distill.stages.synthesize.local_writer import LocalWriter
from distill.stages.synthesize.makers.qna import Qna, lines_in, questions_in
from distill.stages.synthesize.replies import Replies
from distill.stages.synthesize.requests import LikelihoodRequest, Reply, Request, asked
from distill.stages.synthesize.writer_tokenizer import writer_tokenizer
from distill.stages.text import data_of
from distill.training.module import DistillationModule
from tests.data import chats
from tests.stages.chat_server import ChatServer
from tests.stages.test_chat import SPECIAL, conversations

DOCUMENT = "\n\n".join(f"Bridge {n} of Ulm was built in 18{n}0 by {n} men from Kiel." for n in range(1, 7))
SEED = """\
  - context: Bridge {n} of Ulm was built in 18{n}0 by {n} men from Kiel.
    questions_and_answers:
      - question: When was bridge {n} of Ulm built?
        answer: It was built in 18{n}0.
      - question: Who built bridge {n} of Ulm?
        answer: It was {n} men from Kiel.
      - question: Where is bridge {n}?
        answer: Bridge {n} is in Ulm.
"""
QNA = """\
version: 3
created_by: me
domain: bridges
document_outline: Bridges
document: {repo: r, commit: c, patterns: [bridges.md]}
seed_examples:
""" + "".join(SEED.format(n=n) for n in range(1, 6))
STAGE = """\
  facts:
    kind: synthesize
    make: {{kind: qna, path: {folder}/qna.yaml, views: [text], questions_per_view: 3, chunk_words: 20,
      exam: {{pairs_per_seed: 1, controls: ["{folder}/control.yaml"]}}}}
    writer: {{server: "{server}", max_wait_s: 0.2}}
    filters: {{min_yield: 0.2}}
"""
RECIPE = """\
name: know
teacher: {folder}/teacher
data:
  train: {{kind: chat, path: {folder}/replay.jsonl}}
  sequence_length: 256
stages:
{stage}
  learn: {{kind: distill, student: teacher, teacher: self, lora: {{r: 2}}, data: facts, teacher_reads: document,
    num_steps: 3, batch_size: 2, optimizer: {{lr: 1e-2}}}}
  control: {{kind: finetune, model: teacher, num_steps: 2, batch_size: 2,
    data: {{mixture: {{facts: 0.8, train: 0.2}}, max_repeats: 100}}}}
  exam: {{questions: facts, max_new_tokens: 6, open_book: all, num_choices: 3}}
compute: {{accelerator: cpu, log_every_steps: 1}}
logging: {{wandb: disabled}}
"""


def knows_bridges(body: dict[str, Any]) -> tuple[str, str]:
    """A writer that asks about the bridges of the text, and answers from it."""
    said = body["messages"][-1]["content"]
    numbers = re.findall(r"Bridge (\d) of Ulm was built in (\d+)", said)
    if "different questions" in said:
        lines = [f"{i}. In which year was bridge {n} of Ulm finished?" for i, (n, _) in enumerate(numbers, 1)]
        return "\n".join([*lines, "4. What does the passage say of bridges?"]), "stop"
    n = re.findall(r"bridge (\d)", said)
    year = dict(numbers).get(n[-1], "1999") if n else "1999"
    return (f"Bridge {n[-1]} was finished in {year}." if n and n[-1] != "2" else "It was in 1234."), "stop"


def make_teacher(folder: Path) -> Path:
    from distill.models.load import new_config, new_model

    tokenizer = chats.chat_tokenizer(chats.PLAIN, SPECIAL)
    keys = {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 768, "initializer_range": 0.3}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    ends = {"eos_token_id": tokenizer.get_vocab()["<|im_end|>"], "vocab_size": len(tokenizer)}
    new_model(new_config(keys | sizes | ends), seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("know")
    (folder / "bridges.md").write_text(DOCUMENT)
    (folder / "qna.yaml").write_text(QNA)
    (folder / "control.yaml").write_text(
        QNA.replace("Ulm", "Bonn").replace("Kiel", "Trier").replace("Where is", "Which town has")
    )
    rows = [json.dumps({"messages": messages}) for messages in conversations(0, 40)]
    (folder / "replay.jsonl").write_text("\n".join(rows))
    make_teacher(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Run, Recipe, list[str]]:
    with ChatServer(knows_bridges) as server:
        stage = STAGE.format(folder=folder, server=server.address)
        recipe = Recipe.from_text(RECIPE.format(folder=folder, stage=stage))
        said: list[str] = []
        return run(recipe, folder / "run", say=said.append), recipe, said


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_rows_are_kept_or_dropped_with_a_reason_and_the_exam_stays_out(finished: tuple[Run, Recipe, list[str]]) -> None:
    the_run, _, said = finished
    place = the_run.stage("facts")
    kept, dropped, exam = rows_of(place / "data" / "rows-00000.jsonl"), *map(rows_of, (place / "dropped.jsonl",
                                                                                     place / "exam.jsonl"))  # fmt: skip
    assert [row["group"] for row in exam].count("trained") == 5
    assert [row["group"] for row in exam].count("control") == 15
    questions = {row["question"] for row in exam}
    assert not questions & {row["messages"][0]["content"] for row in kept}
    asked = [row for row in kept if row["view"] == "text"]
    assert asked
    for row in asked:
        (n,) = re.findall(r"bridge (\d)", row["messages"][0]["content"])
        assert row["messages"][1]["content"] == f"Bridge {n} was finished in 18{n}0."
        assert f"Bridge {n} of Ulm" in row["document"]
    why = {(row["filter"], row["messages"][0]["content"]) for row in dropped}
    assert ("grounded", "In which year was bridge 2 of Ulm finished?") in why
    assert ("refers", "What does the passage say of bridges?") in why
    about = json.loads((place / "data.json").read_text())
    assert about["rows"] == len(kept)
    replies = [row for file in (place / "replies").glob("replies-*") for row in rows_of(file)]
    assert about["tokens"] == {
        "prompts": sum(row["prompt_tokens"] for row in replies), "replies": sum(row["new_tokens"] for row in replies)
    }  # fmt: skip
    assert about["rows"] + sum(about["dropped"].values()) == about["rows_before_filters"]
    assert any("rows kept; dropped: refers" in line for line in said)


def test_the_next_stages_train_on_the_rows(finished: tuple[Run, Recipe, list[str]]) -> None:
    the_run, recipe, said = finished
    assert any("the teacher reads a document before" in line for line in said)
    assert any("passes over each source: facts" in line for line in said)
    assert Recipe.from_text(recipe.dump()) == recipe
    said.clear()
    run(recipe, the_run.folder, say=said.append)
    assert len([line for line in said if "finished before" in line]) == 4


def test_the_exam_asks_with_and_without_the_document(finished: tuple[Run, Recipe, list[str]], folder: Path) -> None:
    the_run, _, _ = finished
    place = the_run.stage("exam")
    found = json.loads((place / "exam.json").read_text())
    rows = {(row["model"], row["book"], row["group"]): row for row in found["rows"]}
    names = ("teacher", "learn", "control")
    assert {*rows} == {(m, b, g) for m in names for b in ("closed", "open") for g in ("trained", "control")}
    assert rows["teacher", "closed", "control"]["questions"] == 15
    questions, answers = rows_of(the_run.stage("facts") / "exam.jsonl"), rows_of(place / "answers.jsonl")
    assert len(answers) == 20 * 2 * 3
    # nats by hand, in float64
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher").double()
    for answer in answers[:3] + answers[20:23]:
        (question,) = [one for one in questions if one["place"] == answer["place"]]
        before = f"{question['document']}\n\n" if answer["book"] == "open" else ""
        prompt = f"<|im_start|>user\n{before}{question['question']}<|im_end|>\n<|im_start|>assistant\n"
        ids, own = tokenizer(prompt).input_ids, tokenizer(question["answer"]).input_ids
        logs = model(torch.tensor([ids + own])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        nats = -logs.gather(1, torch.tensor(own)[:, None]).mean()
        assert answer["nats"] == pytest.approx(nats.item(), rel=1e-5)
        assert answer["f1"] == token_f1(answer["text"], answer["reference"])
    mean = sum(one["nats"] for one in answers[:5]) / 5
    assert rows["teacher", "closed", "trained"]["nats"] == pytest.approx(mean)
    pairs = {(row["model"], row["group"]): row for row in found["pairs"]}
    assert {*pairs} == {(m, g) for m in ("learn", "control") for g in ("trained", "control")}
    for model_name in ("learn", "control"):
        row = pairs[model_name, "trained"]
        gap = rows["teacher", "closed", "trained"]["nats"] - rows["teacher", "open", "trained"]["nats"]
        after = rows[model_name, "closed", "trained"]["nats"] - rows["teacher", "closed", "trained"]["nats"]
        assert row["nats_difference"] == pytest.approx(after)
        assert row["gap_closed"] == (pytest.approx(-after / gap) if gap > 0 else None)
        assert row["nats_interval"][0] <= after <= row["nats_interval"][1]
    assert {*found["bits_per_byte"]} == {*names}
    page = (place / "exam.md").read_text()
    assert "| learn | trained |" in page
    assert "Bits per byte of the validation text (change from teacher): teacher" in page


def test_a_judge_grades_what_was_written(finished: tuple[Run, Recipe, list[str]], folder: Path, tmp_path: Path) -> None:
    questions = finished[0].stage("facts") / "exam.jsonl"

    def judges(body: dict[str, Any]) -> tuple[str, str]:
        assert "Right answer: " in body["messages"][0]["content"] or body["max_tokens"] == 2
        return ("Grade: 4" if "Ulm" in body["messages"][0]["content"] else "none"), "stop"

    with ChatServer(judges) as server:
        text = f"""\
name: judged
teacher: {folder}/teacher
data: {{train: {{kind: chat, path: {folder}/replay.jsonl}}, sequence_length: 64}}
stages:
  exam: {{questions: "{questions}", max_new_tokens: 3, num_choices: 0, open_book: none, forgetting: false,
    judge: {{server: "{server.address}"}}}}
compute: {{accelerator: cpu}}
logging: {{wandb: disabled}}
"""
        place = run(Recipe.from_text(text), tmp_path / "run", say=lambda line: None).stage("exam")
    for row in rows_of(place / "answers.jsonl"):
        assert row["grade"] == (4 if "Ulm" in row["question"] + row["reference"] else None)
    found = json.loads((place / "exam.json").read_text())["rows"]
    assert [(row["group"], row["grade"]) for row in found] == [("trained", 4.0), ("control", None)]
    silent = text.replace("max_new_tokens: 3, num_choices: 0", "max_new_tokens: 0, num_choices: 3")
    silent = silent.replace('judge: {server: "' + server.address + '"}', "models: [teacher]")
    place = run(Recipe.from_text(silent), tmp_path / "silent", say=lambda line: None).stage("exam")
    found = json.loads((place / "exam.json").read_text())["rows"]
    assert [(row["f1"], row["choice_n"]) for row in found] == [(None, 5), (None, 15)]
    assert [grade_in(said) for said in ("5", "Grade 3.", "10", "it is 2 of 5", "")] == [5, 3, None, 2, None]


def test_rows_are_shown_with_their_reasons(finished: tuple[Run, Recipe, list[str]], tmp_path: Path) -> None:
    place, shown = finished[0].stage("facts"), io.StringIO()
    assert is_data_set(place)
    assert not is_data_set(tmp_path)
    show_rows(place, 2, console=Console(file=shown, width=200))
    assert "dropped by grounded, 1 of" in shown.getvalue()
    assert "stands neither in the document nor in the question" in shown.getvalue()
    assert "exam 1 (trained)" in shown.getvalue()
    assert shown.getvalue().count("\nkept ") == 2
    (tmp_path / "data.json").write_text("{}")
    (tmp_path / "dropped.jsonl").write_text("nothing\n")
    with pytest.raises(InputError, match="no file of rows"):
        show_rows(tmp_path, 1)


def test_choices_are_shuffled_and_their_key_is_checked() -> None:
    answers = ["Red is it.", "Blue is it.", "red is it", "Green is it.", "It is."]
    questions = [Question(f"q{n}?", answer, "d", TRAINED, "p") for n, answer in enumerate(answers)]
    places = set()
    for seed in range(8):
        for question, made in zip(questions, choices_of(questions, 3, seed), strict=True):
            if made is None:
                assert question.answer == "It is."  # whose words every other answer has
                continue
            choices, key = made
            places.add(key)
            assert choices[key] == question.answer
            assert len({one.casefold().rstrip(".") for one in choices}) == 3
            assert made == choices_of(questions, 3, seed)[questions.index(question)]
    assert places == {0, 1, 2}
    assert choices_of(questions[:1], 3, 0) == [None]


class PulledPlug(Exception):
    """Stands for a kill."""


def test_a_training_with_documents_goes_on_bit_for_bit(
    finished: tuple[Run, Recipe, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    the_run, recipe, _ = finished
    shutil.copytree(the_run.folder, tmp_path / "run")
    for name in ("learn", "control", "exam"):
        shutil.rmtree(tmp_path / "run" / name)
    each = recipe.model_copy(update={"compute": recipe.compute.model_copy(update={"checkpoint_every_steps": 1})})
    step = DistillationModule.training_step

    def pulled(self: DistillationModule, batch: Any, index: int) -> Any:
        if self.trainer.global_step == 2:
            raise PulledPlug
        return step(self, batch, index)

    monkeypatch.setattr(DistillationModule, "training_step", pulled)
    with pytest.raises(PulledPlug):
        run(each, tmp_path / "run", only="learn", say=lambda line: None)
    monkeypatch.undo()
    again = run(each, tmp_path / "run", only="learn", say=lambda line: None)
    ours, theirs = (one.stage("learn") / "model" / "model.safetensors" for one in (again, the_run))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_cache_cannot_read_documents(folder: Path) -> None:
    stage = STAGE.format(folder=folder, server="http://127.0.0.1:9/v1")
    text = RECIPE.format(folder=folder, stage=stage + "  cache: {kind: cache_teacher, data: facts}")
    with pytest.raises(RecipeError, match="name its teacher here, whose output is kept in memory"):
        Recipe.from_text(text.replace("teacher: self, lora: {r: 2}", "teacher: cache"))


def test_a_sharded_teacher_cannot_read_documents(folder: Path) -> None:
    text = RECIPE.format(folder=folder, stage=STAGE.format(folder=folder, server="http://127.0.0.1:9/v1"))
    sharded = Recipe.from_text(text, set=["compute.strategy=fsdp"])
    with pytest.raises(InputError, match=r"learn: teacher_reads: document cannot be used with .* fsdp; use ddp"):
        describe(sharded)


def test_the_plan_names_pairs_requests_and_warnings(folder: Path) -> None:
    stage = STAGE.format(folder=folder, server="http://127.0.0.1:9/v1")
    plan = describe(Recipe.from_text(RECIPE.format(folder=folder, stage=stage)))
    assert "knowledge, version 3, 15 pairs" in plan
    assert re.search(r"\b[1-9]\d* chunks, [1-9][\d,]* requests for questions, at most [1-9][\d,]* answers", plan)
    assert "http://127.0.0.1:9/v1 writes; makes qna" in plan


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("data: facts", "data: fakts"), "no earlier stage 'fakts' whose text it could read"),
        (("{facts: 0.8, train: 0.2}", "{fakts: 0.8, train: 0.2}"), "no earlier stage 'fakts' that makes rows"),
        (("teacher: self, lora: {r: 2}, data: facts", "teacher: self, lora: {r: 2}, losses: [hidden_mse, forward_kl]"),
         "hidden_mse compares hidden states position by position"),
        (("num_steps: 3", "num_steps: 3, losses: [cross_entropy]"), "without a loss that reads the teacher"),
        (("min_yield: 0.2", "min_likelihood_gain: 0.1"), "which a server does not tell"),
        (("sequence_length: 256", "sequence_length: 256\n  chat: {learn_from: all}"), "use assistant or last"),
        (("filters: {min_yield: 0.2}", "filters: {judge: true}\n  other: {kind: synthesize, make: rewrite, filters: "
          "{judge: true}}"), "filters.judge has no effect on make: rewrite"),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_their_line(folder: Path, change: tuple[str, str], said: str) -> None:
    text = RECIPE.format(folder=folder, stage=STAGE.format(folder=folder, server="http://127.0.0.1:9/v1"))
    assert change[0] in text
    with pytest.raises(RecipeError, match=said):
        Recipe.from_text(text.replace(*change))


LATE = """\
name: late
teacher: {folder}/teacher
data: {{train: {{kind: chat, path: {folder}/replay.jsonl}}, sequence_length: 64}}
stages:
  said: {{kind: synthesize, make: {make}}}
  {stage}
compute: {{accelerator: cpu}}
logging: {{wandb: disabled}}
"""


@pytest.mark.parametrize(
    ("make", "stage", "said"),
    [
        ("answers", "exam: {questions: said}", "questions: said: make: answers keeps no questions for an exam"),
        ("{kind: qna, path: qna}", "exam: {questions: said}", "its make keeps no questions for an exam; add exam"),
        ("{kind: qna, path: skill, exam: {}}", "exam: {questions: said}", "make.exam: keeps no question out"),
        ("{kind: qna, path: skill, exam: {extra_per_chunk: 2}}", "", "make.exam: keeps no question out"),
        ("answers", "learn: {kind: distill, student: teacher, num_steps: 1, data: said, teacher_reads: document}",
         "teacher_reads: document: the rows of said have no document"),
        ("{kind: qna, path: skill}", "learn: {kind: distill, student: teacher, num_steps: 1, data: said, "
         "teacher_reads: document}", "teacher_reads: document: the rows of said have no document"),
    ],
)  # fmt: skip
def test_what_would_fail_late_is_refused_by_check(
    folder: Path, tmp_path: Path, make: str, stage: str, said: str
) -> None:
    seeds = "".join(f"  - {{question: Say {n}, answer: It is {n}}}\n" for n in range(3))
    (tmp_path / "skill.yaml").write_text(f"created_by: me\nseed_examples:\n{seeds}")
    make = make.replace("path: skill", f"path: {tmp_path}/skill.yaml").replace("path: qna", f"path: {folder}/qna.yaml")
    with pytest.raises(InputError, match=said):
        describe(Recipe.from_text(LATE.format(folder=folder, make=make, stage=stage)))


def test_a_writer_without_a_key_or_a_template_is_found_before_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    stage = STAGE.format(folder=folder, server="http://127.0.0.1:9/v1").replace(
        "max_wait", "key_variable: NO_SUCH_KEY, max_wait"
    )
    recipe = Recipe.from_text(RECIPE.format(folder=folder, stage=stage))
    assert "the environment has no NO_SUCH_KEY; export it, before the run" in describe(recipe)
    context = StageContext(session_of(folder, tmp_path), "facts", tmp_path, "")
    with pytest.raises(InputError, match="has no NO_SUCH_KEY"):
        recipe.stages["facts"].rehearse(context)
    shutil.copytree(folder / "teacher", tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    writes = Recipe.from_text(LATE.format(folder=folder, make=f"answers, writer: {tmp_path}/plain", stage=""))
    with pytest.raises(InputError, match="plain has no chat template"):
        writes.stages["said"].rehearse(context)


def test_a_template_of_the_recipe_is_not_that_of_another_writer(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(chats.PLAIN.replace("<|im_start|>' + m.role", "<|im_start|>of the recipe ' + m.role"))
    session = session_of(folder, tmp_path)
    session.data = session.data.model_copy(update={"chat": ChatSpec(template=str(file))})
    shutil.copytree(folder / "teacher", tmp_path / "other")
    assert "of the recipe" in writer_tokenizer(session, "teacher").chat_template
    assert writer_tokenizer(session, str(tmp_path / "other")).chat_template == chats.PLAIN


def test_a_low_yield_stops_and_shows_what_was_written(folder: Path, tmp_path: Path) -> None:
    with ChatServer(lambda body: ("I cannot read.", "length")) as server:
        stage = STAGE.format(folder=folder, server=server.address).replace("0.2}", "0.9}")
        text = RECIPE.format(folder=folder, stage=stage)
        with pytest.raises(InputError) as error:
            run(Recipe.from_text(text), tmp_path / "run", only="facts", say=lambda line: None)
    assert "filters.min_yield is 0.9" in str(error.value)
    assert "raw: 'I cannot read.'" in str(error.value)


MAKERS = {
    "answers": "{kind: answers, num_samples: 2, temperature: 1.0, num_prompts: 5, max_new_tokens: 120}",
    "rewrite": "{kind: rewrite, num_versions: 3, max_new_tokens: 120, chunk_words: 20}",
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_model_writes_the_same_rows_after_a_kill(folder: Path, tmp_path: Path, kind: str) -> None:
    filters = "{min_yield: 0, duplicates: false, grounded: false, answer_words: [0, 400]}"
    train = (
        f"{{kind: jsonl, path: {folder}/text.jsonl}}" if kind == "rewrite" else "{kind: chat, path: %s/replay.jsonl}"
    )
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in DOCUMENT.split("\n\n")))
    text = f"""\
name: write
teacher: {folder}/teacher
data: {{train: {train.replace("%s", str(folder))}, sequence_length: 64}}
stages:
  made: {{kind: synthesize, make: {MAKERS[kind]}, batch_size: 4, filters: {filters}}}
compute: {{accelerator: cpu}}
logging: {{wandb: disabled}}
"""
    recipe = Recipe.from_text(text)
    found = []
    for name in ("whole", "killed"):
        place = run(recipe, tmp_path / name, say=lambda line: None).stage("made")
        found.append((place / "replies" / "replies-00000.jsonl", place / "data.json", place / "dropped.jsonl"))
    whole, killed = found
    assert whole[0].read_bytes() == killed[0].read_bytes()
    rows = [*rows_of(whole[2]), *(row for f in (whole[0].parent.parent / "data").glob("*") for row in rows_of(f))]
    assert len(rows) == {"answers": 5, "rewrite": 15}[kind]  # of six texts one validates
    assert len(rows) > len(rows_of(whole[2]))  # some are kept
    # a kill after some rows, in the middle of a line
    lines = killed[0].read_bytes().splitlines(keepends=True)
    killed[0].write_bytes(b"".join(lines[:5]) + lines[5][:9])
    (killed[0].parent.parent / "DONE").unlink()
    run(recipe, tmp_path / "killed", say=lambda line: None)
    assert sorted(killed[0].read_bytes().splitlines()) == sorted(whole[0].read_bytes().splitlines())
    assert killed[2].read_bytes() == whole[2].read_bytes()


def session_of(folder: Path, place: Path) -> Session:
    """That of a run which reads conversations."""
    train = f"{{kind: chat, path: {folder}/replay.jsonl}}"
    recipe = Recipe.from_text(TEXTS.format(folder=folder, train=train, server="http://x/v1", make="{kind: answers}"))
    return Session(
        run=Run(place), recipe="write", text="", teacher=recipe.teacher, data=recipe.data, compute=recipe.compute,
        logging=recipe.logging, seed=0, stages=recipe.stages, command="", say=lambda line: None,
    )  # fmt: skip


def made_by(folder: Path, place: Path, stage: str) -> Path:
    """The folder of a stage that alone is run."""
    text = f"""\
name: write
teacher: {folder}/teacher
data: {{train: {{kind: chat, path: {folder}/replay.jsonl}}, sequence_length: 64}}
stages:
  made: {{kind: synthesize, {stage}}}
compute: {{accelerator: cpu}}
logging: {{wandb: disabled}}
"""
    return run(Recipe.from_text(text), place, say=lambda line: None).stage("made")


def test_a_batch_has_one_temperature_and_one_length(folder: Path, tmp_path: Path) -> None:
    session = session_of(folder, tmp_path)
    writer = LocalWriter(StageContext(session, "made", tmp_path, ""), "teacher", 4)
    mixed = [asked(f"Say {n}", length, heat, copy) for n in range(3) for length, heat, copy in
             ((8, 0.0, 0), (8, 1.5, 1), (5, 0.0, 2), (12, 1.5, 3))]  # fmt: skip
    every = dict(pair for made in writer.write(mixed, {one.id for one in mixed}) for pair in made)
    assert [one.id for one in mixed if one.id in every] == [one.id for one in mixed]
    for length, heat in ((8, 0.0), (8, 1.5), (5, 0.0), (12, 1.5)):
        some = [one for one in mixed if (one.max_new_tokens, one.temperature) == (length, heat)]
        alone = dict(pair for made in writer.write(some, {one.id for one in some}) for pair in made)
        assert {one.id: every[one.id] for one in some} == alone
        assert all((reply.new_tokens or 0) <= length for reply in alone.values())
    greedy, sampled = (every[mixed[k].id].text for k in (0, 1))
    assert greedy != sampled


def test_likelihoods_are_kept_and_computed_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = StageContext(session_of(folder, tmp_path), "made", tmp_path / "made", "")
    writer = LocalWriter(context, "teacher", 1)  # blocks of eight
    given = [LikelihoodRequest(({"role": "user", "content": "Say " * (n % 5)},), f"It is {n}") for n in range(20)]
    given.append(given[3])
    computed: list[int] = []

    def counting(model: Any, pairs: Any, **more: Any) -> Any:
        computed.append(len(pairs))
        if sum(computed) == 16 + 4 and not list(tmp_path.glob("again")):
            raise PulledPlug
        return log_likelihoods(model, pairs, **more)

    monkeypatch.setattr(local_writer, "log_likelihoods", counting)
    with pytest.raises(PulledPlug):
        Asker(context, writer, Replies(context.folder, "w")).likelihoods(given)
    assert computed == [8, 8, 4]
    file = context.folder / "replies" / "likelihoods.jsonl"
    with file.open("ab") as stream:
        stream.write(b'{"id": "half')
    (tmp_path / "again").touch()
    computed.clear()
    found = Asker(context, writer, Replies(context.folder, "w")).likelihoods(given)
    assert computed == [4]
    whole = Asker(context, writer, Replies(tmp_path / "whole", "w")).likelihoods(given)
    assert found == whole
    assert found[3] == found[-1]
    assert len(file.read_text().splitlines()) == 20


def test_documents_beyond_the_context_are_dropped_and_counted(folder: Path, tmp_path: Path) -> None:
    context = StageContext(session_of(folder, tmp_path), "made", tmp_path / "made", "")
    asker = Asker(context, LocalWriter(context, "teacher", 4), Replies(context.folder, "w"))
    said = ({"role": "user", "content": "When was the bridge built?"},)
    rows = [Candidate(said, "In 1912.", "It was built in 1912. " * times) for times in (1, 60)]
    spec = FiltersSpec(duplicates=False, min_likelihood_gain=-100)
    kept, dropped = filtered(rows, spec, [], asker)
    assert [one.document for one in kept] == [rows[0].document]
    assert [(one.filter, "longer than the writer's context" in one.why) for one in dropped] == [("likelihood", True)]
    # and in the exam
    model, tokenizer = load_model(str(folder / "teacher")), load_tokenizer(str(folder / "teacher"))
    lm = ModelInMemory(model.eval(), tokenizer, chat=ChatSpec(), batch_tokens=2048)
    questions = [Question("When?", "In 1912.", row.document, TRAINED, "q") for row in rows]
    stage = Exam(questions="made", num_choices=0, max_new_tokens=2)
    for book, cut in ((CLOSED, [False, False]), (OPEN, [False, True])):
        answers = _sit(stage, lm, questions, book, 0)
        assert [one.is_cut for one in answers] == cut
        row = row_of("m", book, TRAINED, answers)
        assert row["cut"] == sum(cut)
        assert bool(_cut([row])) == any(cut)


def test_a_stage_that_is_not_finished_says_so(tmp_path: Path) -> None:
    (tmp_path / "facts" / "replies").mkdir(parents=True)
    with pytest.raises(InputError, match="facts: this stage is not finished"):
        show_named(str(tmp_path / "facts"), [], None, 2, 0, None)


def test_the_likeliest_of_several_answers_is_kept(folder: Path, tmp_path: Path) -> None:
    make = "{kind: answers, num_samples: 4, temperature: 1.5, num_prompts: 4, max_new_tokens: 160}"
    place = made_by(folder, tmp_path / "run", f"make: {make}, filters: {{min_yield: 0, answer_words: [0, 900]}}")
    rows = [*rows_of(place / "data" / "rows-00000.jsonl"), *rows_of(place / "dropped.jsonl")]
    assert len(rows) == 4
    replies = {one["id"]: one for one in rows_of(place / "replies" / "replies-00000.jsonl")}
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher").double()
    for row in rows:
        *asked, answer = row["messages"]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        several = [replies[Request(tuple(asked), 160, 1.5, copy).id] for copy in range(4)]
        finished = [one for one in several if one["finish"] == "stop" and one["text"]] or several
        likely = {}
        for one in finished:
            own = tokenizer(one["text"] or " ", add_special_tokens=False).input_ids
            logs = model(torch.tensor([ids + own])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            likely[one["text"]] = logs.gather(1, torch.tensor(own)[:, None]).mean().item()
        assert answer["content"] == max(likely, key=lambda text: likely[text])
        assert row["log_probability"] == pytest.approx(likely[answer["content"]], abs=1e-3)


def test_the_document_must_make_an_answer_likelier(folder: Path, tmp_path: Path) -> None:
    make = f"{{kind: qna, path: {folder}/qna.yaml, views: [text], max_new_tokens: 4}}"
    gains = []
    for number, least in enumerate((-100.0, 0.0)):
        filters = f"{{min_yield: 0, min_likelihood_gain: {least}}}"
        place = made_by(folder, tmp_path / str(number), f"make: {make}, filters: {filters}")
        gains.append([row["likelihood_gain"] for row in rows_of(place / "data" / "rows-00000.jsonl")])
    assert len(gains[0]) == 15  # the seed pairs
    assert gains[1] == [gain for gain in gains[0] if gain >= 0]
    assert 0 < len(gains[1]) < 15
    assert {row["filter"] for row in rows_of(place / "dropped.jsonl")} >= {"likelihood"}


def test_a_judge_drops_rows_and_a_skill_has_no_document(folder: Path, tmp_path: Path) -> None:
    def judges(body: dict[str, Any]) -> tuple[str, str]:
        said = body["messages"][-1]["content"]
        if "Judge a question" in said:
            return ("yes, yes, no" if "Who built bridge 3" in said else "Yes. Yes. Yes."), "stop"
        return knows_bridges(body)

    with ChatServer(judges) as server:
        writer = f'writer: {{server: "{server.address}"}}, filters: {{min_yield: 0, judge: true}}'
        make = f"make: {{kind: qna, path: {folder}/qna.yaml, views: [text], questions_per_view: 3}}"
        place = made_by(folder, tmp_path / "judge", f"{make}, {writer}")
    judged = [row for row in rows_of(place / "dropped.jsonl") if row["filter"] == "judge"]
    assert [row["messages"][0]["content"] for row in judged] == ["Who built bridge 3 of Ulm?"]

    seeds = "".join(f"  - {{question: Say {n} backwards, answer: It is {n}{n}}}\n" for n in range(3))
    (tmp_path / "skill.yaml").write_text(f"created_by: me\nseed_examples:\n{seeds}")

    def talks(body: dict[str, Any]) -> tuple[str, str]:
        said = body["messages"][-1]["content"]
        if "new questions of this kind" in said:
            return "1. Say 7 backwards\n2. Say 8 backwards", "stop"
        assert [one["role"] for one in body["messages"]] == [*["user", "assistant"] * 3, "user"]
        return f"It is {said.split()[1] * 2}", "stop"

    with ChatServer(lambda body: ("Yes.", "stop") if len(body["messages"]) == 1 and "kind" not in
                    body["messages"][0]["content"] else talks(body)) as server:  # fmt: skip
        probe = f'writer: {{server: "{server.address}"}}, filters: {{min_yield: 0}}'
        place = made_by(folder, tmp_path / "skill", f"make: {{kind: qna, path: {tmp_path}/skill.yaml}}, {probe}")
    rows = rows_of(place / "data" / "rows-00000.jsonl")
    said = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows}
    assert said["Say 7 backwards"] == "It is 77"
    assert len(said) == 5
    assert not any("document" in row for row in rows)


def test_filters_in_their_order() -> None:
    document = "The Kiel bridge was built in 1912-1913 (9:30-17:00) by Anna Berg."

    def row(question: str, answer: str, **more: Any) -> Candidate:
        return Candidate(({"role": "user", "content": question},), answer, document, "d#0", **more)

    exam = [Question("Who built the Kiel bridge of 1912?", "Anna Berg.", document, TRAINED, "q:1")]
    rows = [
        row("When was the Kiel bridge built?", "It was built in 1912 from 9:30 on."),
        row("When was it built, the bridge?", "It was cut", finish="length"),
        row("When was it built, and where?", "x y", flaw="no question"),
        row("When was <placeholder> built then?", "In 1912.", is_invented=True),
        row("When then?", "In 1912."),
        row("What does the text say about it?", "That it is old."),
        row("when was the kiel  bridge built", "In 1912."),
        row("Who was the builder of the Kiel bridge of 1912?", "Anna Berg"),
        row("Which year saw the bridge finished?", "It was 1914."),
        row("Which person finished the bridge?", "It was Maria Berg."),
        row("Was the Kiel bridge built?", "Yes, the Kiel bridge was."),
    ]
    spec = FiltersSpec(max_per_chunk=1)
    kept, dropped = filtered(rows, spec, exam, None)  # type: ignore[arg-type]
    assert [one.question for one in kept] == ["When was the Kiel bridge built?"]
    names = [one.filter for one in dropped]
    assert names == ["finished", "parsed", "parsed", "length", "refers", "duplicate", "exam", "grounded", "grounded",
                     "cap"]  # fmt: skip
    assert counts(dropped) == {"finished": 1, "parsed": 2, "length": 1, "refers": 1, "duplicate": 1, "exam": 1,
                               "grounded": 2, "cap": 1}  # fmt: skip


def test_texts_made_from_documents_are_no_questions() -> None:
    rows = [Candidate((), f"The bridge of 19{n}0 stands.", f"In 19{n}0 the bridge rose.", "d#0") for n in range(3)]
    kept, dropped = filtered(rows, FiltersSpec(), [], None)  # type: ignore[arg-type]
    assert kept == rows, dropped


TEXTS = """\
name: write
teacher: {folder}/teacher
data:
  train: {train}
  sequence_length: 64
  held_out: 0.3
  clean: {{duplicates: exact}}
stages:
  made: {{kind: synthesize, make: {make}, writer: {{server: "{server}"}}}}
  learn: {{kind: finetune, model: teacher, num_steps: 1, data: made}}
  mixed: {{kind: finetune, model: teacher, num_steps: 1, data: {{mixture: {{made: 0.5, train: 0.5}}}}}}
compute: {{accelerator: cpu}}
logging: {{wandb: disabled}}
"""


@pytest.mark.parametrize("kind", ["rewrite", "answers"])
def test_what_validates_is_not_shown_to_a_writer(folder: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"Town {n % 16} is old."}) for n in range(20)))
    train = f"{{kind: jsonl, path: {tmp_path}/text.jsonl}}"
    if kind == "answers":
        rows = [json.dumps({"prompt": f"Town {n % 16} is old.", "response": f"Yes {n}"}) for n in range(20)]
        (tmp_path / "chat.jsonl").write_text("\n".join(rows))
        train = f"{{kind: chat, path: {tmp_path}/chat.jsonl}}"
    with ChatServer(lambda body: (f"The old {re.findall(r'Town [0-9]+|$', body['messages'][0]['content'])[0]}.", "stop")
                    ) as server:  # fmt: skip
        text = TEXTS.format(folder=folder, train=train, server=server.address, make=f"{{kind: {kind}}}")
        recipe = Recipe.from_text(text)
        place = run(recipe, tmp_path / "run", only="made", say=lambda line: None).stage("made")
        shown = [body["messages"][0]["content"].splitlines()[-1] for body in server.bodies[1:]]
    seen = [item.text for item in Split(recipe.data).validation() if not isinstance(item, Rejected)]
    hidden = {one.split("Town ")[1].split(" ")[0] for one in seen}
    asked = {one.split("Town ")[1].split(" ")[0] for one in shown}
    assert hidden
    assert asked | hidden == {str(n) for n in range(16)}
    assert not asked & hidden
    made = rows_of(place / "data" / "rows-00000.jsonl")
    assert len(made) == len(asked)  # of versions in equal words the first is kept
    for name in ("learn", "mixed"):
        assert data_of(recipe.stages, recipe.data, name).held_out == 0.3


def test_views_and_questions_that_are_not_finished_are_dropped_and_counted(folder: Path, tmp_path: Path) -> None:
    shown: list[str] = []

    def answer(body: dict[str, Any]) -> tuple[str, str]:
        said = body["messages"][-1]["content"]
        if "List the facts" in said:
            return {"1": ("Bridge 1 is", "length"), "2": ("", "stop")}.get(
                said.split()[1], ("Facts: it stands.", "stop")
            )
        if "different questions" in said:
            shown.append(said)
            is_filtered = said.startswith("Bridge 3")
            return "What is the bridge of Ulm?\nWho is", "content_filter" if is_filtered else "length"
        return "It is Kiel.", "stop"

    with ChatServer(answer) as server:
        writer = (
            f'writer: {{server: "{server.address}"}}, filters: {{min_yield: 0, duplicates: false, grounded: false}}'
        )
        make = f"make: {{kind: qna, path: {folder}/qna.yaml, views: [facts, text], chunk_words: 20}}"
        place = made_by(folder, tmp_path / "run", f"{make}, {writer}")
    asked_of = [said.splitlines()[0] for said in shown]
    assert sum(one.startswith("Facts") for one in asked_of) == 4
    assert sum(one.startswith(("Bridge 1", "Bridge 2")) for one in asked_of) == 2  # by the text, never by a lost view
    why = [(row["filter"], row["source"][-2:], row["why"]) for row in rows_of(place / "dropped.jsonl")]
    assert sorted(why) == [
        ("finished", "#0", "the reply ended by length"),
        ("finished", "#2", "the reply ended by content_filter"),
        ("parsed", "#1", "the view facts of the chunk is empty"),
    ]
    kept = rows_of(place / "data" / "rows-00000.jsonl")
    assert len([row for row in kept if row["view"] in ("facts", "text")]) == 9  # 12 views, 2 lost, and 1 reply lost
    assert questions_in(Reply("Who is A then?", "abort")) == lines_in(Reply("Say one\nSay two", "abort")) == []


def test_documents_of_several_files_are_found_by_their_patterns(folder: Path, tmp_path: Path) -> None:
    for name in ("ulm", "bonn"):
        (tmp_path / f"{name}.md").write_text(DOCUMENT.replace("Ulm", name.title()))
        text = QNA.replace("Ulm", name.title()).replace("bridges.md", f"{name}.md")
        (tmp_path / f"{name}.yaml").write_text(text)
    paths = [str(tmp_path / f"{name}.yaml") for name in ("ulm", "bonn")]
    (tmp_path / "more.md").write_text(DOCUMENT)
    named = [str(tmp_path / f"{name}.md") for name in ("bonn", "ulm")]

    class Writes:
        """Says that it has no question, and keeps what it was shown."""

        def __init__(self) -> None:
            self.shown: list[str] = []

        def ask(self, what: str, requests: list[Request]) -> list[Reply]:
            self.shown += [str(one.messages[-1]["content"]) for one in requests]
            return [Reply("none", "stop") for _ in requests]

    writer = Writes()
    Qna(path=paths, documents=named, views=["text"]).make(writer, [], 0)  # type: ignore[arg-type]
    towns = [set(re.findall("Ulm|Bonn", said)) for said in writer.shown]
    assert len(towns) > 1
    assert all(len(found) == 1 for found in towns)  # the examples of a town stand with its own document
    with pytest.raises(InputError, match=r"more\.md matches document.patterns of no qna.yaml"):
        Qna(path=paths, documents=[*named, str(tmp_path / "more.md")]).check()
    with pytest.raises(InputError, match=r"none matches document.patterns of .*bonn\.yaml"):
        Qna(path=paths, documents=named[1:]).check()
    assert len(Qna(path=paths[:1], documents=str(tmp_path / "more.md")).check()) > 1  # one file has them all


def test_prompts_and_answers_of_the_user_are_not_taken_for_placeholders() -> None:
    said = [("What are the next questions?", "A tag such as <b> follows ..."), ("Show <name>", "+")]
    rows = [Candidate(({"role": "user", "content": asks},), answer, source="p") for asks, answer in said]
    rows.append(Candidate(({"role": "user", "content": "Nothing"},), " ", source="p"))
    kept, dropped = filtered(rows, FiltersSpec(), [], None)  # type: ignore[arg-type]
    assert kept == rows[:2]
    assert [one.why for one in dropped] == ["it is empty"]
    kept, dropped = filtered([replace(row, is_invented=True) for row in rows], FiltersSpec(), [], None)  # type: ignore[arg-type]
    assert [one.filter for one in dropped] == ["parsed"] * 3


def test_numbers_names_questions_and_overlap() -> None:
    assert numbers_of("1897-1912, 9:30-17:00, 3/4 and 1,200.5") == {"1897", "1912", "9", "30", "17", "00", "3", "4",
                                                                     "1200.5"}  # fmt: skip
    assert numbers_right("It opened in 1897.", "1897-1912") == 0.5
    assert numbers_of("In 1,200 or 3.5 and 2001") == {"1200", "3.5", "2001"}
    assert names_of("It was Anna. Then Berg's house") == {"anna", "berg"}
    assert questions_in(Reply("1. Who is A?\n- What is B? It is c.\nnone\n3) Why", "length")) == [
        "Who is A?", "What is B?",
    ]  # fmt: skip
    assert token_f1("built in 1912", "It was built in 1912") == pytest.approx(2 * 3 / 8)
    assert token_f1("no", "yes") == 0
    assert numbers_right("1912 or 13", "1912 and 14") == 0.5
    assert numbers_right("a", "b") is None
