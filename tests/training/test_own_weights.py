"""The student as its own teacher: a live copy of its start, without the copy."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.core.errors import InputError
from distill.losses import CrossEntropy, ForwardKL
from distill.quantization.fake_quant import fake_quant_layers
from distill.training.module import DistillationModule
from distill.training.own_weights import OwnWeights

LOSSES = [ForwardKL(temperature=2.0), CrossEntropy(weight=0.5)]


def moved(student: Any) -> Any:
    """The student after some training: adapters that do something."""
    for index, (name, p) in enumerate(student.model.named_parameters()):
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(index))
    student.model.train()
    return student.model


def step(module: DistillationModule, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)  # the dropout of the adapters
    total, terms = module.batch_losses(batch, module.losses)
    total.backward()
    gradients = {name: p.grad for name, p in module.student.named_parameters() if p.grad is not None}
    return total.detach(), gradients | {name: term.sum for name, term in terms.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("way", ["lora", "lora head", "quant lora", "quant lora head", "quant ends lora"])
def test_loss_and_gradient_are_those_of_a_live_copy_of_the_start(
    way: str, checkpointing: bool, student: Any, llama: Any, batch: Any
) -> None:
    settings: dict[str, Any] = {"attention_dropout": 0.5 if not checkpointing else 0.0}
    found = []
    for live in (True, False):
        model = moved(student(way, **settings))
        if checkpointing:
            model.gradient_checkpointing_enable()
        teacher = llama(0, **settings) if live else OwnWeights(model)
        found.append(step(DistillationModule(model, LOSSES, teacher), batch(0, 6)))
    (expected, of_live), (total, of_own) = found
    assert torch.equal(total, expected)
    assert of_own.keys() == of_live.keys()
    for name, value in of_live.items():
        assert torch.equal(of_own[name], value), name
    assert float(of_own["kl"]) > 0


def test_the_student_is_left_as_it_was(student: Any, batch: Any) -> None:
    model = moved(student("quant lora head"))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    module = DistillationModule(model, LOSSES, OwnWeights(model))
    assert module.teacher is not None
    signal = module.teacher.signal(batch(0, 2))
    assert not signal.hidden.requires_grad  # type: ignore[union-attr]
    module.batch_losses(batch(0, 2), module.losses)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert all(part.training for part in model.modules())
    assert all(layer.enabled for layer in fake_quant_layers(model).values())
    assert not any(part.disable_adapters for part in model.modules() if hasattr(part, "lora_A"))
    assert not any("teacher" in name for name in module.state_dict())


def test_training_moves_the_student_and_not_its_teacher(student: Any, train: Any, batch: Any) -> None:
    model = moved(student("quant lora"))
    module = DistillationModule(model, LOSSES, OwnWeights(model), num_steps=6)
    assert module.teacher is not None
    before = deepcopy(module.teacher.signal(batch(0, 2)).hidden)  # type: ignore[union-attr]
    start = model.eval()(input_ids=batch(0, 2)["input_ids"]).logits
    train(module)
    assert torch.equal(module.teacher.signal(batch(0, 2)).hidden, before)  # type: ignore[union-attr]
    assert not torch.equal(model.eval()(input_ids=batch(0, 2)["input_ids"]).logits, start)


@pytest.mark.parametrize("way", ["full", "quant"])
def test_a_student_whose_weights_are_trained_has_no_start(way: str, student: Any) -> None:
    model = student(way).model
    with pytest.raises(
        InputError, match=r"embed_tokens\.weight is trained, so its initial weights are lost; train adapters"
    ):
        DistillationModule(model, LOSSES, OwnWeights(model))
