"""A mixture through every stage, and stages that read a text of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.core.errors import InputError, RecipeError
from distill.core.run_folder import Run
from distill.forecast import describe
from distill.recipe import Recipe
from distill.reporting.tradeoff import Row, read_rows
from distill.runner import run
from distill.stages.text import data_of
from tests.data import chats
from tests.stages.test_chat import conversations, make_model

RECIPE = """\
name: tiny
teacher: {folder}/teacher
data:
  train:
    kind: mixture
    sources:
      books: {{kind: jsonl, path: {folder}/books.jsonl}}
      chats: {{kind: chat, path: {folder}/chats.jsonl}}
    weights: {{books: 1, chats: 3}}
    max_repeats: 50
    validation: {{chats: {{kind: chat, path: {folder}/more.jsonl}}}}
  held_out: 0.2
  sequence_length: 128
  calibration_sequences: 4
stages:
  teach:
    {{kind: finetune, model: teacher, num_steps: 1, batch_size: 4,
     data: {{train: {{kind: jsonl, path: {folder}/books.jsonl}}, held_out: 0.2, packing: wrapped}}}}
  prune: {{keep: {{intermediate_size: 16}}, data: teach}}
  cache: {{kind: cache_teacher, codec: hidden}}
  learn: {{kind: distill, student: prune, teacher: cache, num_steps: 3, batch_size: 4}}
  quantize: {{student: learn, num_steps: 0, quantizer: int8_channel, activations: static_int8}}
  on_books: {{kind: evaluate, models: [learn], speed: null, data: teach}}
  evaluate: {{speed: null}}
  report: {{new_tokens: 3}}
compute: {{accelerator: cpu, log_every_steps: 1}}
logging: {{wandb: disabled}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    for name, start, count in (("chats", 0, 30), ("more", 100, 8)):
        rows = [json.dumps({"messages": messages}) for messages in conversations(start, count)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    books = [json.dumps({"text": f"Row {i} of a book, with {i * i} more words in it."}) for i in range(60)]
    (folder / "books.jsonl").write_text("\n".join(books))
    make_model(folder / "teacher", chats.PLAIN, "<|im_end|>")
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Run, Recipe, list[str]]:
    recipe = Recipe.from_text(RECIPE.format(folder=folder))
    said: list[str] = []
    return run(recipe, folder / "run", say=said.append), recipe, said


def test_the_report_has_a_row_per_source_and_names_the_worst(finished: tuple[Run, Recipe, list[str]]) -> None:
    the_run, _, said = finished
    rows = {row.name: row for row in read_rows(the_run.stage("evaluate") / "rows.json")}
    assert [one.name for one in rows["learn"].domains] == ["books", "chats"]
    for row in rows.values():
        assert row.loss_nats is not None
        tokens = sum(one.tokens for one in row.domains)
        nats = sum(one.tokens * (one.loss_nats or 0) for one in row.domains)
        assert row.loss_nats == pytest.approx(nats / tokens, rel=1e-9)
        assert all(one.bits_per_byte and one.kl_to_teacher is not None for one in row.domains)
    worst = max(rows["learn"].domains, key=lambda one: one.kl_to_teacher or 0)
    named = f"learn is furthest from the teacher on {worst.name}: {worst.kl_to_teacher:.3f} nats per token"
    markdown = (the_run.stage("report") / "report.md").read_text()
    page = (the_run.stage("report") / "index.html").read_text()
    assert named in markdown
    assert named in page
    assert any(named in line for line in said)
    assert "| books |" in markdown
    assert '<th scope="row">chats</th>' in page
    assert "books held out; chats from chat, what the assistant writes" in markdown


def test_passes_are_told_before_the_run_and_in_the_report(finished: tuple[Run, Recipe, list[str]]) -> None:
    the_run, _, said = finished
    times = the_run.done("learn").figures["passes"]  # type: ignore[union-attr]
    line = f"learn: passes over each source: books {times['books']:.2f}, chats {times['chats']:.2f}"
    assert 0 < times["books"] < times["chats"]
    first = next(i for i, text in enumerate(said) if text.startswith("[1/"))
    assert any(line in text for text in said[:first])
    assert line in (the_run.stage("report") / "report.md").read_text()
    assert "passes" not in the_run.done("teach").figures  # type: ignore[union-attr]


def test_a_stage_reads_its_own_text_or_that_of_an_earlier_one(finished: tuple[Run, Recipe, list[str]]) -> None:
    the_run, recipe, said = finished
    books = recipe.stages["teach"].data  # type: ignore[attr-defined]
    assert [data_of(recipe.stages, recipe.data, name) == books for name in ("teach", "prune", "learn", "on_books")] == [
        True, True, False, True,
    ]  # fmt: skip
    assert books.sequence_length == 128  # what it does not say is the recipe's
    assert Recipe.from_text(recipe.dump()) == recipe
    (row,) = read_rows(the_run.stage("on_books") / "rows.json")
    both = {row.name: row for row in read_rows(the_run.stage("evaluate") / "rows.json")}["learn"]
    assert row.domains == ()
    assert row.loss_nats != both.loss_nats
    assert "on_books measured on another text" in (the_run.stage("report") / "report.md").read_text()
    assert any("train 48 documents" in line or ("documents" in line and "bytes each" in line) for line in said)
    # the models of a stage that reads no conversation carry the run's template all the same
    assert (the_run.stage("teach") / "model" / "chat_template.jinja").is_file()
    said.clear()
    run(recipe, the_run.folder, say=said.append)
    assert sum("finished before" in line for line in said) == len(recipe.stages)


def test_another_text_of_one_stage_runs_that_stage_again(finished: tuple[Run, Recipe, list[str]], folder: Path) -> None:
    the_run, _, _ = finished
    changed = Recipe.from_text(RECIPE.format(folder=folder), set=["stages.teach.data.held_out=0.3"])
    said: list[str] = []
    run(changed, the_run.folder, only="teach", say=said.append)
    assert not any("finished before" in line for line in said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("prune.data=tech", "prune.data: no earlier stage 'tech' .*.there are teach.; did you mean 'teach'"),
        ("teach.data=learn", "teach.data: no earlier stage 'learn'"),
        ("learn.data=teach", "learn.data: 'cache' holds what .* another text .* train.*set data: cache here"),
        ("teach.data.tokenizer=elsewhere/model", "teach.data: a run has one tokenizer"),
        ("teach.data.trian=x", "teach.data.trian: unknown key.* did you mean 'train'"),
        ("teach.data=7", "teach.data: needs the name of an earlier stage"),
        ("teach.data.train=gone", "teach.data.train: no source called 'gone'"),
        ("learn.on_policy={share: 1}", "learn.on_policy: .*books has no turns"),
    ],
)
def test_what_a_recipe_cannot_mean_is_one_line(folder: Path, change: str, said: str) -> None:
    with pytest.raises(RecipeError, match=f"stages.{said}"):
        Recipe.from_text(RECIPE.format(folder=folder), set=[f"stages.{change}"])


