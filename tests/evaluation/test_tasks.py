"""Tasks: log-likelihoods against a plain loop, forms of questions by hand, and few-shot, limit and seeds."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from distill.core.errors import InputError
from distill.data.chat_spec import ChatSpec
from distill.data.tokenizer import train_tokenizer
from distill.evaluation.tasks import Cloze, Generate, LmEval, MultipleChoice
from distill.evaluation.tasks.base import LogLikelihood, Prompt
from distill.evaluation.tasks.generate import extracted, normalized
from distill.evaluation.tasks.in_memory import ModelInMemory
from distill.evaluation.tasks.prompts import PromptEncoder
from distill.models.load import new_config, new_model

WORDS = ["the capital of France is Paris", "a cat sat on the mat", "yes or no", "one two three four five six seven"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_tokenizer(WORDS * 20, 290, tmp_path_factory.mktemp("tokenizer") / "t")


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    keys = {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 48, "initializer_range": 0.4}
    return new_model(new_config(keys | sizes | {"vocab_size": len(tokenizer)}), seed=0).eval()


def lm(model: Any, tokenizer: Any, batch_tokens: int = 200) -> ModelInMemory:
    return ModelInMemory(model, tokenizer, chat=ChatSpec(), batch_tokens=batch_tokens)


def written(folder: Path, rows: Sequence[dict[str, Any]], name: str = "task.jsonl") -> str:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def with_begin(tokenizer: Any) -> Any:
    """The same tokenizer, which puts its begin token before a text, as Llama's does."""
    from copy import deepcopy

    own = deepcopy(tokenizer)
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", own.bos_token_id)]
    )
    return own


@torch.no_grad()
def plain(model: Any, before: list[int], after: list[int]) -> LogLikelihood:
    """One request alone, by the model's own forward, as one would write it first."""
    ids = (before + after)[-(48 + 1) :]
    logp = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    nats, greedy = 0.0, True
    for place, token in enumerate(after, start=len(ids) - 1 - len(after)):
        nats += float(logp[place, token])
        greedy &= int(logp[place].argmax()) == token
    return LogLikelihood(nats, greedy, len(before) + len(after) > 49)


PAIRS: list[tuple[Prompt, str]] = [
    ("the capital of France is", " Paris"),
    ("the capital of France is", " yes"),
    ("the capital of France is", " no"),
    ("a cat\n", "sat on the mat"),
    ("", "one two"),
    ("one two three " * 30, " four"),
    ("yes or", " no"),
    ("x", "<|endoftext|>"),
]


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
@pytest.mark.parametrize("begins", [False, True])
def test_log_likelihoods_are_those_of_a_plain_loop(model: Any, tokenizer: Any, batch_tokens: int, begins: bool) -> None:
    own = with_begin(tokenizer) if begins else tokenizer
    encoder = PromptEncoder(own, ChatSpec())
    model.train()
    ours = lm(model, own, batch_tokens).log_likelihoods(PAIRS)
    assert model.training  # left as it came
    model.eval()
    for (prompt, continuation), one in zip(PAIRS, ours, strict=True):
        before, after = encoder.pair(prompt, continuation)
        wanted = plain(model, before, after)
        assert one.nats == pytest.approx(wanted.nats, abs=2e-5)
        assert (one.is_greedy, one.cut) == (wanted.is_greedy, wanted.cut)
    assert [one.cut for one in ours].count(True) == 1


def test_the_begin_token_stands_once_where_the_tokenizer_puts_it(tokenizer: Any) -> None:
    bos = tokenizer.bos_token_id
    for own, begin in ((tokenizer, []), (with_begin(tokenizer), [bos])):
        encoder = PromptEncoder(own, ChatSpec())
        before, after = encoder.pair("a cat sat", " on the mat")
        assert before[: len(begin)] == begin
        assert before.count(bos) == len(begin)
        assert bos not in after
        assert before + after == [*begin, *own("a cat sat on the mat", add_special_tokens=False)["input_ids"]]
        assert encoder.pair("", "yes")[0] == [bos]
        spaced = encoder.pair("a cat sat ", "on the mat")
        assert spaced == (before, after)  # the space goes to the word behind it
        assert bos not in encoder.pair("x", "<|endoftext|>")[1]  # written out it is text


