"""Rows in the order of the teacher's loss: computed once, gone on with after a stop, refused without a teacher."""

import shutil

import numpy as np
import pytest
import torch
import yaml

from distill.core.errors import InputError, RecipeError
from distill.core.run_folder import Run
from distill.models.load import load_model
from distill.recipe import Recipe
from distill.runner import run
from distill.stages import row_scores as of_order
from distill.stages.cache_teacher.fill import first_of
from distill.stages.row_scores import losses_of_teacher
from distill.stages.session import Session, StageContext
from distill.training.row_losses import row_losses

STUDENT = {"kind": "distill", "student": "teacher", "num_steps": 2, "batch_size": 4}


@pytest.fixture
def recipe(text, teacher):
    """Keys of the data section -> a recipe that orders by the teacher's loss."""

    def made(until=1.0, **more):
        data = {"train": {"kind": "jsonl", "path": str(text)}, "sequence_length": 32, "validation_tokens": 64}
        return {
            "name": "r",
            "teacher": str(teacher),
            "data": data | {"order": {"by": "teacher_loss", "until": until}} | more,
            "stages": {"distill": STUDENT},
            "compute": {"accelerator": "cpu"},
            "logging": {"wandb": "disabled"},
        }

    return made


def context_of(recipe, folder, say=lambda _: None):
    """Of its stage, in a run of its own."""
    plan = Recipe.from_text(yaml.safe_dump(recipe), "r")
    session = Session(
        run=Run(folder / "run"), recipe="r", text="", teacher=plan.teacher, data=plan.data, compute=plan.compute,
        logging=plan.logging, seed=0, stages=dict(plan.stages), command="", say=say,
    )  # fmt: skip
    return StageContext(session, "distill", folder / "run" / "distill", "")


@pytest.mark.parametrize("packing", ["wrapped", "padded", "documents"])
def test_the_loss_of_a_row_is_that_of_its_predictions(packing, tmp_path, recipe, teacher):
    context = context_of(recipe(packing=packing), tmp_path)
    blocks = context.session.corpus().train
    model = load_model(str(teacher), dtype="float32")
    found = losses_of_teacher(context, "teacher", 2 * len(blocks), 3)
    assert np.isfinite(found).all()
    for number in range(0, len(blocks), 5):
        batch = blocks[[number]]
        inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[batch["mask"]].double()
        expected = torch.nn.functional.cross_entropy(logits, batch["targets"][batch["mask"]])
        assert found[number] == pytest.approx(expected.item(), rel=1e-4)


def test_a_row_without_predictions_has_no_loss(teacher):
    batch = {"input_ids": torch.arange(8).reshape(2, 4), "targets": torch.ones(2, 4, dtype=torch.long)}
    mask = torch.tensor([[False] * 4, [True, True, False, False]])
    found = row_losses(load_model(str(teacher), dtype="float32"), batch | {"mask": mask})
    assert found[0] == 0
    assert found[1] > 1


def test_only_rows_that_are_sorted_are_read_and_each_once(tmp_path, recipe, monkeypatch):
    said = []
    context = context_of(recipe(until=0.5), tmp_path, said.append)
    corpus, read = context.session.corpus(), []
    original = of_order.row_losses
    monkeypatch.setattr(
        of_order, "row_losses", lambda model, batch: read.append(len(batch["mask"])) or original(model, batch)
    )
    half = len(corpus.train) // 2
    found = losses_of_teacher(context, "teacher", half, 4)
    wanted = first_of(corpus, round(0.5 * half))
    assert np.flatnonzero(np.isfinite(found)).tolist() == wanted
    assert sum(read) == len(wanted)
    assert any(f"teacher reads {len(wanted):,} rows, once" in line for line in said)
    assert np.array_equal(losses_of_teacher(context, "teacher", half, 4), found, equal_nan=True)
    assert sum(read) == len(wanted)
    more = losses_of_teacher(context, "teacher", 2 * half, 4)
    assert np.array_equal(more[wanted], found[wanted])
    assert sum(read) == len(first_of(corpus, half)) == np.isfinite(more).sum()


def test_a_computation_that_is_stopped_goes_on_to_the_last_bit(tmp_path, recipe, monkeypatch):
    straight = losses_of_teacher(context_of(recipe(), tmp_path / "a"), "teacher", 1000, 4)
    context, original, read = context_of(recipe(), tmp_path / "b"), of_order.row_losses, []

    def stops(model, batch):
        if len(read) == 3:
            raise KeyboardInterrupt
        read.append(len(batch["mask"]))
        return original(model, batch)

    monkeypatch.setattr(of_order, "row_losses", stops)
    with pytest.raises(KeyboardInterrupt):
        losses_of_teacher(context, "teacher", 1000, 4)
    monkeypatch.setattr(of_order, "row_losses", lambda *some: read.append(len(some[1]["mask"])) or original(*some))
    resumed = losses_of_teacher(context_of(recipe(), tmp_path / "b"), "teacher", 1000, 4)
    assert np.array_equal(straight, resumed)
    assert sum(read) == len(straight)


def test_a_loss_that_is_not_finite_is_refused(tmp_path, recipe, monkeypatch):
    context = context_of(recipe(), tmp_path)
    monkeypatch.setattr(of_order, "row_losses", lambda _, batch: torch.full((len(batch["mask"]),), torch.nan))
    with pytest.raises(InputError, match="loss of teacher on row 0 is not finite"):
        losses_of_teacher(context, "teacher", 1000, 4)


def test_a_run_is_sorted_and_its_cache_and_own_teacher_serve(tmp_path, recipe):
    """Live, cached and own teacher give the same losses, which are computed once for all of them."""
    stages = {
        "live": STUDENT,
        "cache": {"kind": "cache_teacher"},
        "cached": STUDENT | {"teacher": "cache"},
        "own": STUDENT | {"teacher": "self", "lora": {"r": 2}, "losses": ["forward_kl", "cross_entropy"]},
    }
    said = []
    the_run = run(
        Recipe.from_text(yaml.safe_dump(recipe() | {"stages": stages}), "r"), tmp_path / "run", say=said.append
    )
    lines = [line.strip() for line in said if "data.order" in line]
    assert lines == [
        "data.order: teacher reads 8 rows, once, to sort them by its loss",
        *["data.order: rows come from easy to hard for the teacher for the first 2 steps"] * 3,
    ]
    assert len([*(the_run.folder / "data").glob("row-losses-*.bin")]) == 1


def test_without_a_teacher_it_is_refused(recipe):
    stages = {"train": {"kind": "finetune", "model": "teacher", "num_steps": 1, "batch_size": 1}}
    with pytest.raises(RecipeError, match="order by teacher_loss needs a teacher, which this stage of kind finetune"):
        Recipe.from_text(yaml.safe_dump(recipe() | {"stages": stages}), "r")


def test_a_teacher_with_other_tokens_is_refused(tmp_path, recipe, teacher, new_teacher):
    other = new_teacher(tmp_path / "other", seed=1)
    shutil.copy(teacher / "tokenizer.json", other)
    written = (other / "tokenizer.json").read_text()
    assert '"a"' in written
    (other / "tokenizer.json").write_text(
        written.replace('"a"', '"swap"').replace('"b"', '"a"').replace('"swap"', '"b"')
    )
    with pytest.raises(InputError, match="token"):
        losses_of_teacher(context_of(recipe(), tmp_path), str(other), 1000, 4)
