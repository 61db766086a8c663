"""Tasks in whole runs: asked, kept, compared, required and reported."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from distill.core.errors import InputError, NotReached, RecipeError
from distill.evaluation.tasks import MultipleChoice
from distill.forecast import describe
from distill.recipe import Recipe
from distill.runner import run
from distill.training.metrics import read_rows

RECIPE = """\
name: tiny
teacher: {teacher}
data:
  train: {{kind: jsonl, path: {text}}}
  sequence_length: 32
  validation_tokens: 200
require: {require}
stages:
  distill:
    student: teacher
    weights: random
    num_steps: 8
    batch_size: 2
    validate_every_steps: 1
    evaluate_every:
      num_steps: 3
      tasks:
        words: {{kind: multiple_choice, path: {questions}, limit: 4}}
        last: {{kind: cloze, path: {questions}, prompt: "{{text}}", answer: null}}
  control: {{kind: finetune, model: teacher, weights: random, num_steps: 1, batch_size: 2}}
  evaluate:
    controls: [control]
    speed: null
    tasks:
      words: {{kind: multiple_choice, path: {questions}, limit: 12, few_shot: 1}}
      last: {{kind: cloze, path: {questions}, prompt: "{{text}}", answer: null}}
      said: {{kind: generate, path: {questions}, prompt: "{{query}}", answer: text, max_new_tokens: 2, limit: 4}}
  report: {{prompts: []}}
compute: {{accelerator: cpu}}
logging: {{wandb: disabled}}
"""

SHORT = RECIPE[: RECIPE.index("  distill:\n")] + RECIPE[RECIPE.index("  evaluate:") : RECIPE.index("  report:")]
SHORT = SHORT.replace("controls: [control]", "controls: ['{other}']") + RECIPE[RECIPE.index("compute:") :]
"""Two models from outside, and nothing that takes long."""


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("questions") / "q.jsonl"
    words = ["row", "text", "model", "words"]
    rows = [
        {"query": f"a {words[i % 4]}", "choices": words, "gold": i % 4, "text": f"the text of {words[i % 4]}"}
        for i in range(16)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe(teacher: Path, text: Path, questions: Path, require: str = "{}") -> Recipe:
    return Recipe.from_text(RECIPE.format(teacher=teacher, text=text, questions=questions, require=require))


@pytest.fixture
def short(teacher: Path, text: Path, tmp_path: Path, new_teacher: Any) -> Any:
    """(questions) -> a recipe that asks the teacher and another model."""
    other = new_teacher(tmp_path / "other", 3)
    return lambda file: Recipe.from_text(
        SHORT.format(teacher=teacher, other=other, text=text, questions=file, require="{}")
    )


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What the run of ``done`` has printed."""
    return []


@pytest.fixture(scope="module")
def done(teacher: Path, text: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory, said: list[str]) -> Any:
    folder = tmp_path_factory.mktemp("tasks") / "run"
    return run(recipe(teacher, text, questions), folder, say=said.append)


def test_every_answer_is_kept_and_the_scores_are_theirs(done: Any) -> None:
    found = json.loads((done.stage("evaluate") / "tasks.json").read_text())
    scores = {(one["model"], one["task"]): one for one in found["scores"]}
    assert {model for model, _ in scores} == {"teacher", "distill", "control"}
    for (model, task), score in scores.items():
        kept = json.loads((done.stage("evaluate") / "tasks" / task / f"{model}.json").read_text())
        assert score["items"] == len(kept["answers"]) == {"words": 12, "last": 16, "said": 4}[task]
        assert score["accuracy"] == sum(one["right"] for one in kept["answers"]) / score["items"]
    assert scores["teacher", "words"]["chance"] == 0.25
    assert "tasks/words/teacher.json" in done.done("evaluate").files  # sealed with everything else
    pairs = {(one["first"], one["second"], one["task"]) for one in found["pairs"]}
    assert {("teacher", "distill", "words"), ("teacher", "control", "last"), ("control", "distill", "said")} <= pairs


