from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from distill.losses import CrossEntropy, ForwardKL, ReverseKL
from distill.training.spec import BudgetSpec, ComputeSpec, DistillSpec, OptimizerSpec


def test_cosine_warms_up_and_ends_at_its_floor() -> None:
    spec = OptimizerSpec(warmup_steps=4, min_lr_ratio=0.2)
    factors = [spec.factor(step, 24) for step in range(25)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[14] == pytest.approx(0.2 + 0.8 / 2)
    assert factors[9] == pytest.approx(0.2 + 0.8 * (0.5 + math.sqrt(2) / 4))
    assert factors[24] == pytest.approx(0.2)
    assert spec.factor(1000, 24) == pytest.approx(0.2)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_linear_constant_and_no_warmup() -> None:
    linear = OptimizerSpec(warmup_steps=0, schedule="linear", min_lr_ratio=0.0)
    assert [linear.factor(step, 4) for step in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    constant = OptimizerSpec(warmup_steps=1, schedule="constant")
    assert [constant.factor(step, 4) for step in range(5)] == [0.5, 1, 1, 1, 1]


def test_warmup_is_a_twentieth_when_unset_and_may_fill_the_run() -> None:
    assert [OptimizerSpec().factor(step, 100) for step in range(6)] == pytest.approx([n / 6 for n in range(1, 7)])
    assert OptimizerSpec().factor(0, 5) == 1.0
    assert [OptimizerSpec(warmup_steps=9).factor(step, 3) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])
    assert OptimizerSpec(warmup_steps=3).factor(3, 3) == 1.0


def test_the_budget_is_given_once() -> None:
    for settings in ({}, {"num_tokens": 10, "num_steps": 1}):
        with pytest.raises(ValidationError, match="num_tokens, num_steps or num_epochs"):
            BudgetSpec(**settings)
    assert BudgetSpec(num_steps=7).steps(128) == 7
    assert BudgetSpec(num_tokens=4097, batch_size=4).steps(128) == 9
    assert BudgetSpec(num_tokens=4096, batch_size=4).steps(128) == 8
    assert BudgetSpec(num_tokens=0).steps(128) == 0


def test_losses_of_a_distillation() -> None:
    spec = DistillSpec.model_validate(
        {"num_steps": 1, "losses": ["reverse_kl", {"kind": "cross_entropy", "weight": 2}]}
    )
    assert spec.losses == [ReverseKL(), CrossEntropy(weight=2)]
    assert DistillSpec(num_steps=1).losses == [ForwardKL()]
    for losses, message in (
        (["forward_kl", "forward_kl"], "is given once.*add up their weights"),
        (["cross_entropy"], "no loss reads the teacher; use kind: finetune"),
        ([], "at least 1"),
        (["backward_kl"], "no such loss"),
    ):
        with pytest.raises(ValidationError, match=message):
            DistillSpec.model_validate({"num_steps": 1, "losses": losses})


@pytest.mark.parametrize(
    "settings",
    [{"precision": "fp8"}, {"micro_batch_size": 0}, {"devices": 0}, {"strategy": "fsdp1"}, {"accelerator": "tpu"}],
)
def test_compute_refuses_what_it_does_not_know(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ComputeSpec(**settings)  # type: ignore[arg-type]


def test_how_many_processes_a_forecast_counts_with() -> None:
    assert ComputeSpec().known_processes() == 1
    assert ComputeSpec(devices=8, num_nodes=2).known_processes() == 16
