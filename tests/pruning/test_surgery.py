"""Surgery: refusals; what it computes is in the contract tests."""

import copy
import dataclasses

import pytest
import torch

from distill.core.errors import InputError
from distill.pruning.plan import plan
from distill.pruning.random import random
from distill.pruning.surgery import apply


@pytest.fixture
def made(model, layout):
    config = model.config.to_dict()
    return plan(random(layout.sizes(config), 0), {"intermediate_size": 8, "hidden_size": 16}, layout, config)


def test_a_plan_of_another_model_is_refused(model, layout, made):
    with pytest.raises(InputError, match="the plan is for a llama with sizes"):
        apply(apply(model, made, layout), made, layout)


def test_a_wrong_forecast_is_an_alarm(model, layout, made):
    with pytest.raises(AssertionError, match="expected 1 by the plan"):
        apply(model, dataclasses.replace(made, parameters=1), layout)


def test_a_wrapped_model_is_refused(model, layout, made):
    wrapped = copy.deepcopy(model)
    wrapped.model.layers[0].mlp.up_proj.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"adapter\.bias is \(2,\), expected no such parameter.*without adapters"):
        apply(wrapped, made, layout)


def test_pruning_in_two_steps_keeps_the_exact_norms(model, layout, made):
    """Epsilon and norm weights of a second cut build on those of the first."""
    once = apply(model, made, layout)
    config = once.config.to_dict()
    twice = apply(once, plan(random(layout.sizes(config), 0), {"hidden_size": 8}, layout, config), layout)
    assert twice.config.rms_norm_eps == pytest.approx(model.config.rms_norm_eps * 32 / 8)
    ratio = twice.model.norm.weight.detach() / 1.0
    torch.testing.assert_close(ratio, torch.full((8,), 2.0))
