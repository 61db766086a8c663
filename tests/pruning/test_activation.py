"""Activation scores against a computation with explicit loops over samples, tokens and channels."""

import math

import pytest
import torch

from distill.core.batch import causal_batch
from distill.core.errors import InputError
from distill.pruning.activation import Activation, activation
from distill.pruning.base import Scores


def naive(model, batches):
    """Minitron's width scores from a hand-written forward pass of one sample at a time."""
    layers = model.config.num_hidden_layers
    neurons, queries = [[0.0] * 24 for _ in range(layers)], [[0.0] * 32 for _ in range(layers)]
    norms = [[0.0] * 32 for _ in range(2 * layers)]

    def add(target, values, mask):
        count = sum(mask.tolist())
        for channel in range(values.shape[-1]):
            total = sum(abs(values[t, channel].item()) for t in range(len(mask)) if mask[t])
            target[channel] += (total / count) ** 2 if count else 0.0

    for ids, mask in ((b["input_ids"][i], b["mask"][i]) for b in batches for i in range(len(b["input_ids"]))):
        x = model.model.embed_tokens(ids[None])
        positions = torch.arange(len(ids))[None]
        rotary = model.model.rotary_emb(x, positions)
        causal = torch.full((1, 1, len(ids), len(ids)), -torch.inf).triu(1)
        for index, layer in enumerate(model.model.layers):
            normed = layer.input_layernorm(x)
            add(norms[2 * index], normed[0], mask)
            attention = layer.self_attn
            seen = []
            handle = attention.o_proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            x = x + attention(normed, position_embeddings=rotary, attention_mask=causal)[0]
            handle.remove()
            add(queries[index], seen[0][0], mask)
            normed = layer.post_attention_layernorm(x)
            add(norms[2 * index + 1], normed[0], mask)
            mlp = layer.mlp
            active = torch.nn.functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed)
            add(neurons[index], active[0], mask)
            x = x + mlp.down_proj(active)
    heads = [[math.sqrt(sum(row[8 * h : 8 * h + 8])) for h in range(4)] for row in queries]
    groups = [[math.sqrt(sum(row[16 * g : 16 * g + 16])) for g in range(2)] for row in queries]
    hidden = [sum(math.sqrt(row[c]) for row in norms) for c in range(32)]
    return [[math.sqrt(v) for v in row] for row in neurons], heads, groups, hidden


@torch.no_grad()
def test_activation_equals_the_naive_computation(model, layout, batches):
    scores = Activation().score(model, layout, batches)
    expected = naive(model, batches)
    got = (scores.mlp_neurons, scores.attention_heads, scores.kv_groups, scores.hidden_channels)
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, torch.tensor(reference), rtol=1e-4, atol=1e-6)


def test_activation_does_not_depend_on_batching_or_masked_tokens(model, layout, batches):
    reference = Activation().score(model, layout, batches)
    singles = [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(len(b["mask"]))]
    padded = [
        causal_batch(
            torch.cat([b["input_ids"], torch.full((len(b["mask"]), 4), 7)], 1),
            torch.cat([b["mask"], torch.zeros(len(b["mask"]), 4, dtype=torch.bool)], 1),
        )
        for b in batches
    ]
    for other in (Activation().score(model, layout, singles), Activation().score(model, layout, padded)):
        for axis, tensor in reference.tensors().items():
            torch.testing.assert_close(other.tensors()[axis], tensor, rtol=1e-5, atol=1e-7)


def test_sums_are_kept_in_fp32():
    values, mask = torch.full((1, 4, 1), 30000.0, dtype=torch.float16), torch.ones(1, 4, dtype=torch.bool)
    assert activation(values, mask, "mean").item() == 30000  # the sum of four is no float16
    assert activation(values, mask, "l2").item() == 60000
    assert activation(values, mask, "variance").item() == 0


@pytest.mark.parametrize("sequence", ["mean", "l2", "variance"])
@pytest.mark.parametrize("batch", ["l2", "mean", "variance"])
def test_every_aggregation_equals_the_naive_one(model, layout, batches, sequence, batch):
    seen = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    for one in batches:
        model(one["input_ids"])
    handle.remove()
    over_tokens = {
        "mean": lambda a: a.abs().mean(0),
        "l2": lambda a: a.square().sum(0).sqrt(),
        "variance": lambda a: a.var(0, correction=0),
    }[sequence]
    masks = torch.cat([b["mask"] for b in batches])
    samples = torch.stack([over_tokens(a[m].double()) for a, m in zip(torch.cat(seen), masks, strict=True) if m.any()])
    expected = {
        "l2": samples.square().sum(0).sqrt(),
        "mean": samples.mean(0),
        "variance": samples.var(0, correction=0),
    }[batch]
    scores = Activation(sequence=sequence, batch=batch).score(model, layout, batches)
    torch.testing.assert_close(scores.mlp_neurons[1], expected.float(), rtol=1e-4, atol=1e-7)


def test_nothing_to_read_is_refused(model, layout, batches):
    empty = [causal_batch(b["input_ids"], torch.zeros_like(b["mask"])) for b in batches]
    for data in (empty, []):
        with pytest.raises(InputError, match="the masks of the calibration data select 0 tokens"):
            Activation().score(model, layout, data)
    with pytest.raises(InputError, match=r"expected torch\.bool"):
        Activation().score(model, layout, [causal_batch(batches[0]["input_ids"], batches[0]["mask"].long())])


def test_scores_refuse_what_is_not_finite():
    with pytest.raises(InputError, match="scores of layers contain NaN"):
        Scores(layers=torch.tensor([1.0, float("nan")]))
