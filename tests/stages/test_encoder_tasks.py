"""Tasks of encoders in whole runs of a tiny BERT: trained, cut, distilled, measured, exported and reported."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from distill.core.errors import DistillError, InputError, RecipeError
from distill.core.run_folder import Run
from distill.core.tasks import Classification, Embedding
from distill.evaluation.transformers_engine import TransformersEngine
from distill.exporters.plain_transformers import _logits
from distill.forecast import describe
from distill.models.configs import positions_of
from distill.models.head import hidden_states
from distill.models.head_names import ENCODERS
from distill.models.layouts import layout_of
from distill.models.sentence_files import read_length, read_pooling, write_sentence_files
from distill.models.task_models import load_for_task
from distill.pruning import LeaveOneOut, Taylor
from distill.pruning.layout import config_of
from distill.pruning.observe import masked_batches
from distill.recipe import Recipe
from distill.reporting.tradeoff import Row, read_rows
from distill.runner import run
from distill.show_data import show
from distill.training.assemble import assemble

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

RECIPE = """\
name: tiny
task: {task}
teacher: {teacher}
data:
  train: {{kind: jsonl, path: {folder}/train.jsonl}}
  validation: {{kind: jsonl, path: {folder}/valid.jsonl}}
  sequence_length: 16
  calibration_sequences: 8
stages:
{stages}
compute: {{accelerator: cpu, log_every_steps: 1, checkpoint_every_steps: 100}}
logging: {{wandb: disabled}}
"""
TAUGHT = """\
  tune: {{kind: finetune, model: teacher, num_steps: 12, batch_size: 8, optimizer: {{lr: 5e-3, warmup_steps: 0}}}}
  prune: {{model: tune, keep: {{num_hidden_layers: 2, intermediate_size: 32}}}}
  distill:
    {{student: prune, teacher: tune, num_epochs: 0.5, batch_size: 8, losses: {losses}, optimizer: {{lr: 1e-2}}}}
  alone: {{kind: finetune, model: prune, num_steps: 1, batch_size: 8}}
  plain: {{kind: export, model: distill}}
  evaluate: {{teacher: tune, models: [tune, prune, distill], controls: [alone], speed: null}}
  report: {{}}