def test_a_chat_template_begins_by_itself(model: Any, tokenizer: Any) -> None:
    own = with_begin(tokenizer)
    own.add_tokens(["<|im_end|>"], special_tokens=True)
    own.chat_template = "{{ bos_token }}" + CHATML
    encoder = PromptEncoder(own, ChatSpec())
    ids = encoder.prompt(({"role": "user", "content": "yes or no"},))
    assert ids.count(own.bos_token_id) == 1
    assert own.decode(ids).endswith("<|im_start|>assistant\n")
    with pytest.raises(InputError, match="has no chat template"):
        PromptEncoder(tokenizer, ChatSpec()).prompt(({"role": "user", "content": "yes"},))


class Scripted:
    """Answers what it is told, and keeps what it was asked."""

    model = tokenizer = None
    positions, batch_tokens = 64, 64

    def __init__(self, nats: dict[str, float] | None = None, texts: list[str] | None = None):
        self.nats, self.texts = nats or {}, texts or []
        self.asked: list[tuple[Prompt, str]] = []

    def log_likelihoods(self, asked: Sequence[tuple[Prompt, str]]) -> list[LogLikelihood]:
        self.asked += asked
        return [LogLikelihood(self.nats[text], self.nats[text] > -1, False) for _, text in asked]

    def written(self, prompts: Sequence[Prompt], *, new_tokens: int, stops: Sequence[str]) -> list[tuple[str, bool]]:
        self.asked += [(prompt, "|".join(stops)) for prompt in prompts]
        return [(text, False) for text in self.texts]


ROWS = [
    {"query": "France?", "choices": ["Paris", "a much longer city"], "gold": 0},
    {"query": "Spain?", "choices": ["Rome", "Madrid"], "gold": 1},
]


def test_both_accuracies_by_hand(tmp_path: Path) -> None:
    nats = {" Paris": -5.0, " a much longer city": -9.0, " Rome": -2.0, " Madrid": -2.5}
    model = Scripted(nats)
    found = MultipleChoice(path=written(tmp_path, ROWS), prompt="Q: {query}\nA:").ask(model, "t")
    assert [one.right for one in found.answers] == [True, False]
    assert [one.normalized_right for one in found.answers] == [False, True]  # -9/18 > -5/5; -2.5/6 > -2/4
    assert [one.answer for one in found.answers] == ["Paris", "Rome"]
    assert found.answers[1].scores == (-2.0, -2.5)
    assert found.chance == 0.5
    assert model.asked[0] == ("Q: France?\nA:", " Paris")
    assert found.rights("normalized_accuracy") == [False, True]


def test_a_score_that_is_no_number_answers_nothing(tmp_path: Path) -> None:
    nats = {" Paris": float("nan"), " a much longer city": -9.0, " Rome": -2.0, " Madrid": -1.0}
    found = MultipleChoice(path=written(tmp_path, ROWS)).ask(Scripted(nats), "t")
    assert [one.right for one in found.answers] == [False, True]
    assert found.answers[0].scores == (None, -9.0)
    assert found.answers[0].answer == ""


