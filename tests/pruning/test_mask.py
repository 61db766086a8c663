"""Masks of single weights: which stay, and that those that do not stay at zero whatever trains the model."""

import copy

import pytest
import torch

from distill.core.errors import InputError
from distill.models.layouts import layout_for
from distill.pruning.mask import (
    apply_mask,
    freeze_zeros,
    masked_layers,
    nonzero_share,
    squares_of_inputs,
    two_of_four,
    unstructured,
)
from distill.quantization import Int8Channel, IntGroup


def test_two_of_four_keeps_the_larger_two():
    importance = torch.tensor([[4.0, 1, 3, 2, 1, 1, 1, 1]])
    assert two_of_four(importance).tolist() == [[True, False, True, False, False, False, True, True]]
    with pytest.raises(InputError, match=r"multiple of 4 \(got 6\)"):
        two_of_four(torch.ones(2, 6))


def test_unstructured_takes_its_share_of_each_row():
    importance = torch.rand(5, 11, generator=torch.Generator().manual_seed(0))
    stays = unstructured(importance, 0.3)
    assert (stays.sum(1) == 11 - 3).all()
    for row, kept in zip(importance, stays, strict=True):
        assert row[~kept].max() < row[kept].min()


@pytest.mark.parametrize("criterion", ["wanda", "magnitude"])
def test_the_mask_is_that_of_the_formula(model, layout, batches, criterion):
    masked = copy.deepcopy(model)
    layers = masked_layers(masked, layout)
    assert len(layers) == 3 * 7
    assert not any("embed" in name or "lm_head" in name for name in layers)
    seen = []
    handle = model.model.layers[2].mlp.up_proj.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    for batch in batches:
        model(batch["input_ids"])
    handle.remove()
    tokens = torch.cat([values[batch["mask"]] for values, batch in zip(seen, batches, strict=True)])
    weight = model.model.layers[2].mlp.up_proj.weight
    importance = weight.abs() * (tokens.norm(dim=0) if criterion == "wanda" else 1)

    apply_mask(layers, "2:4", 0.5, squares_of_inputs(masked, layout, batches) if criterion == "wanda" else {})
    after = masked.model.layers[2].mlp.up_proj.weight
    kept = importance.unflatten(1, (-1, 4)).argsort(-1)[..., 2:].sort(-1).values
    assert torch.equal((after != 0).unflatten(1, (-1, 4)).nonzero()[:, 2].view(kept.shape), kept)
    assert torch.equal(after[after != 0], weight[after != 0])
    linear = sum(layer.weight.numel() for layer in layers.values())
    assert nonzero_share(masked) == pytest.approx(1 - linear / 2 / sum(p.numel() for p in model.parameters()))


def test_held_zeros_stay_zero_to_the_last_bit(model, layout, batches):
    held = copy.deepcopy(model).train()
    layers = masked_layers(held, layout)
    apply_mask(layers, "unstructured", 0.6, {})
    zero = {name: layer.weight == 0 for name, layer in layers.items()}
    before = copy.deepcopy(held.state_dict())
    freeze_zeros(layers)
    optimizer = torch.optim.AdamW(held.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        for batch in batches:  # gradients of two batches add up
            held(batch["input_ids"], labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, layer in layers.items():
        assert torch.equal(layer.weight == 0, zero[name])
        assert not torch.equal(layer.weight, before[f"{name}.weight"])


@pytest.mark.parametrize("quantizer", [Int8Channel(), IntGroup(group_size=8)])
def test_zero_is_a_point_of_every_grid(quantizer):
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    weight[two_of_four(weight.abs()).logical_not()] = 0
    rounded = quantizer.dequantize(quantizer.quantize(weight))
    assert (rounded[weight == 0] == 0).all()


def test_what_is_no_linear_layer_is_refused_by_name():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    with pytest.raises(InputError, match=r"c_attn\.weight is in a Conv1D"):
        masked_layers(GPT2LMHeadModel(config), layout_for("gpt2"))
