"""The search before anything is built: its grid, its estimate, and what it refuses."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from distill.core.errors import InputError
from distill.models.layouts import layout_for
from distill.pruning.budget import SizeBudget, SizeCosts
from distill.pruning.latency import LatencyModel
from distill.pruning.search import Candidate, SearchSpace

CONFIG = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
LAYOUT = layout_for("llama")
AXES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")


def space(*axes, share=0.5, config=CONFIG, **multiple_of):
    return SearchSpace(LAYOUT, config, axes or AXES, multiple_of, share)


def costs(measure="parameters", config=CONFIG):
    return SizeCosts(measure, LAYOUT, config, context_tokens=64, bytes_per_parameter=2)


def test_sizes_are_what_hardware_likes_and_the_whole():
    grid = space().grid
    assert grid["hidden_size"] == [256, 320, 384, 448, 512]
    assert grid["intermediate_size"] == [*range(704, 1376, 64), 1376]
    assert grid["num_attention_heads"] == [8, 12, 16]
    assert grid["num_hidden_layers"] == [4, 5, 6, 7, 8]
    assert space("num_attention_heads", "num_key_value_heads").grid["num_attention_heads"] == list(range(8, 17))
    assert space("num_hidden_layers", share=0.01).grid["num_hidden_layers"][0] == 2
    assert space("hidden_size", hidden_size=128).grid["hidden_size"] == [256, 384, 512]


def test_a_budget_is_a_number_or_a_share():
    assert SizeBudget(parameters=1000).bounds(5000) == (950, 1000)
    assert SizeBudget(weight_bytes="12.5%", tolerance=0).bounds(800) == (100, 100)
    whole = costs("parameters").of(space().before)
    assert costs("weight_bytes").of(space().before) == 2 * whole
    assert whole - costs("non_embedding_parameters").of(space().before) == 2 * 1000 * 512


@pytest.mark.parametrize("wrong", ["half", "0%", "100%", "-5%", 0, -3.0, "x%"])
def test_an_amount_that_is_none_is_refused(wrong):
    with pytest.raises(ValidationError, match=r"expected a number"):
        SizeBudget(parameters=wrong)


@pytest.mark.parametrize("keys", [{}, {"parameters": 5, "weight_bytes": 7}])
def test_a_budget_has_one_measure(keys):
    with pytest.raises(ValidationError, match=r"give one of parameters, .*"):
        SizeBudget(**keys)


def test_the_estimate_adds_lines_through_what_was_measured():
    it = space("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", num_attention_heads=4)
    losses = {("hidden_size", 256): 4.0, ("hidden_size", 384): 1.0, ("num_hidden_layers", 4): 2.0}
    losses |= {("num_attention_heads", 8): 1.0, ("num_key_value_heads", 2): 3.0}

    def estimate(**keep):
        return it.estimate(Candidate(keep, it.sizes(keep), 0.0), losses)

    assert estimate() == 0.0
    assert estimate(hidden_size=384) == 1.0
    assert estimate(hidden_size=320) == 2.5
    assert estimate(hidden_size=448) == 0.5
    assert estimate(hidden_size=320, num_hidden_layers=6) == 2.5 + 1.0
    # 8 heads in 2 groups are all that these groups have; 4 are half of them
    assert estimate(num_key_value_heads=2, num_attention_heads=8) == 3.0
    assert estimate(num_key_value_heads=2, num_attention_heads=4) == 3.0 + 1.0


def test_knots_span_each_axis_and_can_be_built():
    it = space(hidden_size=8)
    knots = it.knots()
    assert len(knots) <= 4 * len(it.grid)
    assert all(it.possible({key: size}) for key, size in knots)
    assert {size % 16 for key, size in knots if key == "hidden_size"} == {0}  # the class wants whole heads
    by_axis = [[size for k, size in knots if k == key] for key in AXES]
    assert [sizes[0] for sizes in by_axis] == [256, 704, 8, 4]
    assert all(len({*sizes}) == len(sizes) for sizes in by_axis)


def test_what_cannot_be_reached_is_refused_with_what_can():
    it, cost = space(), costs()
    smallest = it.sizes({key: sizes[0] for key, sizes in it.grid.items()})
    message = rf"the smallest architecture of the search has {cost.of(smallest):,.0f}, expected at most 1,000"
    with pytest.raises(InputError, match=message):
        it.candidates(cost, 950, 1000)
    with pytest.raises(InputError, match=r"is not below the model's own"):
        it.candidates(cost, 1, 1e12)
    depth, whole = space("num_hidden_layers"), cost.of(it.before)
    near = [cost.of(depth.sizes({"num_hidden_layers": layers})) for layers in (6, 7)]
    with pytest.raises(
        InputError, match=rf"the nearest have {near[0]:,.0f} and {near[1]:,.0f}; raise search.budget.tol"
    ):
        depth.candidates(cost, sum(near) / 2, sum(near) / 2 + 1)
    assert whole > near[1]


def test_axes_that_the_architecture_lacks_are_refused():
    with pytest.raises(InputError, match=r"llama has no experts"):
        space("num_experts")
    gpt2 = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 8}
    with pytest.raises(InputError, match="hidden_size and num_attention_heads of gpt2 must be cut together"):
        SearchSpace(layout_for("gpt2"), gpt2, ("hidden_size",), {}, 0.5)
    with pytest.raises(InputError, match=r"architectures, expected at most"):
        space("hidden_size", "intermediate_size", "num_hidden_layers", share=0.01, hidden_size=1, intermediate_size=1)


def test_the_control_keeps_the_most_even_shares():
    the_space = space("hidden_size", "intermediate_size", "num_hidden_layers")

    def unevenness(**keep):
        return the_space.unevenness(Candidate(keep, {}, 0.0))

    assert unevenness() == 0
    assert unevenness(hidden_size=256, intermediate_size=688, num_hidden_layers=4) == 0
    assert unevenness(hidden_size=256, num_hidden_layers=4) == 0.5
    assert unevenness(hidden_size=384, num_hidden_layers=6) == unevenness(intermediate_size=1032) == 0.25


def test_latency_is_forecast_from_few_and_never_falls_with_size():
    the_space, flops = space(), costs("flops_per_token")
    probes = [the_space.sizes(choice) for choice in ({}, *the_space.corners())]
    assert len(probes) == 1 + 4 + 1

    def ms(sizes):
        return 1.5 + 0.25 * sizes["layers"] + 3e-8 * flops.of(sizes)

    forecast = LatencyModel(flops, [(sizes, ms(sizes)) for sizes in probes])
    other = the_space.sizes({"hidden_size": 320, "intermediate_size": 960, "num_hidden_layers": 5})
    assert forecast.of(other) == pytest.approx(ms(other))
    # depth and width seem to cost nothing where a small model is all overhead; then that is what the forecast says
    backwards = LatencyModel(flops, [(sizes, 3.0 - 0.1 * sizes["layers"]) for sizes in probes])
    assert backwards.of(the_space.before) >= backwards.of(other) > 0
