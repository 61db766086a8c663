"""Conversations through every stage: what is learned from, cached, measured and asked is what the assistant writes."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from distill.core.errors import InputError, RecipeError
from distill.core.run_folder import Run
from distill.forecast import describe
from distill.recipe import Recipe
from distill.runner import run
from distill.training.metrics import read_rows
from tests.data import chats
from tests.data.chats import assistant, chat_tokenizer, user

SPECIAL = (*chats.IM, "<|end|>", "<|pad|>")
OTHER = chats.PLAIN.replace("'\n' + m", "' \n' + m").replace("assistant\n", "assistant \n")
RECIPE = """\
name: tiny
teacher: {teacher}
data:
  train: {{kind: chat, path: {folder}/train.jsonl}}
  validation: {{kind: chat, path: {folder}/validation.jsonl}}
  sequence_length: 128
  validation_tokens: 10000
  calibration_sequences: 4
  max_dropped: 0.1
stages:
  prune: {{keep: {{intermediate_size: 16}}}}
  cache: {{kind: cache_teacher, codec: hidden}}
  learn: {{kind: distill, student: {student}, teacher: cache, num_steps: 2, batch_size: 4}}
  own:
    {{kind: distill, student: learn, num_steps: 2, batch_size: 4, losses: [jensen_shannon],
     on_policy: {{share: 1, max_new_tokens: 8}}}}
  quantize: {{student: learn, num_steps: 0, quantizer: int8_channel, activations: static_int8}}
  evaluate: {{speed: null}}
  report: {{new_tokens: 3}}
