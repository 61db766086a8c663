"""A stage gives back what it trained with before it does anything else."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.recipe import Recipe
from distill.runner import run
from distill.stages import train
from distill.training.live_teacher import LiveTeacher
from distill.training.module import DistillationModule

RECIPE = """\
name: small
teacher: {teacher}
data: {{train: {{kind: jsonl, path: {text}}}, sequence_length: 16, validation_tokens: 64}}
stages:
  distill: {{student: {teacher}, num_steps: 2, batch_size: 2}}
compute: {{accelerator: cpu}}
logging: {{wandb: disabled}}
"""


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Python's collector does not come by itself."""
    gc.disable()
    yield
    gc.enable()


def test_teacher_and_optimizer_are_gone_when_the_training_is(
    uncollected: None, teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: dict[str, Any] = {}
    made, configured, saved = LiveTeacher.__init__, DistillationModule.configure_optimizers, train.save_plain

    def make(self: LiveTeacher, model: Any, *more: Any) -> None:
        alive["teacher"] = weakref.ref(model)
        made(self, model, *more)

    def configure(self: DistillationModule) -> Any:
        found = configured(self)
        alive["optimizer"] = weakref.ref(found["optimizer"])
        return found

    def save(*args: Any, **more: Any) -> Any:
        left.update({name: reference() is not None for name, reference in alive.items()})
        return saved(*args, **more)

    left: dict[str, bool] = {}
    monkeypatch.setattr(LiveTeacher, "__init__", make)
    monkeypatch.setattr(DistillationModule, "configure_optimizers", configure)
    monkeypatch.setattr(train, "save_plain", save)
    file = tmp_path / "small.yaml"
    file.write_text(RECIPE.format(teacher=teacher, text=text))
    run(Recipe.load(file), tmp_path / "run")
    assert left == {"teacher": False, "optimizer": False}
