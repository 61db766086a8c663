"""Experts of a mixture, scored by loops over tokens: what the router sends where, and what comes of it."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from distill.models.layouts import layout_for
from distill.pruning import Activation, Magnitude

LAYOUT = layout_for("mixtral")


@pytest.fixture(scope="module")
def mixture():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=53,
        hidden_size=32,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=5,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    return MixtralForCausalLM(config).eval()


@torch.no_grad()
def test_activation_equals_loops_over_tokens(mixture, batches):
    block = mixture.model.layers[1].mlp
    samples, outputs = [[0.0] * 12 for _ in range(5)], [[] for _ in range(5)]
    for ids, mask in ((b["input_ids"][i], b["mask"][i]) for b in batches for i in range(len(b["mask"]))):
        seen = []
        handle = block.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0]))
        mixture(ids[None])
        handle.remove()
        sums = [[0.0] * 12 for _ in range(5)]
        for token in seen[0][mask]:
            chosen = (token @ block.gate.weight.T).softmax(-1).topk(2)
            for expert, weight in zip(
                chosen.indices.tolist(), (chosen.values / chosen.values.sum()).tolist(), strict=True
            ):
                gate, up = (block.experts.gate_up_proj[expert] @ token).chunk(2)
                neurons = torch.nn.functional.silu(gate) * up
                outputs[expert].append(weight * (block.experts.down_proj[expert] @ neurons).norm().item())
                sums[expert] = [a + abs(b) for a, b in zip(sums[expert], neurons.tolist(), strict=True)]
        count = max(1, int(mask.sum()))
        samples = [
            [a + (b / count) ** 2 for a, b in zip(*pair, strict=True)] for pair in zip(samples, sums, strict=True)
        ]
    scores = Activation().score(mixture, LAYOUT, batches)
    expected = torch.tensor([sum(values) / max(1, len(values)) for values in outputs])
    torch.testing.assert_close(scores.experts[1], expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(scores.mlp_neurons[1], torch.tensor(samples).sqrt(), rtol=1e-4, atol=1e-7)


def test_an_expert_that_gets_no_token_is_worth_nothing(mixture, batches):
    gate = mixture.model.layers[0].mlp.gate
    before = gate.forward
    logits_of_some = torch.tensor([0.0, 0.0, -1e9, 0.0, 0.0])

    def forward(hidden):
        logits = hidden.reshape(-1, 32) @ gate.weight.T + logits_of_some
        values, chosen = logits.softmax(-1).topk(2)
        return logits, values / values.sum(-1, keepdim=True), chosen

    gate.forward = forward
    scores = Activation().score(mixture, LAYOUT, batches)
    gate.forward = before
    assert scores.experts[0].tolist().index(0.0) == 2
    assert (scores.mlp_neurons[0, 2] == 0).all()
    assert (scores.experts[1] > 0).all()


def test_magnitude_counts_what_an_expert_owns(mixture):
    experts, gate = mixture.model.layers[1].mlp.experts, mixture.model.layers[1].mlp.gate
    scores = Magnitude().score(mixture, LAYOUT, [])
    parts = [experts.gate_up_proj[3], experts.down_proj[3], gate.weight[3]]
    assert scores.experts[1, 3].item() == pytest.approx(sum(p.square().sum().item() for p in parts) ** 0.5, rel=1e-5)
    owned = [experts.gate_up_proj[3, 7], experts.gate_up_proj[3, 12 + 7], experts.down_proj[3, :, 7]]
    expected = sum(p.square().sum().item() for p in owned) ** 0.5
    assert scores.mlp_neurons[1, 3, 7].item() == pytest.approx(expected, rel=1e-5)
