"""lm-evaluation-harness beside our own forms, on the same items and model; needs the extra distill-lm[lm-eval]."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from distill.core.errors import InputError
from distill.data.chat_spec import ChatSpec
from distill.data.tokenizer import train_tokenizer
from distill.evaluation.tasks import Cloze, Generate, LmEval, MultipleChoice
from distill.evaluation.tasks.in_memory import ModelInMemory
from distill.models.load import new_config, new_model

YAML = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
{more}
metadata: {{version: 1}}
"""
CHOICES = """\
doc_to_text: "{{query}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
- {metric: acc, aggregation: mean, higher_is_better: true}
- {metric: acc_norm, aggregation: mean, higher_is_better: true}"""
WORD = """\
doc_to_text: "{{context}}"
doc_to_target: " {{continuation}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""
WRITE = """\
doc_to_text: "{{query}}"
doc_to_target: "{{continuation}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}]"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelInMemory, Path]:
    folder = tmp_path_factory.mktemp("harness")
    words = ["alpha beta gamma delta", "one two three", "the answer is no", "question of letters"]
    tokenizer = train_tokenizer(words * 20, 300, folder / "tokenizer")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    keys = {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.4}
    model = new_model(new_config(keys | sizes | {"vocab_size": len(tokenizer)}), seed=0).train()
    generator, pool = random.Random(0), [word for line in words for word in line.split()]
    rows = []
    for number in range(30):
        choices = generator.sample(pool, 3)
        gold = generator.randrange(3)
        context = " ".join(generator.choices(pool, k=6))
        rows.append(
            {"query": f"question {number} of", "choices": choices, "gold": gold, "context": context,
             "continuation": choices[gold]}
        )  # fmt: skip
    file = folder / "q.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ModelInMemory(model, tokenizer, chat=ChatSpec(), batch_tokens=512), file


def harness(file: Path, name: str, kind: str, more: str, **keys: Any) -> LmEval:
    place = file.with_name(f"{name}.yaml")
    place.write_text(YAML.format(name=name, file=file, kind=kind, more=more))
    return LmEval(task=str(place), **keys)


def test_choices_have_the_log_likelihoods_of_the_harness(asked: tuple[ModelInMemory, Path]) -> None:
    lm, file = asked
    ours = MultipleChoice(path=str(file), prompt="{query}\nAnswer:", limit=20, seed=5).ask(lm, "t")
    state = random.getstate()
    theirs = harness(file, "choices", "multiple_choice", CHOICES, limit=20, seed=5).ask(lm, "t")
    assert random.getstate() == state
    assert lm.model.training  # both are left as they came
    assert [int(one.id.rpartition(":")[2]) - 1 for one in ours.answers] == [
        int(one.id.rpartition(":")[2]) for one in theirs.answers
    ]
    for one, other in zip(ours.answers, theirs.answers, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-4)
        assert (one.right, one.normalized_right) == (other.right, other.normalized_right)
    assert theirs.chance == pytest.approx(1 / 3)
    assert theirs.version.startswith("lm-eval 0.4")


def test_last_words_too(asked: tuple[ModelInMemory, Path]) -> None:
    lm, file = asked
    ours = Cloze(path=str(file)).ask(lm, "t")
    theirs = harness(file, "word", "loglikelihood", WORD).ask(lm, "t")
    for one, other in zip(ours.answers, theirs.answers, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-4)
        assert one.right == other.right


def test_written_answers_too(asked: tuple[ModelInMemory, Path]) -> None:
    lm, file = asked
    ours = Generate(path=str(file), prompt="{query}", answer="continuation", max_new_tokens=4).ask(lm, "t")
    theirs = harness(file, "write", "generate_until", WRITE).ask(lm, "t")
    assert [one.answer for one in ours.answers] == [one.answer.strip() for one in theirs.answers]
    assert [one.right for one in ours.answers] == [one.right for one in theirs.answers]


def test_what_it_cannot_ask_is_one_line(asked: tuple[ModelInMemory, Path]) -> None:
    lm, file = asked
    with pytest.raises(InputError, match="there is no filter 'strict'"):
        harness(file, "choices", "multiple_choice", CHOICES, filter="strict").ask(lm, "t")
    with pytest.raises(InputError, match="lm-eval cannot run this task here"):
        harness(file, "broken", "multiple_choice", CHOICES.replace(": gold", ': "{{nothing|int}}"')).ask(lm, "t")


def test_templates_and_metrics_run_no_code(asked: tuple[ModelInMemory, Path], tmp_path: Path) -> None:
    lm, file = asked
    mark = tmp_path / "mark"
    reach = f"{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}"
    for spec, line in (
        (harness(file, "reach", "multiple_choice", CHOICES.replace("{{query}}", reach)), "unsafe"),
        (harness(file, "hub", "multiple_choice", CHOICES.replace("metric: acc,", "metric: someone/metric,")), "own"),
        (harness(file, "evaluate", "loglikelihood", WORD.replace("mean,", "mean, hf_evaluate: true,")), "own"),
    ):
        with pytest.raises(InputError, match=line):
            spec.ask(lm, "t")
        assert not mark.exists()


def test_a_wrong_task_is_found_without_a_model(asked: tuple[ModelInMemory, Path]) -> None:
    _, file = asked
    harness(file, "right", "loglikelihood", WORD).rehearse("t")
    with pytest.raises(InputError, match="not one of lm-eval's own"):
        harness(file, "hub", "loglikelihood", WORD.replace("metric: acc,", "metric: accc,")).rehearse("t")