def test_a_training_that_reads_a_source_too_often_is_refused_before_any_stage(folder: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_text(
        RECIPE.format(folder=folder), set=["data.train.max_repeats=1", "stages.learn.num_steps=40"]
    )
    said: list[str] = []
    with pytest.raises(InputError, match=r"stages.learn: .*would read .*chats .* times, data.train.max_repeats is 1; "):
        run(recipe, tmp_path / "run", say=said.append)
    assert not any(line.startswith("[1/") for line in said)


def test_check_shows_every_text_and_source(folder: Path) -> None:
    plan = describe(Recipe.from_text(RECIPE.format(folder=folder), set=["data.train.max_repeats=0.1"]))
    assert "a mixture of 2 sources" in plan
    assert "chats: chat, 75.0% of the tokens" in plan
    assert "validation from chat" in plan
    assert "chats about 0.9 times by that estimate; the run counts, and refuses more than 0.1" in plan
    assert "stages.teach.data: jsonl, rows of 128 tokens (wrapped)" in plan
    with pytest.raises(RecipeError, match=r"data\.train\.sources\.books: no\.jsonl: no such file"):
        describe(Recipe.from_text(RECIPE.format(folder=folder), set=["data.train.sources.books.path=no.jsonl"]))


def test_rows_of_sources_are_checked() -> None:
    from distill.reporting.tradeoff import Domain, from_json, to_json

    rows = [Row("a", domains=(Domain("x", 5, bits_per_byte=1.5), Domain("y", 7, kl_to_teacher=0.25)))]
    assert from_json(to_json(rows)) == rows
    with pytest.raises(ValueError, match="more than once"):
        Row("a", domains=(Domain("x", 5), Domain("x", 6)))
    with pytest.raises(InputError):
        from_json(to_json(rows).replace("bits_per_byte", "bits"))
