"""What `distill check` finds before a run does: rows, tokenizers, passes over the text, time and disk."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.core.errors import RecipeError
from distill.forecast import costs, describe, machine
from distill.forecast.text import FEW_PREDICTIONS, TextForecast
from distill.models.configs import config_of, count, size
from distill.recipe import Recipe
from distill.training.spec import BudgetSpec

RECIPE = """\
name: checked
teacher: {teacher}
data:
  train: {{kind: jsonl, path: {text}{source}}}
  sequence_length: 16
{data}stages:
  distill: {{student: {student}, num_tokens: {num_tokens}, batch_size: 2}}
compute: {{accelerator: cpu}}
"""


@pytest.fixture
def check(tmp_path: Path, tiny_folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)

    def describe_with(
        rows: list[object], num_tokens: int = 1000, data: str = "", student: object = None, source: str = ""
    ) -> str:
        text = tmp_path / "text.jsonl"
        text.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = tmp_path / "recipe.yaml"
        teacher, second = tiny_folders
        recipe.write_text(
            RECIPE.format(
                teacher=teacher, student=student or second, text=text, num_tokens=num_tokens, data=data, source=source
            )
        )
        return describe(Recipe.load(recipe))

    return describe_with


ROWS: list[object] = [{"text": "a" * 99 + str(i)} for i in range(10)]  # a byte is a token


def test_tokens_are_counted_and_passes_named(check: Callable[..., str]) -> None:
    said = check(ROWS, num_tokens=1000)
    assert "950 tokens to train on, 50 held out to validate on (1.00 bytes per token by the tokenizer of" in said
    assert "is read about" not in said
    assert "each token of the text is read about 3.2 times\n" in check(ROWS, num_tokens=3000)
    assert "each token of the text is read about 105 times; beyond 4 a further pass" in check(ROWS, num_tokens=100_000)


def test_too_few_predictions_are_named(check: Callable[..., str]) -> None:
    assert "validates on about 50 predictions, too few" in check(ROWS)
    assert "give more by data.held_out" in check(ROWS)
    many: list[object] = [{"text": "b" * 1000 + str(i)} for i in range(100)]
    assert "too few to tell" not in check(many)
    few = check(many, data=f"  validation_tokens: {FEW_PREDICTIONS - 1}\n")
    assert "too few to tell models apart" in few
    assert "give more by data.validation_tokens" in few


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"body": "text"}], "no column 'text' (it has 'body'); set text: COLUMN"),
        ([{"text": ["a"]}], "column 'text' must hold a string (got list)"),
        (["text"], "a row must be a JSON object (got str)"),
    ],
)
def test_a_row_is_read(check: Callable[..., str], rows: list[object], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        check(rows)
    assert f"text.jsonl:1: {message}" in str(error.value)


def test_rows_that_cannot_be_used_are_named_before_the_run_stops_for_them(check: Callable[..., str]) -> None:
    rows: list[object] = [*ROWS, {"body": "a"}]
    with pytest.raises(
        RecipeError, match=r"data.train: 1 of 11 rows cannot be used .*/text.jsonl:11: no column 'text'"
    ):
        check(rows)
    said = check(rows, data="  max_dropped: 0.2\n")
    assert "data.train: 1 of the first 11 rows cannot be used: 1 no such column (first" in said
    more = [{"text": "a" * 9}] * 500
    assert "the run stops if more than 1.0% of all rows are like them" in check([3] * 10 + more)


def test_a_template_that_cannot_be_used_is_a_mistake_of_the_recipe(check: Callable[..., str]) -> None:
    with pytest.raises(RecipeError, match=r"recipe.yaml:4: data.train.text: line 1 of the template has a call"):
        check(ROWS, source=", text: '{{ text.upper() }}'")
    assert "bytes per token" in check(ROWS, source=", text: '{{ text }}'")


def test_ids_are_counted_as_tokens(check: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"input_ids": [i] * 50}) + "\n" for i in range(40)))
    said = check(ROWS, data="  validation: {kind: tokens, path: ids.jsonl}\n")
    assert "1,000 tokens to train on, 2,000 held out" in said


def test_nothing_is_fetched_from_addresses(check: Callable[..., str], tmp_path: Path) -> None:
    url = "http://127.0.0.1:1/a.csv"  # nobody answers there
    assert "validation from csv" in check(ROWS, data=f"  validation: {{kind: csv, path: '{url}'}}\n")
    with pytest.raises(RecipeError, match="ftp:// is not read here"):
        check(ROWS, data="  validation: {kind: csv, path: 'ftp://host/a.csv'}\n")


def test_other_tokens_are_refused_as_the_run_would(
    check: Callable[..., str], tiny_folders: list[Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folders[1], other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[:2]
    vocabulary[first], vocabulary[second] = 1, 0
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RecipeError) as error:
        check(ROWS, student=other)
    assert f"stages.distill.student: {other} has 256 tokens" in str(error.value)
    assert f"token 0 is {json.dumps(second)} and {json.dumps(first)}; take models of one tokenizer" in str(error.value)


def test_time_and_disk(check: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "cpu_speed", lambda: machine.Speed(1e6, True, "a slow machine"))
    said = check(ROWS)
    assert "time: at least " in said
    assert "for the trainings, by a slow machine" in said
    assert ": too little" not in said
    monkeypatch.setattr(costs, "free_bytes", lambda folder: (1000, folder))
    assert "; 0.0 MB are free in runs: too little; free some, or name a folder on another disk" in check(ROWS)


def test_tokens_are_on_disk_twice_while_shards_are_joined() -> None:
    text = TextForecast(train=1e9, validation=0.0, bytes_per_id=2)
    (line,) = costs.closing_lines([], None, 1, [text])
    assert line.startswith("disk: about 4.0 GB at its fullest, 2.0 GB in the end")
    mixture = TextForecast(train=1e9, validation=0.0, bytes_per_id=2, sources={"a": 1e9})
    (line,) = costs.closing_lines([], None, 1, [mixture])
    assert line.startswith("disk: about 4.0 GB at its fullest, 4.0 GB in the end")


def test_operations_of_a_known_model() -> None:
    config = config_of("meta-llama/Llama-3.1-8B")
    assert config is not None
    training = costs.Training(BudgetSpec(num_steps=1, batch_size=1), [])
    tokens, layers, inner = 8192, 32, 4096
    forward = 2 * ((count(config) or 0) - 128256 * 4096) + 2 * layers * inner * tokens
    assert costs.training_flops(config, None, training, tokens, False) == tokens * 3 * forward
    assert costs.training_flops(config, config, training, tokens, True) == tokens * 5 * forward


def test_sizes_of_the_models_that_recipes_name_need_no_network() -> None:
    """As the cards of these models on the Hub state them."""
    assert size(config_of("meta-llama/Llama-3.1-8B")) == "8.03B parameters"
    assert size(config_of("Qwen/Qwen3-8B")) == "8.19B parameters"
    assert size(config_of("mistralai/Mistral-Nemo-Base-2407")) == "12.25B parameters"
    assert size(config_of("HuggingFaceTB/SmolLM2-135M-Instruct")) == "134.52M parameters"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "a second"), (119, "119 seconds"), (120, "2 minutes"), (7200, "2 hours"), (20 * 86400, "20 days")],
)
def test_durations(seconds: float, words: str) -> None:
    assert machine.duration(seconds) == words


def test_a_recipe_of_many_stages_takes_work_in_proportion() -> None:
    """Calls of functions and not seconds: a stage that looked at all others would take the square of it."""
    config = "model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2"

    def num_calls(num_stages: int) -> int:
        models = [f"{{config: {{{config}}}}}", *(f"stage{i}" for i in range(num_stages - 1))]
        lines = [
            f"  stage{i}: {{kind: finetune, model: {model}, num_steps: 1, batch_size: 1}}"
            for i, model in enumerate(models)
        ]
        data = "{train: python_docs, sequence_length: 16, tokenizer: {vocab_size: 300}}"
        text = "\n".join([f"name: many\ndata: {data}\nstages:", *lines])
        counted, before = 0, sys.getprofile()

        def count_call(frame: object, event: str, argument: object) -> None:
            nonlocal counted
            counted += event == "call"

        sys.setprofile(count_call)
        try:
            described = describe(Recipe.from_text(text))
        finally:
            sys.setprofile(before)
        assert f"stage{num_stages - 1}" in described
        return counted

    num_calls(2)  # what is made once
    few, more, many = (num_calls(count) for count in (40, 80, 160))
    assert many - more < 2.03 * (more - few)
