"""Wanda, fluctuation and weight range against sums over every token and weight, in fp64."""

import copy

import pytest
import torch

from distill.pruning import Fluctuation, Wanda, WeightRange
from distill.pruning.criterion_statistics import Statistics
from distill.pruning.observe import ModuleIO, TokenMask


def columns(model, batches, module):
    """(tokens that count [tokens, channels], weight) of a linear layer of layer 1."""
    linear = module(model.model.layers[1])
    seen = []
    handle = linear.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    for batch in batches:
        model(batch["input_ids"])
    handle.remove()
    tokens = torch.cat([values[batch["mask"]] for values, batch in zip(seen, batches, strict=True)])
    return tokens, linear.weight


def wanda(tokens, weight):
    return [
        sum(abs(w) for w in weight[:, j].tolist()) * sum(a * a for a in tokens[:, j].tolist()) ** 0.5
        for j in range(tokens.shape[1])
    ]


def fluctuation(tokens, weight):
    found = []
    for j in range(tokens.shape[1]):
        values = tokens[:, j].tolist()
        mean = sum(values) / len(values)
        variance = sum((a - mean) ** 2 for a in values) / len(values)
        found.append(variance * sum(w * w for w in weight[:, j].tolist()))
    return found


@pytest.mark.parametrize(("criterion", "naive"), [(Wanda(), wanda), (Fluctuation(), fluctuation)])
def test_equals_the_naive_computation(model, layout, batches, criterion, naive):
    model = copy.deepcopy(model).double()
    scores = criterion.score(model, layout, batches)
    neurons = torch.tensor(naive(*columns(model, batches, lambda layer: layer.mlp.down_proj)))
    torch.testing.assert_close(scores.mlp_neurons[1], neurons, rtol=1e-5, atol=0)
    queries = torch.tensor(naive(*columns(model, batches, lambda layer: layer.self_attn.o_proj)))
    torch.testing.assert_close(scores.attention_heads[1], queries.view(4, 8).sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(scores.kv_groups[1], queries.view(2, 16).sum(1), rtol=1e-5, atol=0)


def test_a_large_mean_does_not_drown_the_variance(layout):
    """Values around 1000 that differ by 0.01: their squares in fp32 say nothing of it."""
    generator = torch.Generator().manual_seed(0)
    values = 1000 + 0.01 * torch.randn(4, 50, 1, generator=generator).double()
    mask = torch.ones(4, 50, dtype=torch.bool)
    statistics = Statistics()
    path, watcher = next(iter(Fluctuation().observers(layout, {"layers": 1}, statistics)))
    for half in (slice(2), slice(2, 4)):
        watcher(ModuleIO(values[half], values[half], TokenMask(mask[half], values.device)))
    tokens, total, squares = (statistics[f"{path} {name}"] for name in ("tokens", "sum", "squares"))
    got = (squares / tokens - (total / tokens) ** 2).item()
    assert got == pytest.approx(values.var(correction=0).item(), rel=0.02)


def test_weight_range_equals_the_naive_computation(model, layout, batches):
    model = copy.deepcopy(model).double()
    tokens, _ = columns(model, batches, lambda layer: layer.mlp.down_proj)
    mlp = model.model.layers[1].mlp
    rows = [mlp.gate_proj.weight.tolist(), mlp.up_proj.weight.tolist(), mlp.down_proj.weight.T.tolist()]
    ranges = [[max(row) + abs(min(row)) for row in matrix] for matrix in rows]
    reach = [sum(found[j] / max(found) for found in ranges) for j in range(tokens.shape[1])]
    expected = [r * sum(a * a for a in tokens[:, j].tolist()) ** 0.5 for j, r in enumerate(reach)]
    scores = WeightRange().score(model, layout, batches)
    torch.testing.assert_close(scores.mlp_neurons[1].tolist(), expected, rtol=1e-5, atol=0)
    assert scores.attention_heads is None
