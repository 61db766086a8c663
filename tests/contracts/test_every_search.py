"""Every architecture under a budget: what fits is found, is counted exactly, and can be built."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from contracts.architectures import GROUPS, MODELS, make
from distill.core.errors import InputError
from distill.models.layouts import layout_for
from distill.models.size import count_parameters
from distill.pruning.budget import SizeBudget, SizeCosts
from distill.pruning.keep import AXIS_OF_KEY, KeepSpec
from distill.pruning.search import SearchSpace
from distill.pruning.select import target_sizes

SIZED = {
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_attention_heads": GROUPS,
    "num_experts": 1,
    "num_hidden_layers": 1,
}
JOINT = ("hidden_size", "num_attention_heads")
"""What some classes can only cut at once."""


def opened(name, *more):
    model = make(name)
    config = model.config.to_dict()
    layout = layout_for(config["model_type"])
    sizes, joint = layout.sizes(config), layout.rule_of_hidden(config) == "heads_times_head_dim"
    axes = [key for key in (*SIZED, *more) if AXIS_OF_KEY[key] in sizes and not (joint and key in JOINT)]
    return model, layout, config, SearchSpace(layout, config, axes, {key: SIZED.get(key, 1) for key in axes}, 0.25)


def costs_of(measure, layout, config):
    return SizeCosts(measure, layout, config, context_tokens=16, bytes_per_parameter=4)


@pytest.mark.parametrize("name", MODELS)
def test_candidates_fit_and_are_counted_exactly(name):
    model, layout, config, space = opened(name)
    for index, measure in enumerate(("parameters", "non_embedding_parameters")):
        costs = costs_of(measure, layout, config)
        least, most = SizeBudget.model_validate({measure: "70%", "tolerance": 0.2}).bounds(costs.of(space.before))
        found = space.candidates(costs, least, most)
        assert found == space.candidates(costs, least, most)
        for candidate in found[:: max(1, len(found) // 4)]:
            changed = layout.resized(config, target_sizes(KeepSpec(**candidate.keep), config, layout))
            lists = {k: config[k][: candidate.sizes["layers"]] for k in layout.per_layer_keys if config.get(k)}
            with torch.device("meta"):
                built = type(model)(type(model.config)(**{**config, **changed, **lists}))
            assert count_parameters(built)[index] == candidate.cost
            assert least <= candidate.cost <= most


@pytest.mark.parametrize("name", ["llama", "llama_biases_no_groups", "mixtral", "gpt2", "phi4_mini"])
def test_nothing_that_fits_is_missed(name):
    _, layout, config, space = opened(name, *(["num_key_value_heads"] if name != "gpt2" else []))
    costs = costs_of("parameters", layout, config)
    least, most = 0.5 * costs.of(space.before), 0.6 * costs.of(space.before)
    expected = []
    for some in product(*space.grid.values()):
        choice = dict(zip(space.grid, some, strict=True))
        try:
            sizes = target_sizes(KeepSpec.model_validate(choice), config, layout)
        except InputError:
            continue
        if least <= layout.count({**config, **layout.resized(config, sizes)}) <= most:
            expected.append(sizes)
    found = [candidate.sizes for candidate in space.candidates(costs, least, most)]
    assert len(found) == len(expected) > 0
    assert all(sizes in expected for sizes in found)
    assert all(sizes["attention_heads"] % sizes["kv_groups"] == 0 for sizes in found)
    for key, step in SIZED.items():
        allowed = {space.before.get(AXIS_OF_KEY[key])}
        assert all(s.get(AXIS_OF_KEY[key], step) % step == 0 or s[AXIS_OF_KEY[key]] in allowed for s in found)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "gpt2_untied_derived", "pythia", "qwen3", "phi3"])
def test_flops_are_those_that_a_forward_pass_counts(name):
    model, layout, config, space = opened(name)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(16)[None], use_cache=False)
    rotary = 16 * space.before["head_dim"]  # positions times frequencies, which no weight has a part in
    counted = counter.get_total_flops()
    assert 0 <= counted - 16 * costs_of("flops_per_token", layout, config).of(space.before) <= rotary


def test_of_a_mixture_the_chosen_experts_count():
    _, layout, config, space = opened("mixtral")
    costs = costs_of("flops_per_token", layout, config)
    router = 2 * space.before["layers"] * space.before["hidden_channels"]
    assert costs.of(space.before) - costs.of(space.before | {"experts": 3}) == router