def forms(tmp_path: Path) -> dict[str, tuple[MultipleChoice, list[tuple[str, str]], str]]:
    arc = [{"question": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}]
    boolq = [{"passage": "P", "question": "is it", "answer": False}]
    sciq = [{"question": "Q", "support": "S", "correct_answer": "y", "distractor1": "x"}]
    winogrande = [{"context_options": ["Ann so Ann", "Ann so Eve"], "continuation": "left", "gold": 1}]
    return {
        "labels": (
            MultipleChoice(path=written(tmp_path, arc, "arc.jsonl"), prompt="{question}", choices="choices.text",
                           labels="choices.label", answer="answerKey"),
            [("Q", " x"), ("Q", " y")], "y"),
        "true and false": (
            MultipleChoice(path=written(tmp_path, boolq, "boolq.jsonl"), prompt="{passage}\n{question}?\nAnswer:",
                           choices=["no", "yes"], answer="answer"),
            [("P\nis it?\nAnswer:", " no"), ("P\nis it?\nAnswer:", " yes")], "no"),
        "columns as choices": (
            MultipleChoice(path=written(tmp_path, sciq, "sciq.jsonl"), prompt="{support} {question}",
                           choices=["{correct_answer}", "{distractor1}"], answer=0),
            [("S Q", " y"), ("S Q", " x")], "y"),
        "choice in the question": (
            MultipleChoice(path=written(tmp_path, winogrande, "w.jsonl"), prompt="{choice}",
                           choices="context_options", continuation="{continuation}"),
            [("Ann so Ann", " left"), ("Ann so Eve", " left")], "Ann so Eve"),
        "letters": (
            MultipleChoice(path=written(tmp_path, ROWS[:1], "l.jsonl"), prompt="{query}\n{options}\nAnswer:",
                           answer_by="letter"),
            [("France?\nA. Paris\nB. a much longer city\nAnswer:", letter) for letter in (" A", " B")], "Paris"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "form", ["labels", "true and false", "columns as choices", "choice in the question", "letters"]
)
def test_forms_of_the_sets_in_use(form: str, tmp_path: Path) -> None:
    task, asked, wanted = forms(tmp_path)[form]
    model = Scripted({text: -1.0 for _, text in asked})
    found = task.ask(model, "t")
    assert model.asked == asked
    assert found.answers[0].wanted == wanted


def test_few_shot_examples_are_drawn_once_and_not_asked(tmp_path: Path) -> None:
    rows = [{"query": f"q{i}", "choices": ["yes", "no"], "gold": i % 2} for i in range(12)]
    task = MultipleChoice(path=written(tmp_path, rows), few_shot=2, limit=5, seed=3, description="Say it.")
    model = Scripted({" yes": -1.0, " no": -2.0})
    found = task.ask(model, "t")
    assert len(found.answers) == 5
    first, *others = [prompt for prompt, _ in model.asked]
    head = str(first).rpartition("\n\n")[0]
    assert head.startswith("Say it.\n\n")
    assert head.count("\n\n") == 2
    assert all(str(prompt).startswith(head) for prompt in others)
    shown = [part.split(" ")[0] for part in head.split("\n\n")[1:]]
    asked = {str(prompt).rpartition("\n\n")[2] for prompt, _ in model.asked}
    assert asked.isdisjoint(shown)
    for part in head.split("\n\n")[1:]:  # each example with its right answer
        number = int(part.split(" ")[0].removeprefix("q"))
        assert part.endswith(["yes", "no"][number % 2])
    again = task.ask(Scripted({" yes": -1.0, " no": -2.0}), "t")
    assert [one.id for one in again.answers] == [one.id for one in found.answers]
    other = task.model_copy(update={"seed": 4}).ask(Scripted({" yes": -1.0, " no": -2.0}), "t")
    assert [one.id for one in other.answers] != [one.id for one in found.answers]
    assert len({one.asked for one in found.answers}) == 5
    with pytest.raises(InputError, match=r"few_shot \(12\) needs more rows than"):
        MultipleChoice(path=task.path, few_shot=12).ask(model, "t")


def test_examples_from_a_file_of_their_own_as_turns_of_a_conversation(tmp_path: Path) -> None:
    shots = written(tmp_path, [{"query": "dev", "choices": ["yes", "no"], "gold": 1}], "dev.jsonl")
    task = MultipleChoice(
        path=written(tmp_path, ROWS[:1]), few_shot=1, few_shot_path=shots, chat_template=True, description="Be brief."
    )
    model = Scripted({"Paris": -1.0, "a much longer city": -2.0})
    task.ask(model, "t")
    turns = [("system", "Be brief."), ("user", "dev"), ("assistant", "no"), ("user", "France?")]
    assert model.asked[0] == (tuple({"role": role, "content": text} for role, text in turns), "Paris")


def test_shuffled_choices_keep_their_right_answer(tmp_path: Path) -> None:
    rows = [{"query": f"q{i}", "choices": ["right", "w1", "w2", "w3"], "gold": 0} for i in range(40)]
    task = MultipleChoice(
        path=written(tmp_path, rows), prompt="{query}\n{options}", answer_by="letter", order="shuffled"
    )
    model = Scripted(dict.fromkeys([" A", " B", " C", " D"], -1.0))
    found = task.ask(model, "t")
    assert {one.wanted for one in found.answers} == {"right"}
    firsts = {str(prompt).splitlines()[1] for prompt, _ in model.asked}
    assert firsts == {"A. right", "A. w1", "A. w2", "A. w3"}
    assert 2 <= sum(one.right for one in found.answers) <= 20  # always A, no longer always right


def test_cloze_is_right_where_each_token_is_the_likeliest(tmp_path: Path) -> None:
    rows = [{"context": "a cat sat on the", "continuation": "mat"}, {"context": "yes or", "continuation": "no"}]
    found = Cloze(path=written(tmp_path, rows)).ask(Scripted({" mat": -0.5, " no": -3.0}), "t")
    assert [one.right for one in found.answers] == [True, False]
    assert found.chance == 0
    whole = Cloze(path=written(tmp_path, [{"text": "yes or no"}], "w.jsonl"), prompt="{text}", answer=None)
    model = Scripted({" no": -0.5})
    whole.ask(model, "t")
    assert model.asked == [("yes or", " no")]


def test_generate_compares_after_normalisation(tmp_path: Path) -> None:
    rows = [{"question": "capital?", "answer": ["Paris", "City of Paris"]}, {"question": "sum?", "answer": "no"}]
    found = Generate(path=written(tmp_path, rows)).ask(Scripted(texts=[" The city of Paris!", "yes"]), "t")
    assert [one.right for one in found.answers] == [True, False]
    gsm = [{"question": "how many?", "answer": "first 3, then\n#### 1,018"}]
    task = Generate(path=written(tmp_path, gsm, "g.jsonl"), normalize="number", extract_answer="#### (.+)")
    assert task.ask(Scripted(texts=["so 3 of 1018.00 dollars"]), "t").answers[0].right
    assert not task.ask(Scripted(texts=["no number"]), "t").answers[0].right


@pytest.mark.parametrize(
    ("text", "how", "wanted"),
    [
        ("The  Cat, sat!", "words", "cat sat"),
        ("it is -1,234.50 now", "number", "-1234.5"),
        ("3.0", "number", "3"),
        ("none", "number", ""),
        (" The ", "words", "the"),
        (" A b\n", "exact", "A b"),
    ],
)
def test_normalisation(text: str, how: Any, wanted: str) -> None:
    assert normalized(text, how) == wanted


def test_extraction_takes_the_last_and_its_group() -> None:
    assert extracted("#### 3 #### 4", r"#### (\d)") == "4"
    assert extracted("no", r"\d") == ""


def test_written_answers_are_those_of_one_prompt_at_a_time(model: Any, tokenizer: Any) -> None:
    prompts: list[Prompt] = ["the capital", "a cat sat on", "yes", "one two three four five"]
    together = lm(model, tokenizer, 400).written(prompts, new_tokens=6, stops=[])
    alone = [lm(model, tokenizer).written([prompt], new_tokens=6, stops=[])[0] for prompt in prompts]
    assert together == alone
    assert all(text for text, _ in together)
    cut = together[0][0][2:4]
    stopped = lm(model, tokenizer).written(prompts[:1], new_tokens=6, stops=[cut])
    assert stopped[0][0] == together[0][0].partition(cut)[0]
    with pytest.raises(InputError, match=r"max_new_tokens \(48\) leaves no room"):
        lm(model, tokenizer).written(prompts, new_tokens=48, stops=[])
    assert lm(model, tokenizer).written(["one two three " * 30], new_tokens=4, stops=[])[0][1]


@pytest.mark.parametrize(
    ("row", "more", "line"),
    [
        ({"query": "q"}, {}, "no column 'choices'"),
        ({"query": "q", "choices": ["x", "y"], "gold": 2}, {}, "the answer 2 is not one of the 2 choices"),
        ({"query": "q", "choices": ["x", "x"], "gold": "x"}, {}, "the answer 'x' is not one of the 2 choices"),
        ({"query": "q", "choices": ["x"], "gold": 0}, {}, "1 choices, expected 2"),
        ({"query": "q", "choices": ["x", ""], "gold": 0}, {}, "choice 1 is empty"),
        ({"query": ["q"], "choices": ["x", "y"], "gold": 0}, {}, "must hold text"),
    ],
)
def test_a_wrong_row_is_one_line_with_its_place(row: Any, more: Any, line: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=line) as caught:
        MultipleChoice(path=written(tmp_path, [row]), **more).ask(Scripted({" x": -1.0, " y": -1.0}), "t")
    assert "task.jsonl:1" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"prompt": "{a.b!r}"}, "braces hold the name of a column"),
        ({"prompt": "{"}, "write a literal brace twice"),
        ({"answer_by": "letter"}, "needs {options}"),
        ({"choices": ["one"]}, "needs two choices"),
    ],
)
def test_a_wrong_form_is_refused_in_the_recipe(keys: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        MultipleChoice(path="x.jsonl", **keys)


def test_a_yaml_task_runs_no_code(tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    for text, line in (
        ("task: x\ndoc_to_text: !function utils.f\n", "would run code"),
        ("task: x\ninclude: other.yaml\n", "include is not supported"),
        ("task: x\ndataset_kwargs: {trust_remote_code: true}\n", "trust_remote_code"),
        ("- x\n", "a task of lm-eval is a mapping of keys to values"),
        ("dataset_path: json\n", "must be one task"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=line):
            LmEval(task=str(file)).files()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("task: x\nnum_fewshot: !!int 1x\n", ": not valid YAML: invalid literal for int"),
        ("task: x\nwhen: !!timestamp foo\n", ":2: not valid YAML: values of type tag:yaml.org,2002:timestamp"),
        ("task: x\nwhat: !!python/object/apply:os.getcwd []\n", ""),
        ("task: x\ndataset_kwargs: [1]\n", r"dataset_kwargs is a mapping of keys to values \(got list\)"),
        ("task: x\ndataset_kwargs: []\n", r"dataset_kwargs is a mapping of keys to values \(got list\)"),
        ("task: x\ndataset_kwargs: {data_files: " + "[" * 3000, "nested more than 50 deep"),
        ("task: x\ntask: y\n", "task: written twice"),
        ("task: [x\n", "not valid YAML"),
        ("task: \udcff\n", "cannot be read as text"),
        ("task: x\na: '" + "x" * (1 << 20) + "'\n", "has more than 1,048,576 bytes"),
    ],
)
def test_an_odd_yaml_task_is_one_line(text: str, line: str, tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    if not line:  # the tag of a mapping or a list says nothing: it is read as plain data
        assert LmEval(task=str(file)).config() == {"task": "x", "what": []}
        return
    with pytest.raises(InputError, match=line) as refusal:
        LmEval(task=str(file)).config()
    assert str(refusal.value).startswith(str(file))
    assert "\n" not in str(refusal.value)


def test_a_yaml_task_that_is_no_file_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "task.yaml")
    with pytest.raises(InputError, match="is a named pipe, expected a regular file"):
        LmEval(task=str(tmp_path / "task.yaml")).config()


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_the_missing_extra_is_named_by_its_command(model: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"pip install 'distill-lm\[lm-eval\]'"):
        LmEval().ask(lm(model, tokenizer), "arc_easy")