"""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A body without a head, as encoders of sentences are published."""
    folder = tmp_path_factory.mktemp("encoder")
    words = Tokenizer(models.WordPiece({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    # as all-MiniLM-L6-v2 has it: settings of another program, which must not reach any row
    words.enable_padding(length=12)
    words.enable_truncation(12)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=32, hidden_dropout_prob=0.1, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    random = torch.Generator().manual_seed(0)
    for name, count in (("train", 64), ("valid", 24)):
        lines = []
        for _ in range(count):
            size = int(torch.randint(4, 10, (1,), generator=random))
            drawn = [int(i) for i in torch.randint(0, len(WORDS), (size,), generator=random)]
            lines.append(
                {
                    "text": " ".join(f"w{i}" for i in drawn),
                    "other": f"w{drawn[0]} w{drawn[-1]}",
                    "label": "early" if drawn[0] < 20 else "late",
                    "third": "abc"[drawn[0] % 3],
                    "score": drawn[0] / 40,
                    "words": [f"w{i}" for i in drawn],
                    "labels": ["B-X" if i < 10 else "I-X" if i < 20 else "O" for i in drawn],
                }
            )
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write(task: str, stages: str, encoder: Path, rows: Path) -> Recipe:
    return Recipe.from_text(RECIPE.format(task=task, teacher=encoder, folder=rows, stages=stages.rstrip()))


def rows_of(done: Run) -> dict[str, Row]:
    return {row.name: row for row in read_rows(done.stage("evaluate") / "rows.json")}


CASES: dict[str, tuple[str, str, Any, list[str]]] = {
    "classification": (
        "{kind: classification, text_pair: other}",
        "[{kind: forward_kl, temperature: 2}, {kind: cross_entropy, weight: 0.1}, hidden_mse, attention_relation]",
        AutoModelForSequenceClassification,
        ["accuracy", "macro_f1", "matthews", "kl_to_teacher"],
    ),
    "regression": (
        "{kind: regression, label: score}",
        "[score_mse, {kind: label_mse, weight: 0.5}, hidden_cosine]",
        AutoModelForSequenceClassification,
        ["pearson", "spearman"],
    ),
    "token_classification": (
        "token_classification",
        "[forward_kl, cross_entropy]",
        AutoModelForTokenClassification,
        ["accuracy", "macro_f1", "span_f1", "kl_to_teacher"],
    ),
    "masked_lm": (
        "masked_lm",
        "[forward_kl, cross_entropy]",
        AutoModelForMaskedLM,
        ["accuracy", "perplexity", "kl_to_teacher", "top1_agreement"],
    ),
    "masked_lm, all positions": (
        "{kind: masked_lm, positions: all, mask: {rare_words: 0.7}}",
        "[{kind: forward_kl, weight: 5, temperature: 2}, {kind: cross_entropy, weight: 2}, "
        "{kind: hidden_cosine, layers: last}]",
        AutoModelForMaskedLM,
        ["accuracy", "perplexity", "kl_to_teacher"],
    ),
}


ALIKE = {"masked_lm, all positions", "regression"}
"""Tasks whose stages differ from those of another task in losses or metrics only."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive) if name in ALIKE else name for name in CASES]
)
def test_a_task_goes_through_all_stages(name: str, encoder: Path, rows: Path, tmp_path: Path) -> None:
    task, losses, loader, figures = CASES[name]
    recipe = write(task, TAUGHT.format(losses=losses), encoder, rows)
    assert f"task: {recipe.task.kind}" in describe(recipe)
    said: list[str] = []
    done = run(recipe, tmp_path, say=said.append)
    # what is trained is a plain folder with the head, which knows its classes
    plain = next(path for path in (done.stage("plain")).iterdir() if path.is_dir())
    model, report = loader.from_pretrained(plain, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.num_hidden_layers == 2
    classes = {"classification": ["early", "late"], "token_classification": ["B-X", "I-X", "O"]}.get(name)
    if classes is not None:
        assert [model.config.id2label[at] for at in range(len(classes))] == classes
    measured = rows_of(done)
    for row in measured.values():
        assert [key for key in figures if getattr(row, key) is None] == []
    assert measured["tune"].kl_to_teacher in (None, pytest.approx(0, abs=1e-6))
    assert {key for key, error in measured["distill"].errors.items() if error > 0} & {*figures}
    figures_of = {stage: json.loads((done.stage(stage) / "metrics.jsonl").read_text().splitlines()[-1]) for stage in
                  ("tune", "distill")}  # fmt: skip
    assert figures_of["distill"]["step"] == 4  # half of 64 rows in batches of 8
    page = (done.stage("report") / "report.md").read_text()
    assert "Accuracy" in page or "Pearson" in page
    if name == "classification":
        scores = json.loads((done.stage("evaluate") / "tasks.json").read_text())
        assert {(pair["first"], pair["second"]) for pair in scores["pairs"]} >= {
            ("tune", "distill"),
            ("alone", "distill"),
        }
    lines = [json.loads(line) for line in (done.stage("tune") / "metrics.jsonl").read_text().splitlines()]
    loss = "label_mse" if name == "regression" else "cross_entropy"
    begun = max(lines[0][f"train/{loss}"], next(line[f"val/{loss}"] for line in lines if f"val/{loss}" in line))
    assert lines[-1][f"val/{loss}"] < begun  # it has learned something


def test_embeddings_are_learned_from_a_teacher_alone(encoder: Path, rows: Path, tmp_path: Path) -> None:
    stages = """\
  prune: {model: teacher, keep: {layers: [0, 2]}}
  distill: {student: prune, num_steps: 12, batch_size: 8, losses: [embedding_cosine], optimizer: {lr: 3e-3}}
  plain: {kind: export, model: distill}
  evaluate: {speed: null}
  report: {}
"""
    done = run(write("{kind: embedding, label: label}", stages, encoder, rows), tmp_path, say=lambda _: None)
    measured = rows_of(done)
    assert measured["teacher"].embedding_cosine == pytest.approx(1, abs=1e-5)
    assert measured["teacher"].neighbours_shared == 1
    assert measured["distill"].embedding_cosine > measured["prune"].embedding_cosine + 0.02
    assert measured["distill"].knn_accuracy is not None
    assert measured["distill"].perplexity is None
    plain = next(path for path in done.stage("plain").iterdir() if path.is_dir())
    assert json.loads((plain / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"] is True
    assert [one["type"].rpartition(".")[2] for one in json.loads((plain / "modules.json").read_text())] == [
        "Transformer", "Pooling", "Normalize",
    ]  # fmt: skip
    model, report = AutoModel.from_pretrained(plain, output_loading_info=True)
    assert not report["missing_keys"]
    assert model.config.num_hidden_layers == 2
    other = write("{kind: embedding, pooling: cls}", "  evaluate: {speed: null}\n", plain, rows)
    with pytest.raises(InputError, match="makes embeddings with pooling: mean"):
        run(other, tmp_path / "other", say=lambda _: None)


def test_a_run_that_was_stopped_hides_the_same_tokens(encoder: Path, rows: Path, tmp_path: Path) -> None:
    """Weights are bit for bit those of a run that was not stopped."""
    stages = """\
  tune:
    {{kind: finetune, model: teacher, num_steps: 4, batch_size: 8, validate_every_steps: 4, optimizer: {{lr: 1e-3}}}}
"""
    recipe = write("{kind: masked_lm, positions: all, mask: {rare_words: 0.7}}", stages.format(), encoder, rows)
    recipe = recipe.model_copy(update={"compute": recipe.compute.model_copy(update={"checkpoint_every_steps": 2})})
    whole = run(recipe, tmp_path / "whole", say=lambda _: None)

    class Stop(Exception):
        pass

    from distill.training.module import DistillationModule

    kept = DistillationModule.on_train_batch_start

    def stop_at_third(module: Any, batch: Any, index: int) -> None:
        if module.trainer.global_step == 3:
            raise Stop
        kept(module, batch, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationModule, "on_train_batch_start", stop_at_third)
        with pytest.raises(Stop):
            run(recipe, tmp_path / "stopped", say=lambda _: None)
    said: list[str] = []
    again = run(recipe, tmp_path / "stopped", say=said.append)
    assert any("resuming from step 2 of 4" in line for line in said)
    files = [one.stage("tune") / "model" / "model.safetensors" for one in (whole, again)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("task", "stages", "match"),
    [
        ("classification", "  a: {kind: distill, student: teacher, num_steps: 1}\n", "has no head for task: class"),
        ("embedding", "  a: {kind: finetune, model: teacher, num_steps: 1}\n", "embedding has no labels to train on"),
        (
            "classification",
            "  a: {kind: quantize, student: teacher, num_steps: 0}\n",
            "quantize cannot be used with task",
        ),
        ("masked_lm", "  a: {kind: cache_teacher}\n", "cache_teacher cannot be used with task: masked_lm"),
        ("masked_lm", "  a: {kind: finetune, model: teacher, num_steps: 1, lora: {}}\n", "lora cannot be used with"),
        ("masked_lm", "  a: {kind: sparsify, model: teacher}\n", "sparsify cannot be used with task: masked_lm"),
    ],
)
def test_check_refuses_what_a_task_cannot_do(task: str, stages: str, match: str, encoder: Path, rows: Path) -> None:
    with pytest.raises(DistillError, match=match):
        describe(write(task, stages, encoder, rows))


@pytest.mark.parametrize(
    ("task", "losses", "match"),
    [
        ("regression", "[forward_kl]", "forward_kl does not fit task: regression; use score_mse or label_mse"),
        ("embedding", "[score_mse]", "score_mse does not fit task: embedding; use embedding_cosine"),
        ("classification", "[embedding_cosine]", "embedding_cosine does not fit task: classification"),
        ("{kind: masked_lm, positions: all}", "[decoupled_kd]", "decoupled_kd reads the text and the teacher at the"),
    ],
)
def test_losses_that_do_not_fit_the_task_are_mistakes(
    task: str, losses: str, match: str, encoder: Path, rows: Path
) -> None:
    stages = f"  a: {{kind: distill, student: teacher, num_steps: 1, losses: {losses}}}\n"
    with pytest.raises(RecipeError, match=match):
        write(task, stages, encoder, rows)


def test_a_head_with_other_classes_is_refused(encoder: Path, rows: Path, tmp_path: Path) -> None:
    stages = "  tune: {kind: finetune, model: teacher, num_steps: 1, batch_size: 2}\n"
    done = run(write("classification", stages, encoder, rows), tmp_path / "one", say=lambda _: None)
    tuned = Path(done.model("tune").location)
    for task, match in (
        ("{kind: classification, label: third}", r"head has 2 classes \(early, late\), the data"),
        ("{kind: classification, classes: [late, early]}", r"set task.classes: \[early, late\]"),
        ("{kind: regression, label: score}", "predicts 2 classes, and task: regression one number"),
    ):
        with pytest.raises(InputError, match=match):
            run(write(task, stages, tuned, rows), tmp_path / "two", say=lambda _: None)


def test_a_pooler_that_no_embedding_reads_is_not_trained(encoder: Path, tmp_path: Path) -> None:
    """A parameter that is trained but gets no gradient stops a run on several GPUs."""
    model = assemble(load_for_task(str(encoder), Embedding())).model
    ids, mask = torch.arange(6).unsqueeze(0) + 5, torch.ones(1, 6, dtype=torch.int64)
    hidden_states(model, ids, attention_mask=mask).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    # a pooler that the folder lacks follows from the seed, and the draw changes no other random numbers
    BertModel.from_pretrained(encoder, add_pooling_layer=False).save_pretrained(tmp_path)
    state = torch.get_rng_state()
    first = load_for_task(str(tmp_path), Embedding(), new_head=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again, other = (load_for_task(str(tmp_path), Embedding(), new_head=seed) for seed in (3, 4))
    assert torch.equal(first.pooler.dense.weight, again.pooler.dense.weight)
    assert not torch.equal(first.pooler.dense.weight, other.pooler.dense.weight)


@pytest.fixture(scope="module")
def roberta() -> RobertaForSequenceClassification:
    config = RobertaConfig(
        vocab_size=45, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=18, type_vocab_size=1, num_labels=1, initializer_range=0.2,
    )  # fmt: skip
    return RobertaForSequenceClassification(config).eval()


def test_a_pair_is_read_by_an_encoder_with_one_token_type(roberta: Any) -> None:
    """RoBERTa takes token types, and has no embedding of the second one."""
    ids, kinds = torch.arange(5, 11).unsqueeze(0), torch.tensor([[0, 0, 0, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = roberta(**batch).logits
        batch |= {"token_type_ids": kinds}
        assert torch.equal(_logits(roberta, batch)[:, 0], expected)
        torch.testing.assert_close(
            torch.from_numpy(TransformersEngine(roberta).row(ids[0].tolist(), 3)), expected, rtol=1e-5, atol=1e-6
        )
        hidden_states(roberta, **batch)
    batch |= {"mask": torch.ones(1, 1, dtype=torch.bool), "targets": torch.zeros(1, 1, dtype=torch.int64)}
    ((inputs, _, _),) = masked_batches(roberta, [batch], layout_of(config_of(roberta)), predicted=True)
    assert sorted(inputs) == ["attention_mask", "input_ids"]


def test_encoders_without_a_layout_are_known_by_name(encoder: Path, rows: Path, tmp_path: Path) -> None:
    assert {*MODEL_FOR_MASKED_LM_MAPPING_NAMES} == ENCODERS
    stages = "  a: {kind: finetune, model: teacher, num_steps: 1}\n"
    for kind, names in (("deberta-v2", []), ("modernbert", ["ModernBertModel"]), ("xlm-roberta", ["XLMRobertaModel"])):
        config = {"model_type": kind, "architectures": names, "hidden_size": 32, "vocab_size": 45}
        (tmp_path / "config.json").write_text(json.dumps(config))
        for file in encoder.glob("tokenizer*"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        describe(write("classification", stages, tmp_path, rows))


def test_a_teacher_of_embeddings_is_cut_to_the_tokens_of_its_student(encoder: Path, rows: Path, tmp_path: Path) -> None:
    words = Path(tmp_path / "rows")
    words.mkdir()
    for name, first in (("train", 0), ("valid", 40)):
        lines = [json.dumps({"text": f"w{i % 7} w{i % 5} w{i % 3}"}) + "\n" for i in range(first, first + 40)]
        (words / f"{name}.jsonl").write_text("".join(lines))
    teacher = tmp_path / "teacher"
    shutil.copytree(encoder, teacher)
    write_sentence_files(teacher, width=32, pooling="mean", normalize=True, max_length=9)
    stages = """\
  prune: {model: teacher, keep: {layers: [0, 2], vocabulary: used}}
  distill: {student: prune, num_steps: 1, batch_size: 4, losses: [embedding_cosine]}
"""
    done = run(write("embedding", stages, teacher, words), tmp_path, say=lambda _: None)
    made = done.model("distill").location
    assert AutoModel.from_pretrained(made).config.vocab_size < 45
    assert read_pooling(made) == ("mean", True)
    assert read_length(made) == 9  # as the teacher has it


def test_classes_without_names_need_an_order(encoder: Path, tmp_path: Path) -> None:
    config = BertConfig.from_pretrained(encoder, num_labels=3)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    names = ("a", "b", "c")
    with pytest.raises(InputError, match=r"no names \(LABEL_0 to LABEL_2\).* set task.classes .*a, b, c"):
        load_for_task(str(tmp_path), Classification(), names)
    stated = load_for_task(str(tmp_path), Classification(classes=("c", "a", "b")), ("c", "a", "b"))
    assert stated.config.id2label == {0: "c", 1: "a", 2: "b"}
    assert stated.config.label2id == {"c": 0, "a": 1, "b": 2}
    assert load_for_task(str(tmp_path), Classification(), ("0", "1", "2")).config.id2label[1] == "1"


def test_positions_of_padding_are_not_counted(encoder: Path, rows: Path, roberta: Any, tmp_path: Path) -> None:
    """18 embeddings of positions, of which the first two are for padding."""
    assert positions_of(roberta.config.to_dict()) == 16
    assert positions_of({"model_type": "bert", "max_position_embeddings": 18, "pad_token_id": 0}) == 18
    roberta(torch.full((1, 16), 7))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(torch.full((1, 17), 7))
    config = {**roberta.config.to_dict(), "max_position_embeddings": 17}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file in encoder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=r"sequence_length \(16\) is longer than the model's 15 positions"):
        describe(write("regression", "  a: {kind: finetune, model: teacher, num_steps: 1}\n", tmp_path, rows))


def test_a_regression_is_scored_by_its_squared_error(roberta: Any) -> None:
    random = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(5, 45, (6, 7), generator=random), torch.randn(6, 1, generator=random)
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "targets": targets,
        "mask": torch.ones(6, 1, dtype=torch.bool),
    }  # fmt: skip
    layout, blocks = layout_of(config_of(roberta)), roberta.roberta.encoder.layer

    def error() -> float:
        with torch.no_grad():
            return (roberta(ids).logits - targets).square().mean().item()

    scores = LeaveOneOut().score(roberta, layout, [batch]).layers
    whole = error()
    for layer in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks[layer], "forward", lambda states, *_, **__: states)
            assert scores[layer].item() == pytest.approx(error() - whole, rel=1e-3, abs=1e-6)
    neurons = Taylor().score(roberta, layout, [batch]).mlp_neurons
    gradient = torch.zeros(6)
    for row in range(6):  # the derivative with respect to a factor of the neuron's column, row by row
        weight = blocks[1].output.dense.weight
        loss = (roberta(ids[[row]]).logits - targets[[row]]).square().sum()
        gradient[row] = (torch.autograd.grad(loss, weight)[0] * weight)[:, 3].sum()
    assert neurons[1, 3].item() == pytest.approx(gradient.abs().mean().item(), rel=1e-3)
    with pytest.raises(InputError, match="loss: kl compares distributions, and a regression predicts a number"):
        LeaveOneOut(loss="kl").score(roberta, layout, [batch])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"embedding_dimension": 8, "pooling_mode": "mean", "include_prompt": True}, ("mean", True)),
        ({"embedding_dimension": 8, "pooling_mode": "cls"}, ("cls", True)),
        ({"word_embedding_dimension": 8, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True},
         ("mean", True)),
        ({"pooling_mode": ["mean", "max"]}, "pools by mean and max"),
        ({"pooling_mode": "lasttoken"}, "pools by lasttoken"),
        ({"pooling_mode_max_tokens": True}, "pools by max_tokens"),
    ],
)  # fmt: skip
def test_pooling_is_read_as_all_releases_write_it(config: Any, expected: Any, tmp_path: Path) -> None:
    write_sentence_files(tmp_path, width=8, pooling="cls", normalize=True, max_length=9)
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            read_pooling(str(tmp_path))
        return
    assert read_pooling(str(tmp_path)) == expected
    modules = json.loads((tmp_path / "modules.json").read_text())
    behind = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    for text, match in (
        (json.dumps([*modules, behind]), "has a module 'Dense'"),
        ("[{", "modules.json: cannot be read as JSON"),
        ("{}", "modules.json: holds dict, expected a JSON list"),
    ):
        (tmp_path / "modules.json").write_text(text)
        with pytest.raises(InputError, match=match):
            read_pooling(str(tmp_path))


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("{kind: classification, text_pair: other}", ["9 tokens, one prediction", "predicted: late"]),
        ("{kind: regression, label: score}", ["6 tokens, one prediction", "predicted: 0.5"]),
        ("token_classification", ["6 tokens, 4 predicted", "predicted: O, I-X, B-X, I-X"]),
        ("masked_lm", ["6 tokens, 1 predicted", "\u27e6[MASK]\u27e7"]),
        ("embedding", ["6 tokens, one prediction"]),
    ],
)
def test_rows_are_shown_as_they_are_trained(
    task: str, said: list[str], encoder: Path, rows: Path, tmp_path: Path
) -> None:
    printed = StringIO()
    recipe = write(task, "  evaluate: {models: [teacher], speed: null}\n", encoder, rows)
    show(recipe, tmp_path, 1, Console(file=printed, width=200))
    assert [words for words in said if words not in printed.getvalue()] == []


@pytest.mark.parametrize(
    ("task", "stages", "said"),
    [
        ("{kind: classification, label: lable}", "tune", r"data\.train: 64 of 64 rows .* no column 'lable'"),
        ("{kind: regression, label: label}", "tune", r"data\.train: 64 of 64 rows .* must hold a finite number"),
        ("classification", "tune, all", r"evaluate: .* has no head for task: classification; train one first"),
    ],
)
def test_check_finds_what_the_run_would_find_late(task: str, stages: str, said: str, encoder: Path, rows: Path) -> None:
    tune = "  tune: {kind: finetune, model: teacher, num_steps: 1, batch_size: 8}\n"
    measured = "{speed: null}" if "all" in stages else "{teacher: tune, speed: null}"
    with pytest.raises(InputError, match=said):
        describe(write(task, f"{tune}  evaluate: {measured}\n", encoder, rows))


def test_a_new_model_gets_the_head_of_the_task(encoder: Path, rows: Path) -> None:
    sizes = "hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32, type_vocab_size: 2"
    new = f"  new: {{kind: finetune, model: {{config: {{model_type: bert, {sizes}, max_position_embeddings: 32}}}}, "
    stages = new + "num_steps: 1, batch_size: 8}\n  evaluate: {teacher: new, speed: null}\n"
    assert "[2/2] evaluate" in describe(write("classification", stages, encoder, rows))
