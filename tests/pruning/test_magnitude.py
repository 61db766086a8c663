"""Magnitude and random: sums by hand, and what must not matter."""

import math

import pytest
import torch

from distill.pruning.magnitude import Magnitude
from distill.pruning.random import Random, random


def size(*tensors):
    return math.sqrt(sum(value * value for tensor in tensors for value in tensor.flatten().tolist()))


def test_magnitude_equals_sums_by_hand(model, layout):
    scores = Magnitude().score(model, layout, [])
    for index, layer in enumerate(model.model.layers):
        mlp, attention = layer.mlp, layer.self_attn
        for j in (0, 23):
            expected = size(mlp.gate_proj.weight[j], mlp.up_proj.weight[j], mlp.down_proj.weight[:, j])
            assert scores.mlp_neurons[index, j].item() == pytest.approx(expected, rel=1e-5)
        for h in (1, 3):
            rows = slice(8 * h, 8 * h + 8)
            expected = size(attention.q_proj.weight[rows], attention.o_proj.weight[:, rows])
            assert scores.attention_heads[index, h].item() == pytest.approx(expected, rel=1e-5)
        for g in (0, 1):
            kv, queries = slice(8 * g, 8 * g + 8), slice(16 * g, 16 * g + 16)
            expected = size(
                attention.k_proj.weight[kv],
                attention.v_proj.weight[kv],
                attention.q_proj.weight[queries],
                attention.o_proj.weight[:, queries],
            )
            assert scores.kv_groups[index, g].item() == pytest.approx(expected, rel=1e-5)
    parts = [model.model.embed_tokens.weight[:, 5], model.lm_head.weight[:, 5]]
    for layer in model.model.layers:
        for linear in (*(getattr(layer.self_attn, f"{x}_proj") for x in "qkv"), layer.mlp.gate_proj, layer.mlp.up_proj):
            parts.append(linear.weight[:, 5])
        parts += [layer.self_attn.o_proj.weight[5], layer.mlp.down_proj.weight[5]]
    assert scores.hidden_channels[5].item() == pytest.approx(size(*parts), rel=1e-5)


def test_random_depends_on_its_seed_alone(model, layout):
    sizes = layout.sizes(model.config.to_dict())
    state = torch.get_rng_state()
    one, two, other = random(sizes, 1), Random(seed=1).score(model, layout, []), random(sizes, 2)
    assert torch.equal(state, torch.get_rng_state())
    for axis, tensor in one.tensors().items():
        assert torch.equal(tensor, two.tensors()[axis])
        assert not torch.equal(tensor, other.tensors()[axis])