compute: {{accelerator: cpu, log_every_steps: 1}}
logging: {{wandb: disabled}}
"""


def make_model(folder: Path, template: str | None, end: str, seed: int = 0) -> Path:
    from distill.models.load import new_config, new_model

    tokenizer = chat_tokenizer(template, SPECIAL)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    keys = {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3}
    ends = {"eos_token_id": tokenizer.get_vocab()[end], "vocab_size": len(tokenizer)}
    new_model(new_config(keys | sizes | ends), seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def conversations(start: int, count: int) -> list[list[dict[str, Any]]]:
    return [
        [m for turn in range(n % 3 + 1) for m in (user(f"{n} and {turn}?"), assistant(f"It is {n + turn}."))]
        for n in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    for name, start, count in (("train", 0, 40), ("validation", 100, 10)):
        rows = [json.dumps({"messages": messages}) for messages in conversations(start, count)]
        (folder / f"{name}.jsonl").write_text("\n".join([*rows, '{"messages": []}'] if name == "train" else rows))
    make_model(folder / "teacher", chats.PLAIN, "<|im_end|>")
    student = make_model(folder / "student", None, "<|end|>", seed=1)
    settings = json.loads((student / "generation_config.json").read_text())
    # many published models have it beside greedy decoding, of which transformers only warns
    (student / "generation_config.json").write_text(json.dumps(settings | {"temperature": 0.6}))
    return folder


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Any:
    def make(*set: str, **names: Any) -> Recipe:
        named = {"folder": folder, "teacher": folder / "teacher", "student": folder / "student"} | names
        return Recipe.from_text(RECIPE.format(**named), set=set)

    return make


@pytest.fixture(scope="module")
def done(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[str]]:
    said: list[str] = []
    return run(recipe(), tmp_path_factory.mktemp("run") / "run", say=said.append), said


def test_what_was_left_out_and_whose_template_it_is_are_said(done: tuple[Run, list[str]], folder: Path) -> None:
    said = "\n".join(done[1])
    assert "data.train: left out 1 of 41 rows: 1 no assistant turn (first " in said
    assert f"{folder.as_posix()}/train.jsonl:41: it has no messages)" in said
    assert "chat template: the student has none; it reads by the run's" in said
    assert "the student learns to end a turn with '<|im_end|>': added to eos_token_id of its generation config" in said
    assert "left out 1 of 41 rows" in (done[0].stage("report") / "report.md").read_text()


def test_a_base_student_is_saved_with_the_template_and_its_end(done: tuple[Run, list[str]]) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    for stage in ("learn", "own"):
        model = done[0].stage(stage) / "model"
        tokenizer = AutoTokenizer.from_pretrained(model)
        assert tokenizer.chat_template == chats.PLAIN
        ends = GenerationConfig.from_pretrained(model).eos_token_id
        assert ends == sorted(tokenizer.get_vocab()[token] for token in ("<|end|>", "<|im_end|>"))


def test_figures_are_of_what_the_assistant_writes(done: tuple[Run, list[str]], folder: Path) -> None:
    """Against transformers alone, one conversation and one turn after the other."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = {row["name"]: row for row in json.loads((done[0].stage("evaluate") / "rows.json").read_text())}
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    models = {
        name: AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        for name, place in (("teacher", folder / "teacher"), ("learn", done[0].stage("learn") / "model"))
    }
    nats: dict[str, list[float]] = {"teacher": [], "learn": [], "kl": []}
    num_bytes = 0
    for messages in conversations(100, 10):
        for number in range(1, len(messages), 2):
            prompt, text = (
                tokenizer.apply_chat_template(messages[:end], tokenize=False, add_generation_prompt=end == number)
                for end in (number, number + 1)
            )
            ids = tokenizer(text.removesuffix("\n"), return_tensors="pt").input_ids
            start = len(tokenizer(prompt).input_ids)
            with torch.no_grad():
                said = {name: model(ids).logits[0].log_softmax(-1)[start - 1 : -1] for name, model in models.items()}
            for name, log_probs in said.items():
                nats[name] += (-log_probs.gather(1, ids[0, start:, None])).flatten().tolist()
            nats["kl"] += (said["teacher"].exp() * (said["teacher"] - said["learn"])).sum(-1).tolist()
            num_bytes += len(messages[number]["content"])
    for name in ("teacher", "learn"):
        assert rows[name]["loss_nats"] == pytest.approx(sum(nats[name]) / len(nats[name]), rel=1e-4)
        bits = sum(nats[name]) / torch.log(torch.tensor(2.0)).item() / num_bytes
        assert rows[name]["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    assert rows["learn"]["kl_to_teacher"] == pytest.approx(sum(nats["kl"]) / len(nats["kl"]), rel=1e-4)


def test_only_positions_that_count_are_cached_and_they_teach_as_the_teacher_does(
    done: tuple[Run, list[str]], recipe: Any, tmp_path: Path
) -> None:
    from distill.data.teacher_cache.verify import caches, describe

    figures = done[0].done("cache").figures  # type: ignore[union-attr]
    _, validation = caches(Path(figures["folder"]).parent)
    predictions = re.findall(r"validation \d+ rows, ([\d,]+) predictions", "\n".join(done[1]))[0]
    assert f"  {predictions} tokens in 1 shard" in describe(validation)
    stages = "{learn: {kind: distill, student: STUDENT, num_steps: 2, batch_size: 4}}"
    live = run(
        recipe(f"stages={stages.replace('STUDENT', str(recipe().stages['learn'].student))}"), tmp_path / "run",
        say=lambda line: None,
    )  # fmt: skip
    ours, theirs = (
        [row["train/forward_kl"] for row in read_rows(one.stage("learn")) if "lr" in row] for one in (done[0], live)
    )
    assert ours == pytest.approx(theirs, rel=0.01)  # hidden states are kept in bf16


def test_the_student_goes_on_from_where_the_assistant_begins(done: tuple[Run, list[str]]) -> None:
    rows = [row for row in read_rows(done[0].stage("own")) if "lr" in row]
    assert len(rows) == 2
    assert all(row["on_policy/generated_share"] == 1 for row in rows)
    assert all(1 <= row["on_policy/length"] <= 8 for row in rows)
    # the text's own turns end within eight bytes or the ten of "It is 102."
    assert all(0 <= row["on_policy/text_at_limit"] <= 1 for row in rows)


def test_models_are_asked_in_the_template_of_the_run(done: tuple[Run, list[str]]) -> None:
    from distill.compare import answer_prompts
    from distill.evaluation import side_by_side

    asked: list[list[int]] = []
    original = side_by_side.answer

    def answer(model: Any, tokenizer: Any, prompt: Any, new_tokens: int, encode: Any) -> Any:
        asked.append(encode(tokenizer, prompt))
        return original(model, tokenizer, prompt, new_tokens, encode)

    tokenizer = chat_tokenizer(chats.PLAIN, SPECIAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side_by_side, "answer", answer)
        answers = answer_prompts(done[0].folder, ["Rain?<|im_end|>"], new_tokens=2)
    assert list(answers[0]["answers"]) == ["teacher", "prune", "learn", "own", "quantize"]
    text = tokenizer.decode(asked[0])
    assert text == "<|im_start|>user\nRain?<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert all(ids == asked[0] for ids in asked)
    assert asked[0].count(tokenizer.get_vocab()["<|im_end|>"]) == 1  # what the user wrote out ends nothing
    page = (done[0].stage("report") / "report.md").read_text()
    assert "What is the capital of France?" in page


def test_the_rows_can_be_looked_at(done: tuple[Run, list[str]], recipe: Any) -> None:
    from distill.show_data import show

    shown = []
    for coloured in (False, True):
        out, system = io.StringIO(), "standard" if coloured else None
        console = Console(file=out, force_terminal=coloured, color_system=system, width=80)  # type: ignore[arg-type]
        show(recipe(), done[0].folder, 2, console)
        shown.append(out.getvalue())
    plain, colour = shown
    assert "data.train: left out 1 of 41 rows" in plain
    assert re.search(r"tokens each: shortest \d+, median \d+, 9 of 10 up to \d+, longest \d+", plain)
    assert re.search(r"learned from: [\d,]+ tokens, \d+\.\d% of all", plain)
    assert len(re.findall(r"^row \d+: \d+ tokens, \d+ learned from$", plain, re.MULTILINE)) == 2
    assert re.search(
        r"<\|im_start\|>user\n\d+ and \d\?<\|im_end\|>\n<\|im_start\|>assistant\n⟦It is \d+\.<\|im_end\|>⟧", plain
    )
    assert "⟦" not in colour
    assert re.search(r"\x1b\[32mIt is \d+\.<\|im_end\|>\x1b\[0m", colour)


def test_a_student_with_another_template_is_told_apart(folder: Path, recipe: Any, tmp_path: Path) -> None:
    other = make_model(tmp_path / "student", OTHER, "<|im_end|>")
    said: list[str] = []
    stages = f"{{learn: {{kind: finetune, model: {other}, num_steps: 1, batch_size: 2}}}}"
    run(recipe(f"stages={stages}", "data.tokenizer=teacher"), tmp_path / "run", say=said.append)
    assert any(
        line.strip().startswith("chat template: the run's against the student's own, two turns: ") for line in said
    )
    own: list[str] = []
    chosen = recipe(f"stages={stages}", "data.chat={template: student}")
    run(chosen, tmp_path / "own", say=own.append)
    saved = (tmp_path / "own" / "learn" / "model" / "chat_template.jinja").read_text()
    assert saved == OTHER


@pytest.mark.parametrize(
    ("set", "line"),
    [
        (("data.packing=wrapped",), "data: packing: wrapped cuts conversations where a row is full; use best_fit"),
        (("stages.own.on_policy.prompt_tokens=4",), "on_policy.prompt_tokens: has no effect on conversations"),
        (("stages.own.on_policy.max_new_tokens=128",), "leaves no room for a prompt in a row of data.sequence"),
        (("data.chat={learn_from: all}",), "which data.chat.learn_from: all does not mark; set it to assistant"),
        (("data.chat={learn_from: every}",), "data.chat.learn_from: must be 'assistant', 'all' or 'last'"),
        (("data.chat={today: tomorrow}",), "data.chat.today: input should be a valid date"),
        (("teacher=null", "data.tokenizer=x/y", "stages={learn: {kind: finetune, model: x/y, num_steps: 1}}"),
         "data.chat.template: there is no teacher to take it from; set template: student"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_each(set: tuple[str, ...], line: str, recipe: Any) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(*set)
    assert line in str(error.value)


def test_check_says_what_can_be_said_without_a_run(recipe: Any, folder: Path, tmp_path: Path) -> None:
    plan = describe(recipe())
    assert "data.train: 40 rows of messages; 1 cannot be used: 1 no assistant turn (first " in plan
    assert "data.validation: 10 rows of messages" in plan
    assert f"chat template: that of {folder / 'teacher'}, " in plan
    for set, line in [
        (("data.chat={template: nowhere.jinja}",), "data.chat.template: nowhere.jinja: no such file"),
        (("data.chat={template: student}",), f"data.chat.template: {folder / 'student'} has no chat template"),
    ]:
        with pytest.raises(InputError, match=re.escape(line)):
            describe(recipe(*set))
    (tmp_path / "dated.jinja").write_text(chats.DATED)
    dated = f"data.chat.template={tmp_path / 'dated.jinja'}"
    assert "it speaks of today's date (strftime_now)" in describe(recipe(dated))
    assert "strftime_now" not in describe(recipe(dated, "data.chat.today=2026-01-01"))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match=r"data\.train: 1 of 1 rows cannot be used"):
        describe(recipe(f"data.train.path={tmp_path / 'bad.jsonl'}"))


def test_a_teacher_that_never_ends_a_turn_so_is_refused_for_own_turns(
    folder: Path, recipe: Any, tmp_path: Path
) -> None:
    teacher = make_model(tmp_path / "teacher", chats.PLAIN, "<|end|>")
    own = f"{{kind: distill, student: {folder / 'student'}, num_steps: 1, batch_size: 2, on_policy: {{}}}}"
    with pytest.raises(InputError, match=r"ends a turn with token \d+, the teacher with \d+, so its own samples"):
        run(
            recipe(f"stages={{own: {own}}}", "data.sequence_length=256", teacher=teacher),
            tmp_path / "run",
            say=lambda line: None,
        )


def test_a_window_that_would_cut_conversations_is_refused(recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"window \(64\) would cut conversations"):
        run(recipe("stages.cache.window=64"), tmp_path / "run", say=lambda line: None)
