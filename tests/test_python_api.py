"""The Python API: its examples run, it does what the stages do, and its mistakes are one line."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader

import distill
from distill.core.errors import InputError
from distill.quantization.fake_quant import fake_quant_layers
from distill.reporting.tradeoff import read_rows, to_json

ROOT = Path(__file__).parents[1]
FUNCTIONS = [name for name, module in distill._PUBLIC.items() if module.startswith("distill.api.")]
TEXTS = ["The cat sat on the mat, and the dog looked at the cat. " * 12, "def f(x):\n    return x + 1\n" * 12]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SAID = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]


@pytest.fixture(scope="module")
def loaded() -> Any:
    return distill.load("builtin:quickstart-teacher")


@pytest.fixture(scope="module")
def teacher(loaded: Any) -> Any:
    return loaded[0]


@pytest.fixture(scope="module")
def tokenizer(loaded: Any) -> Any:
    return loaded[1]


@pytest.fixture(scope="module")
def text(tokenizer: Any) -> Any:
    return distill.batches(TEXTS, tokenizer, sequence_length=32, batch_size=4)


def trainer(tmp_path: Path, **more: Any) -> pl.Trainer:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", logger=CSVLogger(tmp_path), **quiet, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_documented_and_its_example_runs(name: str) -> None:
    function = getattr(distill, name)
    docs = inspect.getdoc(function) or ""
    assert all(heading in docs for heading in ("Args:", "Returns:", "Raises:", "Examples:") if name != "open_run")
    described = set(re.findall(r"^    (\w+): ", docs, re.M))
    assert set(inspect.signature(function).parameters) <= described
    assert all(p.annotation is not inspect.Parameter.empty for p in inspect.signature(function).parameters.values())
    runner = doctest.DocTestRunner(verbose=False)
    module = importlib.import_module(function.__module__)
    for test in doctest.DocTestFinder(recurse=False).find(function, name, globs={**vars(module)}):
        assert test.examples
        assert runner.run(test, out=lambda text: None).failed == 0


def test_the_whole_loop_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.S)
    lines = [line for line in code.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 30
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(compile(code, "docs/python.md", "exec"), found)  # the page of this repository
    rows = found["rows"]
    assert rows.of("student").kl_to_teacher < found["pruned"].of("pruned").kl_to_teacher
    assert found["exported"].verified.worst_kl < 1e-6
    assert {"train/forward_kl", "val/cross_entropy", "val/kl"} <= found["trainer"].logged_metrics.keys() | {
        "val/cross_entropy",
        "val/kl",
    }
    assert "train/forward_kl" in capsys.readouterr().out
    assert (tmp_path / "out" / "student-int4" / "README.md").is_file()


def test_batches_hold_every_token_of_the_texts_once(tokenizer: Any) -> None:
    found = distill.batches(TEXTS, tokenizer, sequence_length=32, batch_size=3)
    ids = torch.cat([row for batch in found for row in batch["input_ids"]])
    spoken = [*tokenizer(TEXTS[0])["input_ids"], tokenizer.eos_token_id, *tokenizer(TEXTS[1])["input_ids"]]
    assert ids[: len(spoken)].tolist() == spoken
    for batch in found:
        targets, mask = batch["targets"], batch["mask"]
        assert torch.equal(targets[:, :-1][mask[:, :-1]], batch["input_ids"][:, 1:][mask[:, :-1]])
    shuffled = distill.batches(TEXTS, tokenizer, sequence_length=32, batch_size=3, shuffle=True, seed=1)
    first, second = ([batch["input_ids"] for batch in shuffled] for _ in range(2))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert sorted(torch.cat(first).tolist()) == sorted(torch.cat(second).tolist())


def test_of_conversations_the_answers_count(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    found = distill.batches([{"messages": SAID}] * 3, tokenizer, sequence_length=64, packing="best_fit")
    batch = next(iter(found))
    learned = batch["targets"][batch["mask"]]
    assert tokenizer.decode(learned).count("Four.") == 3
    assert "Two" not in tokenizer.decode(learned)
    with pytest.raises(InputError, match=r"texts\[1\]: "):
        distill.batches([{"messages": SAID}, {"nothing": 1}], tokenizer)


def test_wrong_texts_are_one_line(tokenizer: Any) -> None:
    for texts, said in (
        ("one text", "got one str, expected a list"),
        ([], "there is none"),
        (["a", ""], r"texts\[1\]: is empty"),
        (["a", {"messages": SAID}], r"texts\[1\]: got dict, expected a string"),
        ([{"messages": SAID}], "tokenizer: it has no chat template"),
    ):
        with pytest.raises(InputError, match=said):
            distill.batches(texts, tokenizer)
    with pytest.raises(InputError, match="expected a fast tokenizer"):
        distill.batches(["a"], object())  # type: ignore[arg-type]


def test_prune_cuts_by_score(teacher: Any, text: Any) -> None:
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    pruned = distill.prune_with_plan(teacher, text, keep={"intermediate_size": "50%", "num_hidden_layers": 3})
    scores, kept = pruned.scores.mlp_neurons, pruned.plan.mlp_neurons
    assert scores is not None
    for layer, row in zip(pruned.plan.layers, kept, strict=True):
        best = scores[layer].argsort(descending=True)[: len(row)]
        assert sorted(row) == sorted(best.tolist())
    old, new = teacher.model.layers[pruned.plan.layers[1]].mlp, pruned.model.model.layers[1].mlp
    assert torch.equal(new.up_proj.weight, old.up_proj.weight[list(kept[1])])
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert pruned.origin.layers == pruned.plan.layers


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"keep": {"intermediate": 4}}, "keep.intermediate: "),
        ({"keep": {"intermediate_size": 10**6}}, "is more than the model has"),
        ({"keep": {}}, "keep names no size"),
        ({"keep": {"vocabulary": 300}}, "use a recipe"),
        ({"keep": {"intermediate_size": "50%"}, "criterion": "nothing"}, "criterion"),
        ({"keep": {"intermediate_size": "50%"}, "depth_criterion": "random"}, "has no effect"),
    ],
)
def test_wrong_arguments_of_prune(teacher: Any, text: Any, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        distill.prune(teacher, text, **arguments)


def test_quantize_ships_what_it_computes_and_trains(teacher: Any, tokenizer: Any, text: Any, tmp_path: Path) -> None:
    low_bit = distill.quantize(teacher, "q4_0", layers=[("*.down_proj", "q8_0")], embeddings="q8_0")
    assert not fake_quant_layers(teacher)
    before = distill.evaluate({"teacher": teacher, "q4_0": low_bit}, text).of("q4_0")
    module = distill.DistillationModule(low_bit, ["forward_kl"], teacher)
    trainer(tmp_path, max_steps=6).fit(module, text)
    after = distill.evaluate({"teacher": teacher, "q4_0": low_bit}, text).of("q4_0")
    assert after.kl_to_teacher is not None
    assert before.kl_to_teacher is not None
    assert after.kl_to_teacher < before.kl_to_teacher
    out = distill.export(low_bit, tokenizer, tmp_path / "hf", batches=text)
    assert not isinstance(out.verified, str)
    assert out.verified.worst_kl < 1e-6
    gguf = distill.export(low_bit, tokenizer, tmp_path / "file", target="gguf", batches=text)
    assert list(Path(gguf).glob("*.gguf"))
    assert gguf.notes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"quantizer": "int5"}, "quantizer"),
        ({"quantizer": {"kind": "int_group", "group_size": 7}}, "group_size"),
        ({"rounding": "gptq"}, "calibration: is missing"),
        ({"calibration": []}, "has no effect"),
        ({"layers": [("nothing", "q8_0")]}, "nothing"),
    ],
)
def test_wrong_arguments_of_quantize(teacher: Any, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        distill.quantize(teacher, **arguments)


def test_calibrated_quantizers_read_the_batches(teacher: Any, text: Any) -> None:
    grid = {"kind": "int_group", "group_size": 32}
    plain, better = distill.quantize(teacher, grid), distill.quantize(teacher, grid, rounding="gptq", calibration=text)
    folded = distill.quantize(teacher, grid, equalize="awq", calibration=text)
    fixed = distill.quantize(teacher, "int8_channel", activations="static_int8", calibration=text)
    models = {"teacher": teacher, "plain": plain, "gptq": better, "awq": folded, "static": fixed}
    rows = distill.evaluate(models, text)
    assert {row.parameters for row in rows} == {1_443_456}
    assert {row.non_embedding_parameters for row in rows} == {rows[0].non_embedding_parameters}
    assert rows.of("gptq").scheme == "int4, group 32; embeddings int8, group 32"
    kl = {row.name: row.kl_to_teacher or 0.0 for row in rows}
    assert kl["teacher"] < 1e-6 < kl["static"]
    assert kl["gptq"] < kl["plain"]
    assert 0 < kl["awq"] != kl["plain"]


def test_evaluate_counts_bytes_and_writes_rows_as_a_stage_does(teacher: Any, text: Any, tmp_path: Path) -> None:
    rows = distill.evaluate({"teacher": teacher}, text)
    (row,) = rows
    assert row.bits_per_byte is not None
    assert row.loss_nats is not None
    num_bytes, num_tokens = text.dataset.bytes_of_rows().sum(), text.dataset.num_predictions()
    assert row.bits_per_byte == pytest.approx(row.loss_nats * num_tokens / num_bytes / 0.6931471805599453)
    (tmp_path / "rows.json").write_text(to_json(rows))
    assert read_rows(tmp_path / "rows.json") == rows
    assert rows._repr_markdown_().startswith("| Model |")
    with pytest.raises(InputError, match="no model 'big'"):
        distill.evaluate({"small": teacher}, text, teacher="big")
    with pytest.raises(InputError, match="no 'targets'"):
        distill.evaluate({"teacher": teacher}, [{"input_ids": torch.zeros(1, 2, dtype=torch.long)}])
    with pytest.raises(KeyError, match="measured are teacher"):
        rows.of("student")


def test_a_cached_teacher_teaches_what_the_live_one_does(
    teacher: Any, tokenizer: Any, text: Any, tmp_path: Path
) -> None:
    student = distill.prune(teacher, text, keep={"intermediate_size": "50%"})
    cached = distill.cache_teacher(teacher, text, tmp_path / "cache", validation=text, codec="hidden")
    again = distill.cache_teacher(teacher, text, tmp_path / "cache", validation=text, codec="hidden")
    losses = {}
    for name, source, batches in (("live", teacher, text), ("cached", again.teacher, again.batches)):
        module = distill.DistillationModule(student, ["forward_kl"], source)
        run = trainer(tmp_path)
        run.validate(module, again.validation if name == "cached" else text, verbose=False)
        losses[name] = float(run.logged_metrics["val/kl"])
        module.on_fit_start = lambda: None  # type: ignore[method-assign]
        batch = module.on_before_batch_transfer(next(iter(batches)), 0)
        total, _ = module.batch_losses(batch, module.losses)
        losses[f"{name} step"] = float(total.detach())
    assert losses["cached"] == pytest.approx(losses["live"], rel=1e-2)  # hidden states are kept in bfloat16
    assert losses["cached step"] == pytest.approx(losses["live step"], rel=1e-2)
    assert cached.fidelity == again.fidelity
    other = distill.batches(["Another text. " * 20], tokenizer, sequence_length=32)
    with pytest.raises(InputError, match="another text"):
        distill.cache_teacher(teacher, other, tmp_path / "cache", codec="hidden")
    with pytest.raises(InputError, match=r"expected the result of distill\.batches"):
        distill.cache_teacher(teacher, list(text), tmp_path / "other")  # type: ignore[arg-type]


def test_export_says_what_is_wrong(teacher: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="target"):
        distill.export(teacher, tokenizer, tmp_path / "x", target="ggml")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        distill.export(teacher, tokenizer, tmp_path / "file")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_module_logs_its_losses_by_itself(teacher: Any, text: Any, tmp_path: Path, accumulated: int) -> None:
    student = distill.prune(teacher, text, keep={"intermediate_size": "50%"})
    module = distill.DistillationModule(student, [distill.losses.ForwardKL(), "cross_entropy"], teacher)
    run = trainer(tmp_path, max_steps=4, max_epochs=9, log_every_n_steps=2, accumulate_grad_batches=accumulated)
    run.fit(module, text, text)
    assert {"train/forward_kl", "train/cross_entropy", "val/kl", "val/cross_entropy"} <= run.logged_metrics.keys()
    lines = (Path(run.logger.log_dir) / "metrics.csv").read_text().splitlines()  # type: ignore[union-attr, arg-type]
    head, *rows = [line.split(",") for line in lines]
    written = [row for row in rows if row[head.index("train/forward_kl")]]
    assert [int(row[head.index("step")]) for row in written] == [1, 3]


def test_batches_of_transformers_collators_are_converted(teacher: Any, text: Any) -> None:
    own = next(iter(text))
    labels = torch.full_like(own["input_ids"], -100)
    labels[:, 1:] = torch.where(own["mask"][:, :-1], own["targets"][:, :-1], -100)
    module = distill.DistillationModule(teacher, ["cross_entropy"])
    theirs = module.on_before_batch_transfer({"input_ids": own["input_ids"], "labels": labels}, 0)
    assert torch.equal(theirs["mask"], own["mask"])
    assert torch.equal(theirs["targets"][own["mask"]], own["targets"][own["mask"]])
    with pytest.raises(InputError, match="expected input_ids, targets and mask"):
        module.on_before_batch_transfer({"input_ids": own["input_ids"]}, 0)
    with pytest.raises(InputError, match="no loss 'kl'"):
        distill.DistillationModule(teacher, ["kl"])
    assert isinstance(text, DataLoader)