def test_the_report_shows_them(done: Any) -> None:
    folder = done.stage("report")
    page, markdown = (folder / "index.html").read_text(), (folder / "report.md").read_text()
    for text in (page, markdown):
        assert "no difference shown" in text
        assert "p (Holm)" in text
    assert "distill on tasks: words " in markdown
    assert "distill beside control: words " in markdown
    with (folder / "tasks.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 9
    assert len((folder / "pairs.csv").read_text().splitlines()) == 1 + 9


def test_runs_are_compared_with_their_scores(done: Any, tmp_path: Path) -> None:
    from distill.compare import report_runs

    other = tmp_path / "other"
    shutil.copytree(done.folder, other)
    _, page = report_runs([done.folder, other], tmp_path / "both")
    with (page.parent / "tasks.csv").open() as stream:
        models = {row["model"] for row in csv.DictReader(stream)}
    assert models == {"teacher", "run/distill", "run/control", "other/distill", "other/control"}


def test_a_curve_of_accuracy_stands_beside_the_loss(done: Any, teacher: Path, questions: Path) -> None:
    rows = [row for row in read_rows(done.stage("distill")) if "task/words" in row]
    assert [row["step"] for row in rows] == [3, 6, 8]  # every third step, and the last one
    kept = json.loads((done.stage("evaluate") / "tasks" / "last" / "distill.json").read_text())["answers"]
    assert rows[-1]["task/last"] == sum(one["right"] for one in kept) / len(kept)  # the model that was written
    assert "accuracy on words" in (done.stage("report") / "index.html").read_text()
    assert (done.stage("report") / "plots" / "curve_distill_task_words.png").is_file()


def test_what_is_left_of_a_training_is_forecast(done: Any, said: list[str]) -> None:
    printed = [line.strip() for line in said if "forecast of" in line]
    number = r"\d+\.\d{3}"
    between = rf"{number} \({number} to {number}\)"
    assert re.fullmatch(
        rf"distill: KL divergence {number} at step 5; forecast of the end, step 8: {between}", printed[0]
    )
    last = (
        rf"distill: KL divergence {number} at step 8; forecast of longer trainings, 2 times the steps: {between}, "
        rf"4 times the steps: {between}"
    )
    assert re.fullmatch(last, printed[-1])
    page = (done.stage("report") / "index.html").read_text()
    assert "What longer training would bring" in page
    assert "4 times as many" in page


def test_asking_changes_no_weight(done: Any, teacher: Path, text: Path, questions: Path, tmp_path: Path) -> None:
    plan = Recipe.from_text(
        RECIPE.format(teacher=teacher, text=text, questions=questions, require="{}"),
        set=["stages.distill.evaluate_every=null"],
    )
    other = run(plan, tmp_path / "run", only="distill", say=lambda _: None)
    files = [one.stage("distill") / "model" / "model.safetensors" for one in (done, other)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_was_asked_before_a_kill_is_not_asked_again(
    short: Any, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    ask = MultipleChoice.ask

    def counted(self: MultipleChoice, lm: Any, name: str) -> Any:
        asked.append(name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ask(self, lm, name)

    monkeypatch.setattr(MultipleChoice, "ask", counted)
    plan = short(questions)
    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path / "run", say=lambda _: None)
    done = run(plan, tmp_path / "run", say=lambda _: None)
    assert len(asked) == 3  # the teacher had answered
    assert not (done.stage("evaluate") / "checkpoints").exists()
    rows = json.loads((done.stage("evaluate") / "rows.json").read_text())
    assert [row["role"] for row in rows] == ["teacher", "control"]  # a control that `models` does not name, too
    again = run(plan, tmp_path / "run", start="evaluate", say=lambda _: None)  # forgotten on purpose
    assert len(asked) == 5
    assert again.done("evaluate").figures == done.done("evaluate").figures


def test_other_questions_are_asked_again(short: Any, questions: Path, tmp_path: Path) -> None:
    own = tmp_path / "q.jsonl"
    own.write_bytes(questions.read_bytes())
    plan = short(own)
    first = run(plan, tmp_path / "run", say=lambda _: None).done("evaluate")
    assert run(plan, tmp_path / "run", say=lambda _: None).done("evaluate").made == first.made
    own.write_text(own.read_text().replace("a row", "one row"))
    said: list[str] = []
    assert run(plan, tmp_path / "run", say=said.append).done("evaluate").made != first.made
    assert any("its inputs have changed" in line for line in said)


def test_a_requirement_that_is_missed_ends_the_run_when_all_is_saved(
    done: Any, teacher: Path, text: Path, questions: Path
) -> None:
    require = '{perplexity: "<= 0.5 of teacher", words: ">= 0", control/last: "> 100 %", words.recovery: ">= 0.9"}'
    with pytest.raises(NotReached) as caught:
        run(recipe(teacher, text, questions, require), done.folder, say=lambda _: None)
    lines = str(caught.value).splitlines()
    assert caught.value.exit_code == 3
    assert [line.split(":")[0] for line in lines] == [
        "require.perplexity",
        "require.control/last",
        "require.words.recovery",
    ]
    assert "<= 0.5 of teacher is not reached: distill has" in lines[0]
    assert "recovery of distill was not measured" in lines[2]  # as the teacher is not above chance
    said: list[str] = []
    run(recipe(teacher, text, questions, '{words: ">= 0"}'), done.folder, say=said.append)
    assert said[-1] == "required and reached: words"
    assert all("finished before" in line for line in said if line.startswith("["))  # a bound makes nothing anew


@pytest.mark.parametrize(
    ("require", "line"),
    [
        ('{words: "at least 0.9"}', "is no bound; write a comparison, a number"),
        ('{wrods: ">= 0.9"}', "nothing measures 'wrods'.*did you mean 'words'"),
        ('{words: ">= 0.9 of taecher"}', "no model 'taecher' is measured in this recipe.*did you mean 'teacher'"),
        ('{int4/words: ">= 0.9"}', "no model 'int4' is measured in this recipe"),
        ('{words.recovery: ">= 0.9 of teacher"}', "recovery is of the teacher already"),
        ('{decode_tokens_per_s: ">= 1"}', "nothing measures 'decode_tokens_per_s'"),
        ('{words.acc: ">= 0.9"}', r"nothing measures 'words.acc'.*TASK\.recovery"),
    ],
)
def test_check_refuses_what_cannot_be_required(
    require: str, line: str, teacher: Path, text: Path, questions: Path
) -> None:
    with pytest.raises(RecipeError, match=line):
        recipe(teacher, text, questions, require)


def test_one_name_is_of_one_task(teacher: Path, text: Path, questions: Path) -> None:
    words = "{{words: {{kind: multiple_choice, path: {questions}, limit: 6}}}}"
    more = f"  again: {{{{kind: evaluate, speed: null, tasks: {words}}}}}\n"
    plan = RECIPE.replace("  report:", more + "  report:")
    with pytest.raises(RecipeError, match=r"again\.tasks\.words: stage evaluate asks other questions by"):
        Recipe.from_text(plan.format(teacher=teacher, text=text, questions=questions, require="{}"))


def test_check_says_what_is_asked_and_misses_files(teacher: Path, text: Path, questions: Path) -> None:
    plan = describe(recipe(teacher, text, questions, '{words: ">= 0.9 of teacher"}'))
    assert "asks words (multiple_choice, 12 questions)" in plan
    assert "requires words >= 0.9 of teacher" in plan
    with pytest.raises(RecipeError, match=r"stages.evaluate: tasks.words: /nowhere.jsonl: no such file"):
        describe(recipe(teacher, text, Path("/nowhere.jsonl")))


def test_a_task_is_not_called_as_a_column(teacher: Path, text: Path, questions: Path) -> None:
    with pytest.raises(RecipeError, match="perplexity is the name of a column"):
        Recipe.from_text(
            RECIPE.format(teacher=teacher, text=text, questions=questions, require="{}").replace(
                "words:", "perplexity:"
            )
        )


def test_prompts_longer_than_a_model_s_positions_are_refused_before_the_run(
    teacher: Path, text: Path, questions: Path
) -> None:
    plan = RECIPE.replace("speed: null", "speed: {{contexts: [100000]}}")
    with pytest.raises(RecipeError, match=r"speed\.contexts: 100,000 tokens and 64 new ones are more than the .* of"):
        describe(Recipe.from_text(plan.format(teacher=teacher, text=text, questions=questions, require="{}")))


def test_an_export_is_not_required_to_answer_what_only_transformers_is_asked(
    teacher: Path, text: Path, questions: Path
) -> None:
    plan = RECIPE.replace("  evaluate:\n", "  onnx: {{kind: export, model: distill, target: onnx}}\n  evaluate:\n", 1)
    plan = plan.replace(
        "    speed: null\n    tasks:\n", "    speed: null\n    tasks:\n      arc_easy: {{kind: lm_eval}}\n"
    )
    with pytest.raises(RecipeError, match="onnx is an export, and lm-evaluation-harness asks models in transformers"):
        Recipe.from_text(
            plan.format(teacher=teacher, text=text, questions=questions, require='{onnx/arc_easy: ">= 0.3"}')
        )


def test_models_of_other_chat_templates_are_refused_before_the_run(
    teacher: Path, text: Path, questions: Path, tmp_path: Path
) -> None:
    plan = Recipe.from_text(
        RECIPE.format(teacher=teacher, text=text, questions=questions, require="{}"),
        set=["stages.evaluate.tasks.words.chat_template=true"],
    )
    with pytest.raises(InputError, match="the run's tokenizer has no chat template"):
        run(plan, tmp_path / "run", say=lambda _: None)
