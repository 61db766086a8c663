"""Query heads that go leave what sets them apart in those that stay."""

from __future__ import annotations

import json

import pytest
import torch
from contracts.architectures import make

from distill.core.errors import InputError
from distill.core.stored import parse_stored
from distill.models.layouts import layout_for
from distill.pruning.base import Scores
from distill.pruning.layout import config_of
from distill.pruning.plan import Plan, plan
from distill.pruning.surgery import apply
from distill.recipe import Recipe


def opened(name):
    model = make(name)
    config = config_of(model)
    layout = layout_for(config["model_type"])
    return model, config, layout, layout.sizes(config)


def scored(sizes):
    """Heads that count for less the further back they are in their group, but for layer 0, where it is the reverse."""
    per_group = sizes["attention_heads"] // sizes["kv_groups"]
    rising = torch.arange(per_group).float().repeat(sizes["kv_groups"])
    return Scores(attention_heads=torch.stack([rising if layer == 0 else -rising for layer in range(sizes["layers"])]))


def four_in_a_group():
    """(model, config, layout, sizes) of a Llama with two KV groups of four query heads, in float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=4, attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    config = config_of(model)
    layout = layout_for("llama")
    return model, config, layout, layout.sizes(config)


@pytest.mark.parametrize(
    ("heads", "order_of_pairs"),
    [(6, {2: 3}), (4, {1: 2, 0: 3}), (2, {0: 1})],
    ids=["one of four goes", "two go", "three go, one of which is met"],
)
def test_the_last_to_stay_meet_the_first_to_go(heads, order_of_pairs):
    model, config, layout, sizes = four_in_a_group()
    the_plan = plan(scored(sizes), {"num_attention_heads": heads, "head_choice": "merge"}, layout, config)
    assert the_plan == parse_stored(json.dumps(the_plan.to_dict()), Plan, "plan.json", "prune again")
    assert any("merged" in line for line in the_plan.summary())
    got = apply(model, the_plan, layout)
    dropped = apply(model, plan(scored(sizes), {"num_attention_heads": heads}, layout, config), layout)
    stay = heads // 2
    for layer in range(2):
        order = [3, 2, 1, 0] if layer == 0 else [0, 1, 2, 3]
        old, new = model.model.layers[layer].self_attn, got.model.layers[layer].self_attn
        for name in ("weight", "bias"):
            before = getattr(old.q_proj, name).unflatten(0, (2, 4, 4))
            after = getattr(new.q_proj, name).unflatten(0, (2, stay, 4))
            for place, head in enumerate(sorted(order[:stay])):
                partner = order_of_pairs.get(order.index(head))
                expected = before[:, head]
                if partner is not None:
                    expected = before[:, head] + (before[:, head] - before[:, order[partner]])
                torch.testing.assert_close(after[:, place], expected)
        plain = dropped.model.layers[layer].self_attn
        for name in ("k_proj", "v_proj", "o_proj"):
            assert torch.equal(getattr(new, name).weight, getattr(plain, name).weight)


@pytest.mark.parametrize("name", ["phi3", "qwen2", "qwen3"])
def test_fused_and_normed_queries_too(name):
    model, config, layout, sizes = opened(name)
    heads = sizes["attention_heads"] - sizes["kv_groups"]
    if sizes["attention_heads"] == sizes["kv_groups"] or not heads:
        pytest.skip("no group has two heads")
    keep = {"num_attention_heads": heads}
    merged = apply(model, plan(scored(sizes), keep | {"head_choice": "merge"}, layout, config), layout)
    dropped = apply(model, plan(scored(sizes), keep, layout, config), layout)
    differ = {key for key, value in merged.state_dict().items() if not torch.equal(value, dropped.state_dict()[key])}
    assert differ
    assert all(".q_proj." in key or ".qkv_proj." in key for key in differ)


def test_a_kv_group_for_each_head_is_refused():
    _, config, layout, sizes = opened("llama_biases_no_groups")
    assert sizes["kv_groups"] == sizes["attention_heads"]
    with pytest.raises(InputError, match="needs query heads that share a KV group"):
        plan(scored(sizes), {"num_attention_heads": 1, "head_choice": "merge"}, layout, config)


def test_merging_without_a_cut_of_heads_is_refused():
    text = (
        "name: a\nteacher: org/model\ndata: {train: python_docs, sequence_length: 16}\n"
        "stages: {prune: {keep: {hidden_size: 8, head_choice: merge}}}\n"
    )
    with pytest.raises(Exception, match="head_choice 'merge' has no effect without num_attention_heads"):
        Recipe.from_text(text)
